"""Figures: each function takes a result and returns a plotly figure, for a notebook and for the report alike.

Every axis names its unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from tl_capacity.distillation.decomposition import PAPER, Candidate, Decomposition, Fit
from tl_capacity.distillation.observed import ObservedFloor, observed_floors, power_law
from tl_capacity.distillation.run import DistillationRun, StudentCurve
from tl_capacity.errors import CapacityError
from tl_capacity.measurement.measurement import HookMeasurement, Measurement
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import FloorPrediction, kept_features
from tl_capacity.probing.figures import add_series, error_bars
from tl_capacity.results.summary import THRESHOLDS, Estimate, Resample
from tl_capacity.show.palette import COLOURS

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
MARKS = "●■◆▲✚✖★"
"""The symbols as text."""
GREY = "#8A8F98"
LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
POINTS = 240
"""Points of a curve that are drawn; evenly spaced on the logarithmic axis, no eye misses the others."""
LONGEST_NAME = 44
NEAREST_LABELS = 0.26
"""Decades between labels on a logarithmic axis; nearer ones would overlap on a phone."""


def importance_figure(
    measurement: Measurement,
    widths: Sequence[int] = (),
    importance: str = "second_moment",
    law: str = "compressed_sensing",
    hook: str | None = None,
) -> go.Figure:
    """Importance of the alive features, most important first, with 95% bands over documents; where each student width's
    budget ends is marked.

    Args:
        hook: the hook point whose budgets are drawn as lines; by default the middle one. Markers on the curves show
            those of all.

    Raises:
        CapacityError: where no hook point has an alive feature, or the importance was not measured.
    """
    chosen, figure = plugins().capacity_laws[law], _figure()
    lined = measurement[hook] if hook is not None else middle(measurement)
    for place, each in enumerate(measurement):
        values = np.sort(each.importance(importance))[::-1]
        if not len(values) or values[0] <= 0:
            continue
        ranks = decimated(len(values))
        _band(figure, ranks, _curve_interval(each, importance, ranks), values[values > 0][-1], place)
        figure.add_scatter(
            x=ranks, y=values[ranks - 1], mode="lines", line=_line(place), **_legend(name(measurement, each))
        )
        alpha = each.summary.alpha.value
        kept = {w: kept_features(values, alpha, w, chosen) for w in widths if 0 < alpha < 1}
        ends = {w: k for w, k in kept.items() if 0 < k < len(values)}
        figure.add_scatter(
            x=list(ends.values()),
            y=values[[k - 1 for k in ends.values()]],
            mode="markers",
            marker={"color": _colour(place), "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
            text=[f"a student of width {w:,} keeps {k:,}" for w, k in ends.items()],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
        if each is lined:
            for count in ends.values():
                figure.add_vline(x=count, line={"color": GREY, "width": 1, "dash": "dot"})
            for count in spaced(list(ends.values())):
                _above(figure, float(count), next(f"{width:,}" for width, kept_ in ends.items() if kept_ == count))
    if not figure.data:
        raise CapacityError("no hook point has an alive feature of any importance: count more tokens")
    figure.update_xaxes(type="log", title="rank of the feature by importance", exponentformat="power", dtick=1)
    _value_axis(figure, f"importance ({_unit(importance)} per token)")
    figure.update_layout(legend={"y": 1.09 if widths else 1.02})
    return figure


def floors_figure(floors: Sequence[FloorPrediction], errors: Mapping[str, float] | None = None) -> go.Figure:
    """Predicted floor against the student's width, with 95% intervals over documents; widths that lose nothing are left
    out.

    Args:
        errors: E‖x − x̂‖² of the SAE at each hook point, drawn as lines; only for floors in the same unit, activation²
            per token.

    Raises:
        CapacityError: where there is no floor to draw.
    """
    if not floors:
        raise CapacityError(
            "there are no predicted floors to draw: ask for widths, as in measurement.budget(widths=[128, 256])"
        )
    figure = _figure()
    for place, hook in enumerate(dict.fromkeys(f.hook for f in floors)):
        mine = [f for f in floors if f.hook == hook and f.predicted_floor.value > 0]
        figure.add_scatter(
            x=[f.width for f in mine],
            y=[f.predicted_floor.value for f in mine],
            error_y=error_bars([f.predicted_floor for f in mine], _colour(place)),
            customdata=[[f.features_kept.value, f.features_lost.value, 100 * f.share.value] for f in mine],
            hovertemplate=(
                "width %{x}: floor %{y:.4g}, %{customdata[2]:.3g}% of all importance<br>keeps %{customdata[0]:,}, loses"
                " %{customdata[1]:,}"
            ),
            mode="lines+markers",
            line=_line(place),
            marker=_marker(place),
            **_legend(hook),
        )
        if errors and hook in errors:
            figure.add_hline(y=errors[hook], line={"color": _colour(place), "width": 1, "dash": "dot"})
    if errors:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": GREY, "width": 1, "dash": "dot"},
            **_legend("the SAE's own error E‖x − x̂‖²"),
        )
    unit = f" ({floors[0].unit} per token)" if floors[0].unit else ""
    _value_axis(figure, f"predicted floor{unit}")
    _width_axis(figure, [f.width for f in floors])
    return figure


def firing_rate_figure(measurement: Measurement) -> go.Figure:
    """Firing rates of the latents that fired, on a logarithmic scale, with the thresholds at which F is counted and
    1/e, above which g(α) does not apply.
    """
    figure, alive = _figure(), measurement.hooks[0].summary.alive_threshold
    for place, each in enumerate(measurement):
        edges, counts, never = each.summary.firing_rate_histogram()
        figure.add_scatter(
            x=np.concatenate([edges, edges[-1:]]),
            y=np.concatenate([[0], counts, [0]]),
            mode="lines",
            line={**_line(place), "shape": "vh"},
            hovertemplate="up to rate %{x:.2g}: %{y:,} latents",
            **_legend(f"{name(measurement, each)} ({never:,} never fired)"),
        )
    for threshold in sorted({t for t in THRESHOLDS if t > 0} | {alive}):
        chosen = threshold == alive
        figure.add_vline(
            x=threshold, line={"color": GREY, "width": 2 if chosen else 1, "dash": "solid" if chosen else "dot"}
        )
        _above(figure, float(threshold), "alive" if chosen else power_of_ten(threshold))
    figure.add_vline(x=np.exp(-1), line={"color": GREY, "width": 1, "dash": "dashdot"})
    _above(figure, float(np.exp(-1)), "1/e")
    figure.update_xaxes(type="log", title="firing rate (share of counted tokens)", exponentformat="power", dtick=1)
    figure.update_yaxes(title="latents per quarter of a decade", rangemode="tozero")
    figure.update_layout(legend={"y": 1.09})
    return figure


def suite_figure(measurement: Measurement) -> go.Figure:
    """Critical width against L0, one point for each SAE, and the line d* = L0 · ln(F/L0) at the median F on which they
    would lie if only L0 differed.

    Raises:
        CapacityError: where no SAE has a sparsity.
    """
    figure = _figure()
    sparse = [h for h in measurement if 0 < h.summary.alpha.value < 1]
    if not sparse:
        raise CapacityError("no SAE has enough alive features for a sparsity: count more tokens")
    for place, hook in enumerate(dict.fromkeys(h.hook for h in sparse)):
        mine = sorted((h for h in sparse if h.hook == hook), key=lambda h: h.summary.l0.value)
        stars, l0s = [h.summary.critical_width for h in mine], [h.summary.l0 for h in mine]
        figure.add_scatter(
            x=[e.value for e in l0s],
            y=[e.value for e in stars],
            error_x=error_bars(l0s, _colour(place)),
            error_y=error_bars(stars, _colour(place)),
            text=[shown(h.sae) for h in mine],
            hovertemplate="%{text}<br>L0 %{x:.2f}, d* %{y:.1f}",
            mode="markers",
            marker=_marker(place, 9),
            **_legend(hook),
        )
    n_alive = float(np.median([h.summary.n_alive.value for h in sparse]))
    low, high = (f([h.summary.l0.value for h in sparse]) for f in (min, max))
    l0 = np.geomspace(low / 2, min(high * 2, n_alive), 60)
    theory = {"color": GREY, "dash": "dot", "width": 1.5}
    figure.add_scatter(
        x=l0,
        y=l0 * np.log(n_alive / l0),
        mode="lines",
        line=theory,
        hoverinfo="skip",
        **_legend(f"L0 · ln(F/L0) at F = {n_alive:,.0f}"),
    )
    for width in sorted({h.width for h in sparse}):
        label = {"text": f"width of the hook point {width:,}", "font": {"size": 10}}
        figure.add_hline(y=width, line={"color": GREY, "width": 1}, annotation=label, annotation_position="top left")
    figure.update_xaxes(title="L0 (active features per token)", rangemode="tozero")
    figure.update_yaxes(title="critical width d* (dimensions)", rangemode="tozero")
    return figure


def observed_figure(
    floors: Sequence[ObservedFloor], found: Decomposition | None = None, which: str = "fit"
) -> go.Figure:
    """Observed floors against width, with their 95% intervals; of a decomposition also the prediction asked for and the
    best candidates.

    Args:
        which: "fit" for L∞ or "last_tenth"; a decomposition has its own.

    Raises:
        CapacityError: where there is no student but the control.
    """
    students = sorted((f for f in floors if f.start != "teacher"), key=lambda f: f.width)
    if not students:
        raise CapacityError("the distillation has no students but the control: distil some widths")
    figure, which = _figure(), found.which if found is not None else which
    values = [
        (
            Estimate(f.value, f.low, f.high)
            if which == "fit"
            else Estimate(f.last_tenth, f.last_tenth_low, f.last_tenth_high)
        )
        for f in students
    ]
    figure.add_scatter(
        x=[f.width for f in students],
        y=[v.value for v in values],
        error_y=error_bars(values, COLOURS[0]),
        text=[shown(f.name) for f in students],
        hovertemplate="%{text}: %{y:.4f} nats per token",
        mode="markers",
        marker=_marker(0, 9),
        cliponaxis=False,  # a floor of zero lies on the axis
        **_legend("observed, L∞ of the fit" if which == "fit" else "observed, mean of the last tenth"),
    )
    controls = [f for f in floors if f.start == "teacher"]
    if controls:
        marker = {"color": GREY, "symbol": "circle-open", "size": 9}
        of = [f.last_tenth for f in controls]
        figure.add_scatter(
            x=[f.width for f in controls],
            y=of,
            mode="markers",
            marker=marker,
            **_legend("control from the teacher's weights"),
        )
    for place, (fit, role) in enumerate(_drawn_fits(found), 1):
        widths = sorted(fit.fitted)
        label = f"{role}: {short_candidate(fit.candidate)}"
        known = {"line": _line(place), "marker": _marker(place, 5), **_legend(label)}
        figure.add_scatter(
            x=widths, y=[fit.fitted[w] for w in widths], mode="lines+markers", **known
        )  # of a single width there is no line
    figure.update_yaxes(title="loss floor (nats per token)", rangemode="tozero")
    _width_axis(figure, [f.width for f in floors])
    return figure


def curves_figure(run: DistillationRun, floors: Sequence[ObservedFloor] | None = None) -> go.Figure:
    """Held-out KL of every student against the tokens it was trained on, a colour for each width, with the fit L∞ +
    a·t^−b and its asymptote L∞.

    Raises:
        CapacityError: where no student was evaluated after the start.
    """
    figure = _figure()
    evaluated = [student for student in run if len(student.tokens) > 1]
    if not evaluated:
        raise CapacityError("no student was evaluated after its start: train longer")
    known = {f.name: f for f in (observed_floors(run) if floors is None else floors)}
    for place, ((control, width), alike) in enumerate(
        groupby(sorted(evaluated, key=lambda s: (*_width_of(s), s.seed)), key=_width_of)
    ):
        students = list(alike)
        colour, group = GREY if control else _colour(place), f"width {width:,}{' (control)' if control else ''}"
        label = f"{group}, {len(students)} seeds" if len(students) > 1 else group
        for student in students:
            tokens, losses = student.curve()
            kept = decimated(len(tokens)) - 1
            figure.add_scatter(
                x=tokens[kept],
                y=losses[kept],
                mode="lines+markers",
                line={"color": colour, "dash": DASHES[place // len(COLOURS) % len(DASHES)], "width": 2},
                marker={**_marker(place, 5), "color": colour},
                hovertemplate=f"{shown(student.name)}: %{{y:.4f}}<extra></extra>",
                legendgroup=group,
                showlegend=student is students[0],
                **_legend(label),
            )
            floor = known.get(student.name)
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
    ticks = _round_numbers(min(s.tokens[1] for s in evaluated), max(s.tokens[-1] for s in evaluated))
    figure.update_xaxes(type="log", title="predicted tokens trained on", tickvals=ticks, tickformat="~s")
    figure.update_yaxes(title="held-out KL (nats per token)", rangemode="tozero")
    return figure


def series_figure(rows: Sequence[Mapping[str, Any]], y_title: str, order: Sequence[str] = ()) -> go.Figure:
    """Lines against the student's width, from flat rows `{"series", "width", "value", "low", "high", "baseline"}`;
    baselines are dotted, and where seeds of a width differ, each is an open marker and the line goes through their
    mean.

    Args:
        order: of the series, where several figures share it, so that each series looks the same in all.

    Raises:
        CapacityError: where there is no row with a number.
    """
    drawn = [r for r in rows if r["value"] is not None and np.isfinite(r["value"])]
    if not drawn:
        raise CapacityError("there is no number to draw")
    figure = _figure()
    for place, series in enumerate(order or dict.fromkeys(r["series"] for r in drawn)):
        mine = [r for r in drawn if r["series"] == series]
        if not mine:
            continue
        estimates = [Estimate(r["value"], r.get("low"), r.get("high")) for r in mine]
        line = {**_line(place), "dash": "dot" if mine[0].get("baseline") else "solid"}
        add_series(figure, [int(r["width"]) for r in mine], estimates, shown(series), line, _marker(place))
    figure.update_yaxes(title=y_title, rangemode="tozero")
    _width_axis(figure, [int(r["width"]) for r in drawn])
    return figure


def thresholds_figure(
    kept: Mapping[str, Mapping[float, float]], limits: Mapping[str, Mapping[float, float]], taus: Sequence[float]
) -> go.Figure:
    """How many features are kept at each τ, a line for each student, and grey those that they are compared with; τ that
    were asked for are marked.
    """
    figure = _figure()
    for place, (label, counts) in enumerate(kept.items()):
        figure.add_scatter(x=list(counts), y=list(counts.values()), mode="lines", line=_line(place), **_legend(label))
    for dash, (label, counts) in zip(("dash", "dot"), limits.items(), strict=False):
        figure.add_scatter(
            x=list(counts),
            y=list(counts.values()),
            mode="lines",
            line={"color": GREY, "dash": dash, "width": 2},
            **_legend(label),
        )
    for tau in taus:
        annotation = {"text": f"τ = {tau:g}", "font": {"size": 10}}
        figure.add_vline(
            x=tau, line={"color": GREY, "width": 2}, annotation=annotation, annotation_position="bottom left"
        )
    figure.update_xaxes(title="τ (least AUROC of a kept feature)")
    figure.update_yaxes(title="features kept", rangemode="tozero")
    return figure


def legend(series: Sequence[str]) -> list[tuple[str, str, str]]:
    """Colour, symbol and name of each series in its order, for a legend that several figures share."""
    return [(_colour(place), MARKS[place % len(MARKS)], name) for place, name in enumerate(series)]


def middle(measurement: Measurement) -> HookMeasurement:
    """The hook point in the middle of those measured, from which predictions are made where none is asked for."""
    return measurement.hooks[len(measurement.hooks) // 2]


def short_candidate(candidate: Candidate) -> str:
    """A candidate's name with its hook point's short one, and without the law where it is the theorem's own."""
    layer = LAYER.fullmatch(candidate.hook)
    short = f"layer {layer[1]}" if layer is not None else candidate.hook
    return candidate.name.replace(f", {PAPER}", "").replace(f" at {candidate.hook}", f" at {short}")


