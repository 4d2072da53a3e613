"""Figures of predictions: floors against the student's width, and d* over the SAEs of one hook point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from tl_capacity.errors import CapacityError
from tl_capacity.predict.floors import FloorPrediction
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.predict.spliced_floor import SplicedFloor
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.units import per_token
from tl_capacity.show.figures import (
    GREY,
    colour_of,
    distinct_labels,
    error_bars,
    legend_entry,
    line_of,
    marker_of,
    new_figure,
    shown,
    value_axis,
    width_axis,
)


def floors_figure(floors: Sequence[FloorPrediction], errors: Mapping[str, float] | None = None) -> go.Figure:
    """Predicted floor against the student's width, with 95% intervals over documents.

    Widths that lose nothing are left out.

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
    figure = new_figure()
    for place, hook in enumerate(dict.fromkeys(f.hook for f in floors)):
        mine = [f for f in floors if f.hook == hook and f.predicted_floor.value > 0]
        figure.add_scatter(
            x=[f.width for f in mine],
            y=[f.predicted_floor.value for f in mine],
            error_y=error_bars([f.predicted_floor for f in mine], colour_of(place)),
            customdata=[[f.features_kept.value, f.features_lost.value, 100 * f.share.value] for f in mine],
            text=[format(f.predicted_floor.value, significant(f.predicted_floor.value)) for f in mine],
            hovertemplate=(
                "width %{x:,}: floor %{text}, %{customdata[2]:.3g}% of all importance<br>keeps %{customdata[0]:,},"
                " loses %{customdata[1]:,}"
            ),
            mode="lines+markers",
            line=line_of(place),
            marker=marker_of(place),
            **legend_entry(hook),
        )
        if errors and hook in errors:
            figure.add_hline(y=errors[hook], line={"color": colour_of(place), "width": 1, "dash": "dot"})
    if errors:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": GREY, "width": 1, "dash": "dot"},
            **legend_entry("the SAE's own error E‖x − x̂‖²"),
        )
    units = " or ".join(dict.fromkeys(floor.unit for floor in floors if floor.unit))
    unit = f" ({per_token(units)})" if units else ""
    value_axis(figure, f"predicted floor{unit}")
    width_axis(figure, [f.width for f in floors])
    return figure


def costs_figure(widths: Sequence[int], floors: Sequence[Estimate], unit: str, chosen: int) -> go.Figure:
    """Predicted floor of each student width that a plan looked at, with 95% intervals over documents.

    The planned width is marked.
    """
    figure = new_figure()
    drawn = [(width, floor) for width, floor in zip(widths, floors, strict=True) if floor.value > 0]
    figure.add_scatter(
        x=[width for width, _ in drawn],
        y=[floor.value for _, floor in drawn],
        error_y=error_bars([floor for _, floor in drawn], colour_of(0)),
        mode="lines+markers",
        line=line_of(0),
        marker=marker_of(0),
        **legend_entry("predicted floor"),
    )
    figure.add_vline(
        x=chosen, line={"color": GREY, "width": 1, "dash": "dot"}, annotation={"text": f"width {chosen:,}"}
    )
    value_axis(figure, f"predicted floor{f' ({per_token(unit)})' if unit else ''}")
    width_axis(figure, list(widths))
    return figure


def suite_figure(hooks: Iterable[HookMeasurement]) -> go.Figure:
    """Critical width against L0, one point for each SAE.

    The line d* = L0 · ln(F/L0) at the median F is where they would lie if only L0 differed.

    Raises:
        CapacityError: where no SAE has a sparsity.
    """
    figure = new_figure()
    sparse = [h for h in hooks if 0 < h.summary.alpha.value < 1]
    if not sparse:
        raise CapacityError("no SAE has enough alive features for a sparsity: count more tokens")
    for place, hook in enumerate(dict.fromkeys(h.hook for h in sparse)):
        mine = sorted((h for h in sparse if h.hook == hook), key=lambda h: h.summary.l0.value)
        stars, l0s = [h.summary.critical_width for h in mine], [h.summary.l0 for h in mine]
        figure.add_scatter(
            x=[e.value for e in l0s],
            y=[e.value for e in stars],
            error_x=error_bars(l0s, colour_of(place)),
            error_y=error_bars(stars, colour_of(place)),
            text=[shown(h.sae) for h in mine],
            hovertemplate="%{text}<br>L0 %{x:.2f}, d* %{y:,.1f}",
            mode="markers",
            marker=marker_of(place, 9),
            **legend_entry(hook),
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
        **legend_entry(f"L0 · ln(F/L0) at F = {n_alive:,.0f}"),
    )
    for width in sorted({h.width for h in sparse}):
        label = {"text": f"width of the hook point {width:,}", "font": {"size": 10}}
        figure.add_hline(y=width, line={"color": GREY, "width": 1}, annotation=label, annotation_position="top left")
    figure.update_xaxes(title="L0 (active features per token)", rangemode="tozero")
    figure.update_yaxes(title="critical width d* (dimensions)", rangemode="tozero")
    return figure


def spliced_figure(curves: Sequence[SplicedCurve], floors: Sequence[SplicedFloor] = ()) -> go.Figure:
    """KL of the spliced teacher against the number of features that stay, one line for each curve.

    Intervals are 95% over documents. A dotted line shows the KL with every latent.

    Args:
        floors: of student widths, each marked on its curve.

    Raises:
        CapacityError: where there is no curve.
    """
    if not curves:
        raise CapacityError("there is no curve to draw: splice a hook point")
    figure = new_figure()
    labels = distinct_labels([(curve.hook, curve.sae, curve.order) for curve in curves])
    for place, (curve, name) in enumerate(zip(curves, labels, strict=True)):
        estimates = [curve.at(kept) for kept in curve.kept]
        figure.add_scatter(
            x=list(curve.kept),
            y=[estimate.value for estimate in estimates],
            error_y=error_bars(estimates, colour_of(place)),
            hovertemplate="%{x:,} features kept: %{y:.3g} nats per token",
            mode="lines+markers",
            line=line_of(place),
            marker=marker_of(place),
            **legend_entry(name),
        )
        figure.add_hline(y=estimates[-1].value, line={"color": colour_of(place), "width": 1, "dash": "dot"})
        mine = [f for f in floors if (f.hook, f.sae, f.order) == (curve.hook, curve.sae, curve.order)]
        if mine:
            figure.add_scatter(
                x=[floor.features_kept for floor in mine],
                y=[floor.floor.value for floor in mine],
                text=[f"{floor.width:,}" for floor in mine],
                hovertemplate="width %{text} keeps %{x:,}: %{y:.3g} nats per token",
                mode="markers",
                marker={**marker_of(place, 12), "symbol": f"{marker_of(place)['symbol']}-open"},
                showlegend=False,
                **legend_entry(f"widths at {name}"),
            )
    figure.update_xaxes(title="features kept")
    value_axis(figure, "KL, nats per token")
    return figure
