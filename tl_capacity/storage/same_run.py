"""Is this the same run? What a run that continues must have in common with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names in `now` whose value differs in `before`, in the order of `now`. A missing field is None, like a
    setting that was not given.
    """
    return [name for name, value in now.items() if before.get(name) != value]


def earlier_values(before: Mapping[str, Any], now: Mapping[str, Any], all_of_them: bool = False) -> str:
    """The values of an earlier run where they differ from this one's, as `seed = 1, tokens = 500`; empty if they agree.

    Args:
        all_of_them: a field that only the earlier run has counts too.
    """
    compared = {**dict.fromkeys(before), **now} if all_of_them else now
    return ", ".join(f"{name} = {before.get(name)}" for name in changed_fields(before, compared))
