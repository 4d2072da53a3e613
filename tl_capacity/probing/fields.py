"""Fields of rows that recipes wrote as JSON. A missing number is None; an impossible value is refused."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from tl_capacity.errors import MeasurementError
from tl_capacity.results.estimate import Estimate

LARGEST = 10**15
"""No count, width or score comes near this number."""


def width_of(file: str, row: Mapping[str, Any]) -> int:
    """The width of a row.

    Raises:
        MeasurementError: where it is no width.
    """
    width = row["width"]
    if type(width) is not int or not 1 <= width <= LARGEST:
        raise MeasurementError(
            f"{file} has the width {_quoted(width)}, which is not a whole number of dimensions: it was altered, write"
            " it again"
        )
    return width


def estimate_of(file: str, row: Mapping[str, Any], name: str, low: str, high: str) -> Estimate | None:
    """A number of a row, with its interval; None if there is no number."""
    value, *ends = (finite(file, row.get(key)) for key in (name, low, high))
    return None if value is None else Estimate(value, *ends)


def numbers_of(file: str, content: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers."""
    return {name: number for name, value in content.items() if (number := finite(file, value)) is not None}


def object_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside another; empty if there is none."""
    inner = content.get(name)
    return inner if isinstance(inner, dict) else {}


def objects_of(content: Any, name: str) -> list[dict[str, Any]]:
    """The objects of a list inside an object; empty if there is none."""
    inner = content.get(name) if isinstance(content, dict) else None
    return [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else []


def finite(file: str, value: Any) -> float | None:
    """The value as a number; None if it is not a number.

    Raises:
        MeasurementError: where it is too large to be a result.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (isinstance(value, int) or isfinite(value))
    ):
        return None
    if abs(value) > LARGEST:
        raise MeasurementError(
            f"{file} has the number {_quoted(value)}, which cannot be a result: it was altered, write it again"
        )
    return float(value)


def whole(file: str, value: Any) -> int | None:
    """The value as a whole number; None if it is not one."""
    number = finite(file, value)
    return None if number is None or not number.is_integer() else int(number)


def as_count(number: float) -> int | float:
    """A count without a decimal point, as JSON holds it."""
    return int(number) if float(number).is_integer() else number


def _quoted(value: Any) -> str:
    """A value for an error message. Only the first of very many digits are shown."""
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}…"
