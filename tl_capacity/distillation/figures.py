"""Figures of students: observed beside predicted floors, and the curves that they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go

from tl_capacity.distillation.candidates import short_names
from tl_capacity.distillation.curves import GIVEN, StudentCurve
from tl_capacity.distillation.fitting import Fit
from tl_capacity.distillation.observed import ObservedFloor, observed_floors, power_law
from tl_capacity.errors import CapacityError
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.figures import (
    DASHES,
    GREY,
    colour_of,
    decimated,
    error_bars,
    legend_entry,
    line_of,
    marker_of,
    new_figure,
    round_numbers,
    shown,
    width_axis,
)
from tl_capacity.show.palette import COLOURS


@runtime_checkable
class Explained(Protocol):
    """The parts of a `Decomposition` that the figure of observed floors needs."""

    @property
    def which(self) -> str: ...

    @property
    def chosen(self) -> Fit: ...

    @property
    def best(self) -> tuple[Fit | None, Fit | None]: ...


def observed_figure(
    floors: Sequence[ObservedFloor], decomposition: Explained | None = None, which: str = "last_tenth"
) -> go.Figure:
    """Observed floors against width, with their 95% intervals.

    A decomposition adds three curves: the requested prediction, the best candidate that knows features, and the best
    rival. Each has two fitted constants.

    Args:
        which: "last_tenth", or "fit" for L∞; a decomposition has its own.

    Raises:
        CapacityError: where there is no student but the control.
    """
    students = sorted((f for f in floors if f.start != "teacher"), key=lambda f: f.width)
    if not students:
        raise CapacityError("the distillation has only the control student: distil some widths")
    figure, which = new_figure(), decomposition.which if decomposition is not None else which
    values = [student.taken_as(which) for student in students]
    figure.add_scatter(
        x=[f.width for f in students],
        y=[v.value for v in values],
        error_y=error_bars(values, COLOURS[0]),
        text=[shown(f.name) for f in students],
        hovertemplate="%{text}: %{y:.4f} nats per token",
        mode="markers",
        marker=marker_of(0, 9),
        cliponaxis=False,  # a floor of zero lies on the axis
        **legend_entry(_what_was_observed(students, which)),
    )
    controls = [f for f in floors if f.start == "teacher"]
    if controls:
        marker = {"color": GREY, "symbol": "circle-open", "size": 9}
        figure.add_scatter(
            x=[f.width for f in controls],
            y=[f.last_tenth for f in controls],
            mode="markers",
            marker=marker,
            **legend_entry("control from the teacher's weights"),
        )
    drawn = _drawn_fits(decomposition)
    short = short_names(fit.candidate for fit, _ in drawn)
    for place, (fit, role) in enumerate(drawn, 1):
        widths = sorted(fit.fitted)
        label = f"{role}: {short(fit.candidate)}"
        figure.add_scatter(
            x=widths,
            y=[fit.fitted[width] for width in widths],
            mode="lines+markers",  # of a single width there is no line
            line=line_of(place),
            marker=marker_of(place, 5),
            **legend_entry(label),
        )
    figure.update_yaxes(title="loss floor (nats per token)", rangemode="tozero")
    width_axis(figure, [f.width for f in floors])
    return figure


def curves_figure(run: Iterable[StudentCurve], floors: Sequence[ObservedFloor] | None = None) -> go.Figure:
    """Held-out KL of every student against the tokens it was trained on, one colour for each width.

    Each curve has its fit L∞ + a·t^−b and the asymptote L∞.

    Raises:
        CapacityError: where no student was evaluated after the start.
    """
    figure = new_figure()
    students_of_run = tuple(run)
    evaluated = [student for student in students_of_run if len(student.tokens) > 1]
    if not evaluated:
        raise CapacityError("no student was evaluated after its start: train longer")
    floor_of = {floor.name: floor for floor in (observed_floors(students_of_run) if floors is None else floors)}
    for place, ((control, width), alike) in enumerate(
        groupby(sorted(evaluated, key=lambda s: (*_width_of(s), s.seed)), key=_width_of)
    ):
        students = list(alike)
        colour, group = GREY if control else colour_of(place), f"width {width:,}{' (control)' if control else ''}"
        label = f"{group}, {len(students)} seeds" if len(students) > 1 else group
        for student in students:
            tokens, losses = student.curve()
            kept = decimated(len(tokens)) - 1
            figure.add_scatter(
                x=tokens[kept],
                y=losses[kept],
                mode="lines+markers",
                line={"color": colour, "dash": DASHES[place // len(COLOURS) % len(DASHES)], "width": 2},
                marker={**marker_of(place, 5), "color": colour},
                hovertemplate=f"{shown(student.name)}: %{{y:.4f}}<extra></extra>",
                legendgroup=group,
                showlegend=student is students[0],
                **legend_entry(label),
            )
            floor = floor_of.get(student.name)
            if floor is None or floor.low is None:
                continue
            share = np.geomspace(max(tokens[0] / tokens[-1], 0.1), 1, 40)
            dotted = {"color": colour, "width": 1, "dash": "dot"}
            fitted = power_law(share, floor.value, floor.a, floor.b)
            shared: dict[str, Any] = {"mode": "lines", "legendgroup": group, "showlegend": False}
            figure.add_scatter(
                x=share * tokens[-1], y=fitted, line=dotted, hovertemplate="fit %{y:.4f}<extra></extra>", **shared
            )
            asymptote = f"L∞ = {Estimate(floor.value, floor.low, floor.high).show('.4f')}<extra></extra>"
            figure.add_scatter(
                x=[tokens[0], tokens[-1]],
                y=[floor.value] * 2,
                line={**dotted, "dash": "dash"},
                opacity=0.7,
                hovertemplate=asymptote,
                **shared,
            )
    ticks = round_numbers(min(s.tokens[1] for s in evaluated), max(s.tokens[-1] for s in evaluated))
    figure.update_xaxes(type="log", title="predicted tokens trained on", tickvals=ticks, tickformat="~s")
    figure.update_yaxes(title="held-out KL (nats per token)", rangemode="tozero")
    return figure


def _what_was_observed(students: Sequence[ObservedFloor], which: str) -> str:
    """What the points of a figure show, in words."""
    if all(student.start == GIVEN for student in students):
        return "observed, as they came"
    return "observed, L∞ of the fit" if which == "fit" else "observed, mean of the last tenth"


def _drawn_fits(decomposition: Explained | None) -> list[tuple[Fit, str]]:
    """The fits that are drawn, each with its role. A fit with two roles is drawn once."""
    if decomposition is None:
        return []
    features, rival = decomposition.best
    roles = [(decomposition.chosen, "asked for")]
    if features is not None and features is not decomposition.chosen:
        roles.append((features, "best that knows features"))
    if rival is not None:
        roles.append((rival, "best rival"))
    return roles


def _width_of(student: StudentCurve) -> tuple[bool, int]:
    """What students of one colour share: their width, and whether they are controls."""
    return student.start == "teacher", student.width
