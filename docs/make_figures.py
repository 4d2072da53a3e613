"""Draws the figures of the README and the docs from a measurement: `python docs/make_figures.py runs/demo`.

Needs plotly's static export (`pip install kaleido`) and Chromium; nobody needs it to use or test the package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from tl_capacity.hooks.embedded import FOLDER

from tl_capacity import Measurement
from tl_capacity.show.figures import colour_of, error_bars, line_of, new_figure, new_panels

FIGURES = Path(__file__).parent / "figures"
IMPORTANCE = "decoder_weighted"
WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128)


def floors(measurement: Measurement) -> go.Figure:
    """Left: importance curves with each width's budget. Right: the predicted floor against the student's width, with
    intervals.
    """
    titles = ("Importance of the alive features", "Predicted floor of a narrower student")
    figure = new_panels(titles, columns=2, horizontal_spacing=0.11)
    predictions = measurement.budget(WIDTHS, importance=IMPORTANCE).floors
    for place, hook in enumerate(measurement):
        name = (
            f"layer {hook.hook.split('.')[1]}: F = {hook.summary.n_alive.value:,.0f}, d* ="
            f" {hook.summary.critical_width.show('.0f')}"
        )
        named = {"line": line_of(place), "name": name, "legendgroup": name, "row": 1}
        curve = np.sort(hook.importance(IMPORTANCE))[::-1]
        figure.add_scatter(x=np.arange(1, len(curve) + 1), y=curve, mode="lines", col=1, **named)
        above_zero = [p for p in predictions if p.hook == hook.hook and p.features_lost.value > 0]
        shares = [p.share for p in above_zero]
        figure.add_scatter(
            x=[p.width for p in above_zero],
            y=[share.value for share in shares],
            error_y=error_bars(shares, colour_of(place)),
            mode="lines+markers",
            showlegend=False,
            col=2,
            **named,
        )
    figure.update_xaxes(type="log", dtick=1, title="feature, most important first", col=1)
    figure.update_yaxes(
        type="log", dtick=1, title="E[z²]·‖w_dec‖² (activation² per token)", exponentformat="power", col=1
    )
    figure.update_xaxes(type="log", title="student width d_S", tickvals=WIDTHS, col=2)
    figure.update_yaxes(title="share of all importance that is lost", tickformat=".0%", rangemode="tozero", col=2)
    return figure


def teacher_curve() -> go.Figure:
    """Held-out loss of the embedded teacher against the number of training tokens."""
    record = json.loads((FOLDER / "training.json").read_text())["record"]
    figure = new_figure()
    for place, (key, name) in enumerate((("heldout_loss", "held-out"), ("train_loss", "training, smoothed"))):
        figure.add_scatter(
            x=[r["tokens"] for r in record],
            y=[r[key] for r in record],
            name=name,
            mode="lines+markers",
            line=line_of(place),
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
            legend={"orientation": "h", "y": -0.22, "yanchor": "top"},
            margin={"l": 70, "r": 20, "t": 40, "b": 40},
        )
        figure.write_image(FIGURES / f"{name}.png", width=size[0], height=size[1], scale=1.5)


if __name__ == "__main__":
    main()