def power_of_ten(value: float) -> str:
    """A power of ten as it is printed, 10⁻⁵; other numbers as they are."""
    exponent = round(np.log10(value)) if value > 0 else 0
    if value <= 0 or not np.isclose(value, 10.0**exponent) or exponent in (0, 1):
        return f"{value:g}"
    return "10" + f"{exponent}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short_hook(measurement: Measurement, hook: str) -> str:
    """`layer N` where all hook points are the same but for their layer, else the hook point's name."""
    found = [LAYER.fullmatch(h.hook) for h in measurement]
    kinds = {match[2] if match is not None else None for match in found}
    layer = LAYER.fullmatch(hook)
    return f"layer {layer[1]}" if layer is not None and kinds == {layer[2]} else hook


def name(measurement: Measurement, hook: HookMeasurement) -> str:
    """The hook point's short name; where several SAEs were measured there with the SAE's, or that alone where it names
    the hook point.
    """
    short = short_hook(measurement, hook.hook)
    if sum(h.hook == hook.hook for h in measurement) == 1:
        return short
    return hook.sae if hook.hook in hook.sae else f"{short} · {hook.sae}"


def decimated(n: int, points: int = POINTS) -> NDArray[np.int64]:
    """At most `points` of the ranks 1 … n, evenly spaced on a logarithmic scale, both ends among them."""
    return np.unique(np.geomspace(1, n, points).round().astype(np.int64)) if n > points else np.arange(1, n + 1)


