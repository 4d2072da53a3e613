"""What figures of probes and of recoverability share: a series of values against the student's width, in which several
seeds of one width are not joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tl_capacity.results.summary import Estimate


def add_series(
    figure: Any,
    widths: Sequence[int],
    estimates: Sequence[Estimate],
    name: str,
    line: Mapping[str, Any],
    marker: Mapping[str, Any],
    **where: Any,
) -> None:
    """Draw values with their intervals, and a line through the mean at each width; where seeds of a width differ, each
    is an open marker.

    Args:
        figure: a plotly figure.
        widths: [value] in any order.
        estimates: [value]
        line, marker: of the series, as plotly has them; the marker names its symbol.
        where: what else plotly is to know of the series, as its panel.
    """
    of_width: dict[int, list[Estimate]] = {}
    for width, estimate in sorted(dict.fromkeys(zip(widths, estimates, strict=True)), key=lambda pair: pair[0]):
        of_width.setdefault(width, []).append(estimate)
    means = [some[0] if len(some) == 1 else Estimate(fmean(e.value for e in some)) for some in of_width.values()]
    seeds = [(width, estimate) for width, some in of_width.items() if len(some) > 1 for estimate in some]
    known = {"name": name, "legendgroup": name, **where}
    values = {"x": list(of_width), "y": [mean.value for mean in means], "error_y": error_bars(means, marker["color"])}
    figure.add_scatter(**values, mode="lines+markers", line=line, marker=marker, **known)
    if seeds:
        values = {
            "x": [width for width, _ in seeds],
            "y": [e.value for _, e in seeds],
            "error_y": error_bars([e for _, e in seeds], marker["color"]),
        }
        figure.add_scatter(
            **values,
            mode="markers",
            marker={**marker, "symbol": f"{marker['symbol']}-open"},
            **{**known, "showlegend": False},
        )


def error_bars(estimates: Sequence[Estimate], colour: str) -> dict[str, Any]:
    """Asymmetric error bars, none where there is no interval."""
    up = [0.0 if e.high is None else max(0.0, e.high - e.value) for e in estimates]
    down = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in estimates]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }
