"""Draws the figures of the README and the docs from what is measured: `python docs/make_figures.py runs/demo`.

Needs plotly's static export (`pip install kaleido`) and Chromium; nobody needs it to use or test the package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from tl_capacity.hooks.embedded import FOLDER

from tl_capacity import Measurement
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.palette import COLOURS

FIGURES = Path(__file__).parent / "figures"
DASHES = ("solid", "dash", "dot")
WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128)


def margin(estimate: Estimate) -> tuple[float, float]:
    """How far an interval reaches below its estimate, and above."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.value - estimate.low, estimate.high - estimate.value


def floors(measurement: Measurement) -> go.Figure:
    """Left: importance curves with each width's budget; right: the predicted floor against the student's width, with
    intervals.
    """
    figure = make_subplots(
        cols=2,
        subplot_titles=("Importance of the alive features", "Predicted floor of a narrower student"),
        horizontal_spacing=0.11,
    )
    for hook, colour, dash in zip(measurement, COLOURS, DASHES, strict=False):
        name = (
            f"layer {hook.hook.split('.')[1]}: F = {hook.summary.n_alive.value:,.0f}, d* ="
            f" {hook.summary.critical_width.show('.0f')}"
        )
        line = {"color": colour, "dash": dash, "width": 2}
        curve = np.sort(hook.importance("decoder_weighted"))[::-1]
        figure.add_scatter(
            x=np.arange(1, len(curve) + 1), y=curve, mode="lines", line=line, name=name, legendgroup=name, col=1, row=1
        )
        predictions = measurement.budget(WIDTHS, importance="decoder_weighted").floors
        mine = [p for p in predictions if p.hook == hook.hook and p.features_lost.value > 0]
        margins, total = [margin(p.predicted_floor) for p in mine], curve.sum()
        figure.add_scatter(
            x=[p.width for p in mine],
            y=[p.share.value for p in mine],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [above / total for _, above in margins],
                "arrayminus": [below / total for below, _ in margins],
            },
            mode="lines+markers",
            line=line,
            legendgroup=name,
            showlegend=False,
            name=name,
            col=2,
            row=1,
        )
    figure.update_xaxes(type="log", title="feature, most important first", row=1, col=1)
    figure.update_yaxes(
        type="log", title="E[z²]·‖w_dec‖² (activation² per token)", exponentformat="power", row=1, col=1
    )
    figure.update_xaxes(type="log", title="student width d_S", tickvals=WIDTHS, row=1, col=2)
    figure.update_yaxes(
        title="share of all importance that is lost", tickformat=".0%", rangemode="tozero", row=1, col=2
    )
    return figure


def teacher_curve() -> go.Figure:
    """Held-out loss of the embedded teacher against the tokens it was trained on."""
    record = json.loads((FOLDER / "training.json").read_text())["record"]
    figure = go.Figure()
    for key, name, colour, dash in (
        ("heldout_loss", "held-out", COLOURS[0], "solid"),
        ("train_loss", "training, smoothed", COLOURS[1], "dot"),
    ):
        figure.add_scatter(
            x=[r["tokens"] for r in record],
            y=[r[key] for r in record],
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
        )
    figure.update_xaxes(title="tokens")
    figure.update_yaxes(title="cross-entropy (nats per token)")
    return figure


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, figure, size in (
        ("embedded_floors", floors(Measurement.load(sys.argv[1])), (1100, 460)),
        ("teacher_curve", teacher_curve(), (800, 420)),
    ):
        figure.update_layout(
            template="plotly_white",
            font={"size": 13},
            legend={"orientation": "h", "y": -0.22},
            margin={"l": 70, "r": 20, "t": 40, "b": 40},
        )
        figure.write_image(FIGURES / f"{name}.png", width=size[0], height=size[1], scale=1.5)


if __name__ == "__main__":
    main()