def spaced(values: Sequence[int], decades: float = NEAREST_LABELS) -> list[int]:
    """Of ascending values those that are at least so far from the one before, the first among them."""
    found: list[int] = []
    for value in values:
        if not found or np.log10(value / found[-1]) >= decades:
            found.append(value)
    return found


def shortened(text: str, longest: int = LONGEST_NAME) -> str:
    """`text` with its middle left out where it is longer than `longest`; beginning and end tell hook points and paths
    apart.
    """
    if len(text) <= longest:
        return text
    end = longest // 2
    return f"{text[: longest - end - 1]}…{text[-end:]}"


def shown(text: str) -> str:
    """`text` as plotly, which reads some HTML in names, shows it literally."""
    return escape(shortened(text))


def _drawn_fits(found: Decomposition | None) -> list[tuple[Fit, str]]:
    """The fits worth a line, each with its role; a fit that has two is drawn once."""
    if found is None:
        return []
    roles = [(found.chosen, "asked for")]
    if found.winner is not None and found.winner is not found.chosen:
        roles.append((found.winner, "best"))
    rival = next(f for f in found.fits if f.candidate.kind == "rival")
    if rival is not found.winner:
        roles.append((rival, "best rival"))
    return roles


def _curve_interval(hook: HookMeasurement, importance: str, ranks: NDArray[np.int64]) -> list[Estimate]:
    """The sorted importances at some ranks, with intervals."""
    estimator, s = hook.estimator(importance), hook.summary

    def at_ranks(sums: Resample) -> list[float]:
        values = np.sort(sums.importance(estimator.compute, importance)[sums.rates > s.alive_threshold])[::-1]
        return list(np.concatenate([values, np.full(max(0, ranks[-1] - len(values)), np.nan)])[ranks - 1])

    return s.estimates(at_ranks)


