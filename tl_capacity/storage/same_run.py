"""Is this the same run? What a run that goes on must have in common with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names in `now` that have another value in `before`, or none there, in the order of `now`."""
    return [name for name, value in now.items() if before.get(name) != value]
