"""Draws docs/results/worth.webp, the features that students are worth by each dictionary: `python
docs/make_worth_picture.py runs`.

From what the commands of docs/results/splice.md have written, in headless Chromium; needs chromium, chromedriver and
selenium.
"""

from __future__ import annotations

import sys
from pathlib import Path

import plotly.graph_objects as go
from pictures import take
from write_results import RESULTS
from write_splice import curves, observed

from tl_capacity.distillation.effective import effective_widths
from tl_capacity.plugins import plugins
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.figures import add_series, line_of, marker_of, new_figure

SIZE = (1000, 520)
LATENTS = 2_048
"""Dictionaries of this size are drawn. Those of another size have another g(α) at the same d*."""


def worth(runs: Path) -> go.Figure:
    """Features per dimension against d*, a line for each width of students, and g(α) dotted."""
    by_width = {width: tuple(map(Estimate, floors)) for width, floors in sorted(observed([]).items())}
    law, figure = plugins().capacity_laws.default, new_figure()
    measured = [
        (hook, effective_widths(hook, curve, by_width, law))
        for hook, curve, _ in curves(runs)
        if hook.summary.d_sae == LATENTS
    ]
    measured.sort(key=lambda pair: pair[0].summary.critical_width.value)
    stars = [hook.summary.critical_width.value for hook, _ in measured]
    for place, width in enumerate(by_width):
        rows = [(star, row) for star, (_, found) in zip(stars, measured, strict=True) for row in found]
        drawn = [(round(star), r.per_dimension) for star, r in rows if r.width == width and r.per_dimension is not None]
        name = f"students of width {width}"
        add_series(figure, [x for x, _ in drawn], [y for _, y in drawn], name, line_of(place), marker_of(place))
    theory = [hook.summary.capacity.value for hook, _ in measured]
    dotted = {"color": "#444444", "dash": "dot", "width": 2}
    figure.add_scatter(x=stars, y=theory, mode="lines", line=dotted, name="g(α), the theorem's")
    figure.add_vline(x=measured[0][0].teacher_width, line={"color": "#444444", "width": 1.5})
    figure.update_xaxes(title="critical width d* of the dictionary (dimensions); the line is the teacher's width")
    figure.update_yaxes(title="features per dimension", rangemode="tozero")
    return figure


def main() -> None:
    """Draw the figure and save its picture."""
    take(worth(Path(sys.argv[1])), RESULTS / "worth.webp", SIZE)


if __name__ == "__main__":
    main()