def _band(figure: go.Figure, x: NDArray[np.int64], estimates: Sequence[Estimate], smallest: float, place: int) -> None:
    """A shaded interval; what reaches zero or below ends at the smallest value, as a logarithmic axis has no zero."""
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
        fillcolor=_faint(_colour(place)),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        mode="lines",
    )


def _width_of(student: StudentCurve) -> tuple[bool, int]:
    """What students of one colour share: whether they are the control, and their width."""
    return student.start == "teacher", student.width


def _width_axis(figure: go.Figure, widths: Sequence[int]) -> None:
    labelled = spaced(
        sorted(set(widths)), NEAREST_LABELS / 3
    )  # the axis spans about a decade, where the others span several
    figure.update_xaxes(
        type="log", title="student width d_S (dimensions)", tickvals=labelled, ticktext=[f"{w:,}" for w in labelled]
    )


def _round_numbers(low: int, high: int) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers, or only the powers where those are many."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [float(power * step) for power in powers for step in steps if low <= power * step <= high]


def _value_axis(figure: go.Figure, title: str) -> None:
    """A logarithmic y axis with one tick a decade, or every other one where there are many; a linear one within half a
    decade, where labels would overlap.
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
            type="log", title=title, exponentformat="power", dtick=None if spanned < 2 else 1 + int(spanned // 7)
        )


def _unit(importance: str) -> str:
    return str(plugins().importance_estimators[importance].unit)


def _above(figure: go.Figure, x: float, text: str) -> None:
    """A small label above the plot, at a place on its logarithmic axis."""
    figure.add_annotation(
        x=np.log10(x), y=1, yref="paper", yanchor="bottom", text=text, showarrow=False, font={"size": 10}
    )


def _legend(label: str) -> dict[str, Any]:
    return {"name": shown(label)}


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _line(place: int) -> dict[str, Any]:
    return {"color": _colour(place), "dash": DASHES[place % len(DASHES)], "width": 2}


def _marker(place: int, size: int = 7) -> dict[str, Any]:
    return {"color": _colour(place), "symbol": SYMBOLS[place % len(SYMBOLS)], "size": size}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _figure() -> go.Figure:
    figure = go.Figure()
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
