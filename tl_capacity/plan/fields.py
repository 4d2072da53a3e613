"""Fields of a saved plan, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from tl_capacity.results.estimate import Estimate


def field(saved: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a saved object, of the expected type.

    Raises:
        KeyError, TypeError: where it is not.
    """
    if not isinstance(saved[name], kind) or isinstance(saved[name], bool):
        raise TypeError(f"{name} = {saved[name]!r}")
    return saved[name]


def width_field(saved: Mapping[str, Any], name: str) -> int:
    """A width of at least 1.

    Raises:
        KeyError, TypeError, ValueError: where it is none.
    """
    width: int = field(saved, name, int)
    if width < 1:
        raise ValueError(f"{name} = {width}")
    return width


def estimate_field(saved: Mapping[str, Any], name: str) -> Estimate:
    """A number with its interval. All are finite.

    Raises:
        KeyError, TypeError, ValueError: where it is none.
    """
    content = field(saved, name, dict)
    ends = (field(content, end, (int, float, type(None))) for end in ("low", "high"))
    estimate = Estimate(field(content, "value", (int, float)), *ends)
    if not all(end is None or isfinite(end) for end in vars(estimate).values()):
        raise ValueError(f"{name} = {content}")
    return estimate
