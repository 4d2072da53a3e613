"""The figure of a price list: nats that students pay against the chosen features that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_capacity.placement.price import Price
from tl_capacity.results.estimate import Estimate
from tl_capacity.runtime.units import NATS
from tl_capacity.show.figures import GREY, error_bars, legend_entry, line_of, marker_of, new_figure


def price_figure(prices: Sequence[Price], n_chosen: int, teacher: Estimate) -> Any:
    """A plotly figure of nats paid against chosen features kept, one line for each width.

    A line runs through the weights, from the students trained without chosen features. A vertical line shows how many
    the teacher itself keeps.

    Args:
        n_chosen: chosen features that could be judged.
        teacher: how many of them readouts of the teacher itself find.
    """
    figure = new_figure()
    for place, width in enumerate(sorted({price.width for price in prices})):
        mine = sorted((price for price in prices if price.width == width), key=lambda price: price.weight)
        paid = [price.paid or Estimate(0.0) for price in mine]
        marker = marker_of(place, 8)
        figure.add_scatter(
            x=[price.chosen.value for price in mine],
            y=[each.value for each in paid],
            error_x=error_bars([price.chosen for price in mine], marker["color"]),
            error_y=error_bars(paid, marker["color"]),
            text=[f"weight {price.weight:g}" for price in mine],
            mode="lines+markers",
            line=line_of(place),
            marker=marker,
            **legend_entry(f"width {width:,}"),
        )
    figure.add_vline(
        x=teacher.value,
        line={"color": GREY, "dash": "dot", "width": 2},
        annotation={"text": "teacher", "font": {"size": 10}},
        annotation_position="bottom left",
    )
    figure.update_xaxes(title=f"chosen features kept, of {n_chosen:,}", rangemode="tozero")
    figure.update_yaxes(title=f"paid ({NATS})")
    return figure
