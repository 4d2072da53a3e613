"""The drawing kit of every figure: lines, bands, markers and axes that look the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.palette import COLOURS
from tl_capacity.show.tables import shortened

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
MARKS = "●■◆▲✚✖★"
"""The symbols as text."""
GREY = "#8A8F98"
POINTS = 240
"""Points drawn of a curve. They are evenly spaced on the logarithmic axis, so that nobody misses the others."""
LONGEST_NAME = 44
NEAREST_LABELS = 0.26
"""Decades between labels on a logarithmic axis. Nearer ones would overlap on a phone."""


def series_figure(rows: Sequence[Mapping[str, Any]], y_title: str, order: Sequence[str] = ()) -> go.Figure:
    """Lines against the student's width, from flat rows `{"series", "width", "value", "low", "high", "baseline"}`.
    Baselines are dotted. Where the seeds of a width differ, each is an open marker, and the line goes through their
    mean.

    Args:
        order: of the series, where several figures share it, so that each series looks the same in all.

    Raises:
        CapacityError: where there is no row with a number.
    """
    drawn = [r for r in rows if r["value"] is not None and np.isfinite(r["value"])]
    if not drawn:
        raise CapacityError("there is nothing to draw")
    figure = new_figure()
    for place, series in enumerate(order or dict.fromkeys(r["series"] for r in drawn)):
        mine = [r for r in drawn if r["series"] == series]
        if not mine:
            continue
        estimates = [Estimate(r["value"], r.get("low"), r.get("high")) for r in mine]
        line = {**line_of(place), "dash": "dot" if mine[0].get("baseline") else "solid"}
        add_series(figure, [int(r["width"]) for r in mine], estimates, shown(series), line, marker_of(place))
    figure.update_yaxes(title=y_title, rangemode="tozero")
    width_axis(figure, [int(r["width"]) for r in drawn])
    return figure


def legend(series: Sequence[str]) -> list[tuple[str, str, str]]:
    """Colour, symbol and name of each series in order, for a legend that several figures share."""
    return [(colour_of(place), MARKS[place % len(MARKS)], name) for place, name in enumerate(series)]


def power_of_ten(value: float) -> str:
    """A power of ten in print, such as 10⁻⁵; other numbers unchanged."""
    exponent = round(np.log10(value)) if value > 0 else 0
    if value <= 0 or not np.isclose(value, 10.0**exponent) or exponent in (0, 1):
        return f"{value:g}"
    return "10" + f"{exponent}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def decimated(n: int, points: int = POINTS) -> NDArray[np.int64]:
    """At most `points` of the ranks 1 … n, evenly spaced on a logarithmic scale, with both ends."""
    return np.unique(np.geomspace(1, n, points).round().astype(np.int64)) if n > points else np.arange(1, n + 1)


def spaced(values: Sequence[int], decades: float = NEAREST_LABELS) -> list[int]:
    """The first of some ascending values, and then each that is far enough from the last one taken."""
    apart: list[int] = []
    for value in values:
        if not apart or np.log10(value / apart[-1]) >= decades:
            apart.append(value)
    return apart


def shown(text: str) -> str:
    """`text` so that plotly, which reads some HTML in names, shows it literally."""
    return escape(shortened(text, LONGEST_NAME))


def band(figure: go.Figure, x: NDArray[np.int64], estimates: Sequence[Estimate], smallest: float, place: int) -> None:
    """A shaded interval. A part at or below zero ends at the smallest value, because a logarithmic axis has no zero."""
    sure = [
        (float(at), max(e.low, smallest), max(e.high, smallest))
        for at, e in zip(x, estimates, strict=True)
        if e.low is not None and e.high is not None
    ]
    if not sure:
        return
    xs, lows, highs = (np.array(values) for values in zip(*sure, strict=True))
    figure.add_scatter(
        x=np.concatenate([xs, xs[::-1]]),
        y=np.concatenate([highs, lows[::-1]]),
        fill="toself",
        fillcolor=faint(colour_of(place)),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        mode="lines",
    )


def width_axis(figure: go.Figure, widths: Sequence[int]) -> None:
    labelled = spaced(
        sorted(set(widths)), NEAREST_LABELS / 3
    )  # the axis spans about a decade, where the others span several
    figure.update_xaxes(
        type="log", title="student width d_S (dimensions)", tickvals=labelled, ticktext=[f"{w:,}" for w in labelled]
    )


def round_numbers(low: int, high: int) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers, or only the powers if those are many."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [float(power * step) for power in powers for step in steps if low <= power * step <= high]


def value_axis(figure: go.Figure, title: str) -> None:
    """A logarithmic y axis with one tick for each decade, or for every other one if there are many. Below two decades
    2 and 5 are labelled too. Within half a decade it is linear, because labels would overlap.
    """
    values = np.concatenate(
        [np.asarray(trace.y, dtype=np.float64) for trace in figure.data if trace.y is not None and len(trace.y)]
        or [np.ones(1)]
    )
    positive = values[np.isfinite(values) & (values > 0)]
    spanned = np.ptp(np.log10(positive)) if len(positive) else 0.0
    if spanned < 0.5:
        figure.update_yaxes(title=title, rangemode="tozero")
    else:
        figure.update_yaxes(
            type="log", title=title, exponentformat="power", dtick="D2" if spanned < 2 else 1 + int(spanned // 7)
        )


def label_above(figure: go.Figure, x: float, text: str) -> None:
    """A small label above the plot, at a position on its logarithmic axis."""
    figure.add_annotation(
        x=np.log10(x), y=1, yref="paper", yanchor="bottom", text=text, showarrow=False, font={"size": 10}
    )


def distinct_labels(names: Sequence[tuple[str, ...]]) -> list[str]:
    """A label for each series: the parts of its name that differ from the others, or else the first part."""
    differ = [len(set(column)) > 1 for column in zip(*names, strict=True)]
    told = differ if any(differ) else [True]
    return [", ".join(part for part, shown in zip(name, told, strict=False) if shown) for name in names]


def legend_entry(label: str) -> dict[str, Any]:
    return {"name": shown(label)}


def colour_of(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def line_of(place: int) -> dict[str, Any]:
    return {"color": colour_of(place), "dash": DASHES[place % len(DASHES)], "width": 2}


def marker_of(place: int, size: int = 7) -> dict[str, Any]:
    return {"color": colour_of(place), "symbol": SYMBOLS[place % len(SYMBOLS)], "size": size}


def faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def new_figure() -> go.Figure:
    """An empty plot in the style of all figures."""
    return _styled(go.Figure())


def new_panels(titles: Sequence[str], columns: int, **options: Any) -> go.Figure:
    """Empty plots in the style of all figures, each below its title, row after row.

    Args:
        options: what else plotly's `make_subplots` is to know, as the spacing.
    """
    from plotly.subplots import make_subplots

    return _styled(make_subplots(rows=len(titles) // columns, cols=columns, subplot_titles=titles, **options))


def _styled(figure: go.Figure) -> go.Figure:
    figure.update_layout(
        template="simple_white",
        font={"size": 13},
        margin={"l": 64, "r": 16, "t": 24, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(showgrid=True, gridcolor="rgba(138,143,152,0.2)")
    figure.update_yaxes(showgrid=True, gridcolor="rgba(138,143,152,0.2)", automargin=True)
    return figure


def add_series(
    figure: Any,
    widths: Sequence[int],
    estimates: Sequence[Estimate],
    name: str,
    line: Mapping[str, Any],
    marker: Mapping[str, Any],
    **where: Any,
) -> None:
    """Draw values with their intervals, and a line through the mean at each width. Where the seeds of a width differ,
    each is an open marker.

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
    """Asymmetric error bars; none without an interval."""
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
