"""Figures of the floors that toy models reached, against the student's width; one panel for each n and α."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go

from tl_capacity import theory
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.figures import GREY, error_bars, new_panels

GREY_LINE = {"color": GREY, "width": 1}


def achieved_figure(students: Any) -> go.Figure:
    """Achieved floors against the width, from the best to the worst seed; one panel for each n and α.

    Args:
        students: one row for each student.
    """
    figure = floor_panels(students)
    for panel, at in panels_of(students):
        add_achieved(figure, panel, at)
    return figure


def floor_panels(students: Any) -> go.Figure:
    """An empty figure with one panel for each n and α."""
    features, alphas = _axes(students)
    titles = [f"n = {n}, α = {alpha:g}" for n in features for alpha in alphas]
    figure = new_panels(titles, len(alphas), horizontal_spacing=0.055, vertical_spacing=0.09)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title="width d (dotted: d*)", row=len(features))
    figure.update_yaxes(title="floor", col=1)
    return figure


def panels_of(students: Any) -> Iterator[tuple[Any, dict[str, int]]]:
    """The students of each n and α that were trained on the data, with the row and column of their panel."""
    features, alphas = _axes(students)
    for (n, alpha), panel in students[students.kind == "direct"].groupby(["n", "alpha"]):
        yield panel, {"row": features.index(n) + 1, "col": alphas.index(alpha) + 1}


def add_achieved(figure: go.Figure, panel: Any, at: dict[str, int]) -> None:
    """Draw the achieved floors of one n and α, and d*."""
    achieved = panel.groupby("width").achieved_floor.agg(["mean", "min", "max"])
    spread = [Estimate(*row) for row in achieved.itertuples(index=False)]
    figure.add_scatter(
        x=achieved.index,
        y=achieved["mean"],
        error_y=error_bars(spread, "black"),
        mode="markers",
        name="achieved: mean, best to worst seed",
        marker={"color": "black", "size": 5},
        legendgroup="achieved",
        showlegend=at == {"row": 1, "col": 1},
        **at,
    )
    critical = theory.critical_width(float(panel.n.iloc[0]), float(panel.alpha.iloc[0]))
    if critical <= achieved.index.max():
        figure.add_vline(x=critical, line={**GREY_LINE, "dash": "dot"}, opacity=1, **at)


def _axes(students: Any) -> tuple[list[Any], list[Any]]:
    direct = students[students.kind == "direct"]
    return sorted(direct.n.unique()), sorted(direct.alpha.unique())
