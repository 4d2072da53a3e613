"""Tables of a sweep's page in Markdown, and the format of their numbers and sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pivot(table: Any, definition: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows for one accuracy, as text: one row for each predictor, one column for each stratum.

    Args:
        table: what `accuracy` returned.
        definition: one of its accuracies.
    """
    wide = table.pivot(index="predictor", columns="stratum", values=definition)
    names, columns = table.predictor.unique(), table.stratum.unique()
    digits = ".5f" if definition == "mae" else ".3f"
    return ["predictor", *columns], [
        [name, *(number(wide.loc[name, column], digits) for column in columns)] for name in names
    ]


def accuracy_table(table: Any, definition: str) -> str:
    """A table of one accuracy, with the number of observations in each stratum; arguments as in `pivot`."""
    counts = table.groupby("stratum")["count"].first()
    header, rows = pivot(table, definition)
    return markdown_table([header[0], *(f"{escaped(name)} ({counts[name]})" for name in header[1:])], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def number(value: float, digits: str) -> str:
    """A number with that many digits, or n/a if it is not defined."""
    return "n/a" if np.isnan(value) else f"{value:{digits}}".replace("-", "−")


def value_set(values: Sequence[int] | Sequence[float]) -> str:
    """Values as a set in braces."""
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"


def escaped(text: str) -> str:
    """Text that Markdown reads without emphasis."""
    return text.replace("*", "\\*")
