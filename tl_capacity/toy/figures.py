"""Figures of a sweep: achieved and predicted floors, against the student's width and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tl_capacity.errors import CapacityError
from tl_capacity.show.figures import line_of, marker_of, new_panels
from tl_capacity.toy.achieved import GREY_LINE, add_achieved, floor_panels, panels_of
from tl_capacity.toy.judging import cells, said
from tl_capacity.toy.predictors import Predictor, predictors


def floors_figure(students: Any, chosen: Sequence[Predictor] | None = None) -> go.Figure:
    """Achieved floors against the width, from the best to the worst seed, and predicted ones; one panel for each n and
    α.

    Args:
        students: what `predictions` returned.
        chosen: the predictors of which those that say so are drawn; by default all there are.
    """
    figure, names = floor_panels(students), drawn_names(students[students.kind == "direct"], chosen)
    for panel, at in panels_of(students):
        add_achieved(figure, panel, at)
        for place, name in enumerate(names):
            predicted = panel.groupby("width")[name].mean()
            figure.add_scatter(
                x=predicted.index,
                y=predicted,
                mode="lines",
                name=name,
                line=line_of(place),
                legendgroup=name,
                showlegend=at == {"row": 1, "col": 1},
                **at,
            )
    return figure


def predictors_figure(students: Any, chosen: Sequence[Predictor] | None = None) -> go.Figure:
    """Achieved against predicted floors, as shares of the loss of keeping nothing; one panel for each predictor.

    On the diagonal, the prediction is true.

    Args:
        students, chosen: as in `floors_figure`.
    """
    rows = cells(students)
    names = drawn_names(rows, chosen)
    figure = new_panels(names, len(names), horizontal_spacing=0.05, shared_yaxes=True)
    for column, name in enumerate(names, start=1):
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=GREY_LINE, showlegend=False, row=1, col=column)
        for place, (alpha, same_alpha) in enumerate(rows.groupby("alpha")):
            figure.add_scatter(
                x=same_alpha[name] / same_alpha.nothing,
                y=same_alpha.achieved_floor / same_alpha.nothing,
                mode="markers",
                marker=marker_of(place, 6),
                name=f"α = {alpha:g}",
                legendgroup=f"{alpha:g}",
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(title="predicted / L(0)")
    figure.update_yaxes(title="achieved / L(0)", col=1)
    return figure


def drawn_names(rows: Any, chosen: Sequence[Predictor] | None) -> list[str]:
    """Names of the predictors that figures show, of the given ones or of all."""
    return said(rows, [each for each in (predictors() if chosen is None else chosen) if each.drawn])


def png(figure: go.Figure, width: int, height: int) -> bytes:
    """A figure as a PNG picture of the given size, with its legend below.

    Raises:
        CapacityError: where the picture cannot be made.
    """
    figure.update_layout(
        font={"size": 12},
        legend={"orientation": "h", "y": -0.1 if height > 500 else -0.25, "yanchor": "top"},
        margin={"l": 60, "r": 20, "t": 40, "b": 40},
    )
    try:
        return bytes(figure.to_image("png", width=width, height=height, scale=1.5))
    except (ImportError, ValueError, RuntimeError) as problem:
        raise CapacityError(
            f"figures cannot be drawn ({str(problem).strip().splitlines()[0]}): install kaleido and Chromium, or leave"
            " out --report"
        ) from problem
