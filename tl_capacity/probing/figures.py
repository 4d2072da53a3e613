"""Figures of probes and of recoverability against the student's width; several seeds of one width are not joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tl_capacity.probing.recovery import COUNTS, Recovery
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.figures import GREY, add_series, legend_entry, line_of, new_figure
from tl_capacity.show.palette import BLUE, GREEN, PURPLE, VERMILION

SHOWN = (
    ("student", BLUE, "circle"),
    ("student with random weights", VERMILION, "square"),
    ("teacher's principal components, as many as d", GREEN, "diamond"),
    ("teacher", PURPLE, "cross"),
)


def thresholds_figure(
    kept: Mapping[str, Mapping[float, float]], limits: Mapping[str, Mapping[float, float]], taus: Sequence[float]
) -> go.Figure:
    """How many features are kept at each τ, a line for each student, and grey those that they are compared with; τ that
    were asked for are marked.
    """
    figure = new_figure()
    for place, (label, counts) in enumerate(kept.items()):
        figure.add_scatter(
            x=list(counts), y=list(counts.values()), mode="lines", line=line_of(place), **legend_entry(label)
        )
    for dash, (label, counts) in zip(("dash", "dot"), limits.items(), strict=False):
        figure.add_scatter(
            x=list(counts),
            y=list(counts.values()),
            mode="lines",
            line={"color": GREY, "dash": dash, "width": 2},
            **legend_entry(label),
        )
    for tau in taus:
        annotation = {"text": f"τ = {tau:g}", "font": {"size": 10}}
        figure.add_vline(
            x=tau, line={"color": GREY, "width": 2}, annotation=annotation, annotation_position="bottom left"
        )
    figure.update_xaxes(title="τ (least AUROC of a kept feature)")
    figure.update_yaxes(title="features kept", rangemode="tozero")
    return figure


def recovery_figure(recoveries: Sequence[Recovery]) -> Any:
    """A plotly figure, a panel per hook point: features kept against the student's width, beside the budget and the
    baselines.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        cols=len(recoveries), subplot_titles=[r.hook for r in recoveries], shared_yaxes=True, horizontal_spacing=0.04
    )
    for column, recovery in enumerate(recoveries, start=1):
        at = {"row": 1, "col": column, "showlegend": column == 1}
        rows = recovery.to_json()
        widths = [row["width"] for row in rows]
        for (readout, key), (name, colour, symbol) in zip(COUNTS.items(), SHOWN, strict=True):
            with_it = [row for row in rows if row[key] is not None]
            kept = [Estimate(float(row[key]), *(row["intervals"][readout] or (None, None))) for row in with_it]
            add_series(
                figure,
                [row["width"] for row in with_it],
                kept,
                name,
                {"color": colour},
                {"color": colour, "symbol": symbol, "size": 8},
                **at,
            )
        for key, name, dash in (("budget", "d·g(α), at most F", "dash"), ("equilibrium", "equilibrium law", "dot")):
            limits = [Estimate(float(min(row[key], row["n_features"]))) for row in rows]
            # With a single width there is no line, only the marker.
            add_series(
                figure,
                widths,
                limits,
                name,
                {"color": "black", "dash": dash},
                {"color": "black", "symbol": "line-ew-open", "size": 9},
                **at,
            )
    figure.update_xaxes(title="student width d_S (dimensions)")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=f"features with AUROC ≥ τ = {recoveries[0].tau:g}", col=1)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.2})
    return figure
