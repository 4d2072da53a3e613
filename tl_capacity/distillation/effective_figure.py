"""The figure of effective capacity: features per dimension that students are worth, beside the capacity law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import plotly.graph_objects as go

from tl_capacity.errors import CapacityError
from tl_capacity.show.figures import (
    add_series,
    colour_of,
    distinct_labels,
    legend_entry,
    line_of,
    marker_of,
    new_figure,
    width_axis,
)


@runtime_checkable
class Effective(Protocol):
    """The parts of an `EffectiveCapacity` that its figure needs."""

    @property
    def law(self) -> str: ...

    def series(self) -> Mapping[tuple[str, str, str], Sequence[Any]]: ...


def effective_figure(found: Effective) -> go.Figure:
    """Features per dimension against the student's width, one colour for each curve, with 95% intervals.

    Dotted lines show what the capacity law says.

    Raises:
        CapacityError: where students of no width are worth a number of features.
    """
    series = found.series()
    if all(row.per_dimension is None for rows in series.values() for row in rows):
        raise CapacityError(
            "students of every width are worth more than all features of the dictionary: splice one that reconstructs"
            " better"
        )
    figure, labels = new_figure(), distinct_labels(list(series))
    for place, (label, rows) in enumerate(zip(labels, series.values(), strict=True)):
        worth = [row for row in rows if row.per_dimension is not None]
        name = legend_entry(label)["name"]
        add_series(
            figure, [r.width for r in worth], [r.per_dimension for r in worth], name, line_of(place), marker_of(place)
        )
        figure.add_scatter(
            x=[row.width for row in rows],
            y=[row.expected.value for row in rows],
            mode="lines",
            line={"color": colour_of(place), "width": 1, "dash": "dot"},
            showlegend=place == 0,
            hovertemplate=f"{name}: %{{y:.3g}} by {found.law}<extra></extra>",
            **legend_entry(found.law if len(labels) == 1 else f"dotted: {found.law}"),
        )
    figure.update_yaxes(title="features per dimension", rangemode="tozero")
    width_axis(figure, [row.width for rows in series.values() for row in rows])
    return figure
