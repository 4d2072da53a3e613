"""Is this the same run? What a run that goes on must have in common with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names in `now` that have another value in `before`, in the order of `now`; a field that is missing is None,
    as a setting is that was not given.
    """
    return [name for name, value in now.items() if before.get(name) != value]


def earlier_values(before: Mapping[str, Any], now: Mapping[str, Any], all_of_them: bool = False) -> str:
    """What a run before this one had where this one has something else, as `seed = 1, tokens = 500`; nothing where they
    agree.

    Args:
        all_of_them: a field that only the earlier run has counts too.
    """
    compared = {**dict.fromkeys(before), **now} if all_of_them else now
    return ", ".join(f"{name} = {before.get(name)}" for name in changed_fields(before, compared))
