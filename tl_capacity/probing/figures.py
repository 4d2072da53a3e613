"""What figures of probes and of recoverability share: a series of values against the student's width, in which several
seeds of one width are not joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from tl_capacity.show.figures import GREY, legend_entry, line_of, new_figure


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
