"""Draws the README's figures from the published results: `python docs/make_readme_figures.py`.

It reads docs/results/embedded_floor.md and .json, rivals.json and splice.json; needs chromium, chromedriver and
selenium.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
from pictures import take
from write_results import RESULTS, printed_floors

from tl_capacity.results.estimate import Estimate
from tl_capacity.show.figures import add_series, line_of, marker_of, new_figure, series_figure

FIGURES = Path(__file__).parent / "figures"
SIZE = (900, 460)
TEACHER, HOOK = "embedded", "blocks.3.hook_resid_post"
TEACHER_WIDTH = 128


def published(name: str) -> list[dict[str, Any]]:
    """The records of one published result."""
    records: list[dict[str, Any]] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return records


def scaled(prediction: Sequence[float], floors: Sequence[float]) -> list[float]:
    """A prediction times the constant that fits it to the floors best, by least squares."""
    constant = np.dot(prediction, floors) / np.dot(prediction, prediction)
    return [float(constant * value) for value in prediction]


def floors() -> go.Figure:
    """What students reached, and predictions with at most one fitted constant, with features and without."""
    students = printed_floors()
    widths = sorted({student.width for student in students})
    reached = [fmean(student.last_tenth for student in students if student.width == width) for width in widths]
    importance = {row["width"]: row["predicted_floor"] for row in published("embedded_floor.json")}
    series = {
        "students reached": reached,
        "features: lost importance, one constant": scaled([importance[width] for width in widths], reached),
        "rival: 1/d, one constant": scaled([1 / width for width in widths], reached),
    }
    rows: list[dict[str, Any]] = [
        {"series": name, "width": width, "value": value, "baseline": name != "students reached"}
        for name, values in series.items()
        for width, value in zip(widths, values, strict=True)
    ]
    rows += [
        {
            "series": "rival: principal components, nothing fitted",
            "width": row["width"],
            "value": row["value"],
            "baseline": True,
        }
        for row in published("rivals.json")
        if row["predictor"] == "pca_splice" and row["hook"] == HOOK and row["width"] in widths
    ]
    return series_figure(rows, "nats per token")


def critical_widths() -> go.Figure:
    """d* against L0 over the dictionaries of one hook point, a line for each size. Interpolated ones have no k."""
    rows = [row for row in published("splice.json") if (row["teacher"], row["hook"]) == (TEACHER, HOOK) and row["k"]]
    points = {(row["d_sae"], row["l0"]): row["d_star"] for row in rows}
    figure = new_figure()
    for place, size in enumerate(sorted({size for size, _ in points})):
        own = sorted((l0, star) for (d_sae, l0), star in points.items() if d_sae == size)
        name = f"{size:,} latents: d* from {own[0][1]:.0f} to {own[-1][1]:.0f}"
        add_series(
            figure,
            [round(l0) for l0, _ in own],
            [Estimate(star) for _, star in own],
            name,
            line_of(place),
            marker_of(place),
        )
    figure.add_hline(y=TEACHER_WIDTH, line={"color": "#444444", "width": 1.5})
    figure.update_xaxes(title="L0 of the dictionary (active features per token)", rangemode="tozero")
    figure.update_yaxes(title="critical width d* (dimensions); the line is d_T", rangemode="tozero")
    return figure


def main() -> None:
    take(floors(), FIGURES / "floors.webp", SIZE)
    take(critical_widths(), FIGURES / "critical_widths.webp", SIZE)


if __name__ == "__main__":
    main()
