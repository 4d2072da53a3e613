"""Parts of the page: cells, tables and sections, and the format of numbers and messages.

All of it is plain text; the template escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from tl_capacity.results.columns import Column
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.results.hook import HookMeasurement


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, its interval or other small print, and its sorting key."""

    text: str
    small: str = ""
    order: int | float | str | None = None


@dataclass(frozen=True)
class PageTable:
    """A table whose columns can be sorted. A `folded` one opens with a click on its title."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        legend: colour, symbol and name of each series, where several figures have the same ones.
        missing: in a sentence, why there is nothing to see; `command`, how to get it.
    """

    id: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, go.Figure, str]] = ()
    legend: Sequence[tuple[str, str, str]] = ()
    tables: Sequence[PageTable] = ()
    missing: str = ""
    command: str = ""


def estimate_cell(estimate: Estimate, digits: str = "") -> Cell:
    """A number with its interval below it."""
    if not isfinite(estimate.value):
        return Cell("undefined", order=float("-inf"))
    number, _, interval = estimate.brief(digits or significant(estimate.value)).partition(" ")
    return Cell(number, interval, estimate.value)


def column_cell(column: Column, hook: HookMeasurement) -> Cell:
    """A headline figure of a hook point, as a cell."""
    value = column.value(hook)
    if value is None:
        return Cell("not checked", order=-1)
    if isinstance(value, Estimate):
        return estimate_cell(value, column.digits)
    return Cell(column.show(hook), order=value if isinstance(value, (int, float)) else None)


def number_cell(value: int) -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", order=value)


def share_cell(share: Estimate) -> Cell:
    """A share as a percentage, with its interval below it."""
    number, _, interval = percent(share).partition(" ")
    return Cell(number, interval, share.value)


def text_cell(text: str, small: str = "") -> Cell:
    """Text that sorts alphabetically."""
    return Cell(text, small, text)


def percent(share: Estimate) -> str:
    """A share as a percentage of three significant digits, with its interval."""
    return share.brief(significant(100 * (share.value or share.high or 1.0), 3).replace("f", "%").replace("g", "%"))


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as a list of names and values. Nested ones stand in place; empty ones are left out."""
    listed = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            listed.append(settings_text(value))
        elif value not in (None, "", [], {}):
            listed.append(f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return ", ".join(listed)


def sentence(text: str) -> str:
    """A message as a sentence of its own."""
    text = text.strip()
    if text.partition(" ")[0].isalpha():  # no name of a hook point
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."
