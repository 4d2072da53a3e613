"""Figures of a measurement: sorted importances and firing rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import hook_label, hook_named, middle
from tl_capacity.results.summary import THRESHOLDS, Resample
from tl_capacity.runtime.units import per_token
from tl_capacity.show.figures import (
    GREY,
    SYMBOLS,
    band,
    colour_of,
    decimated,
    label_above,
    legend_entry,
    line_of,
    new_figure,
    power_of_ten,
    spaced,
    value_axis,
)


def importance_figure(
    measurement: Iterable[HookMeasurement],
    widths: Sequence[int] = (),
    importance: str | None = None,
    law: str | None = None,
    hook: str | None = None,
) -> go.Figure:
    """Importance of the alive features, most important first, with 95% bands over documents. The end of each student
    width's budget is marked.

    Args:
        hook: the hook point whose budgets are drawn as lines; by default the middle one. Markers on the curves show
            those of all.

    Raises:
        CapacityError: where no hook point has an alive feature, or the importance was not measured.
    """
    chosen, figure = plugins().capacity_laws.named(law), new_figure()
    hooks = tuple(measurement)
    lined = hook_named(hooks, hook) if hook is not None else middle(hooks)
    for place, each in enumerate(hooks):
        values = np.sort(each.importance(importance))[::-1]
        if not len(values) or values[0] <= 0:
            continue
        ranks = decimated(len(values))
        band(figure, ranks, _curve_interval(each, importance, ranks), values[values > 0][-1], place)
        figure.add_scatter(
            x=ranks,
            y=values[ranks - 1],
            mode="lines",
            line=line_of(place),
            **legend_entry(hook_label(hooks, each)),
        )
        at = context_at(each, values, each.summary.alpha.value)
        kept = {w: kept_features(chosen, w, at) for w in widths if 0 < at.alpha < 1}
        ends = {w: k for w, k in kept.items() if 0 < k < len(values)}
        figure.add_scatter(
            x=list(ends.values()),
            y=values[[k - 1 for k in ends.values()]],
            mode="markers",
            marker={"color": colour_of(place), "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
            text=[f"a student of width {w:,} keeps {k:,}" for w, k in ends.items()],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
        if each is lined:
            for count in ends.values():
                figure.add_vline(x=count, line={"color": GREY, "width": 1, "dash": "dot"})
            for count in spaced(list(ends.values())):
                label_above(figure, float(count), next(f"{width:,}" for width, kept_ in ends.items() if kept_ == count))
    if not figure.data:
        raise CapacityError("no hook point has an alive feature with an importance above 0: count more tokens")
    figure.update_xaxes(type="log", title="rank of the feature by importance", exponentformat="power", dtick=1)
    value_axis(figure, f"importance ({per_token(lined.unit(importance))})")
    figure.update_layout(legend={"y": 1.09 if widths else 1.02})
    return figure


def firing_rate_figure(measurement: Iterable[HookMeasurement]) -> go.Figure:
    """Firing rates of the latents that fired, on a logarithmic scale. The thresholds at which F is counted are marked,
    and 1/e, above which g(α) does not apply.
    """
    hooks = tuple(measurement)
    figure, alive = new_figure(), hooks[0].summary.alive_threshold
    for place, each in enumerate(hooks):
        edges, counts, never = each.summary.firing_rate_histogram()
        figure.add_scatter(
            x=np.concatenate([edges, edges[-1:]]),
            y=np.concatenate([[0], counts, [0]]),
            mode="lines",
            line={**line_of(place), "shape": "vh"},
            hovertemplate="up to rate %{x:.2g}: %{y:,} latents",
            **legend_entry(f"{hook_label(hooks, each)} ({never:,} never fired)"),
        )
    for threshold in sorted({t for t in THRESHOLDS if t > 0} | {alive}):
        chosen = threshold == alive
        figure.add_vline(
            x=threshold, line={"color": GREY, "width": 2 if chosen else 1, "dash": "solid" if chosen else "dot"}
        )
        label_above(figure, float(threshold), "alive" if chosen else power_of_ten(threshold))
    figure.add_vline(x=np.exp(-1), line={"color": GREY, "width": 1, "dash": "dashdot"})
    label_above(figure, float(np.exp(-1)), "1/e")
    figure.update_xaxes(type="log", title="firing rate (share of counted tokens)", exponentformat="power", dtick=1)
    figure.update_yaxes(title="latents per quarter of a decade", rangemode="tozero")
    figure.update_layout(legend={"y": 1.09})
    return figure


def _curve_interval(hook: HookMeasurement, importance: str | None, ranks: NDArray[np.int64]) -> list[Estimate]:
    """The intervals of the sorted importances at some ranks."""
    estimator, s = hook.estimator(importance), hook.summary

    def at_ranks(sums: Resample) -> list[float]:
        values = np.sort(sums.importance(estimator.compute, estimator.name)[sums.rates > s.alive_threshold])[::-1]
        return list(np.concatenate([values, np.full(max(0, ranks[-1] - len(values)), np.nan)])[ranks - 1])

    return s.estimates(at_ranks)
