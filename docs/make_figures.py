"""Draws the training curve of the embedded teacher: `python docs/make_figures.py`.

Needs plotly's static export (`pip install kaleido`) and Chromium; nobody needs it to use or test the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go
from tl_capacity.hooks.embedded import FOLDER

from tl_capacity.show.figures import line_of, new_figure

FIGURES = Path(__file__).parent / "figures"


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
    figure = teacher_curve()
    figure.update_layout(
        legend={"orientation": "h", "y": -0.22, "yanchor": "top"},
        margin={"l": 70, "r": 20, "t": 40, "b": 40},
    )
    figure.write_image(FIGURES / "teacher_curve.png", width=800, height=420, scale=1.5)


if __name__ == "__main__":
    main()
