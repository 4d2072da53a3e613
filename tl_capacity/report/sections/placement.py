"""The section on placement: what students pay for keeping chosen features."""

from __future__ import annotations

from dataclasses import replace

from tl_capacity.placement.price import Price
from tl_capacity.placement.result import Placement
from tl_capacity.report.parts import Cell, PageTable, Section, estimate_cell, number_cell, share_cell
from tl_capacity.report.story import Story
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.runtime.units import NATS


def placement(story: Story, empty: Section) -> Section:
    """The price list, and a figure of nats against features kept.

    Raises:
        CapacityError: where the price list cannot be read.
    """
    if story.results.placement is None:
        return replace(
            empty,
            missing=(
                "No features were chosen, so it is not known what it costs to keep other features than the most"
                " important ones."
            ),
            command=(
                f"tl-capacity run placement {story.folder} --keep FEATURES.json --out runs/placement\ntl-capacity"
                f" report {story.folder} {story.students} runs/placement"
            ),
        )
    prices = Placement.from_json(story.results.placement)
    whose = f"that carry the concept {prices.concept!r}" if prices.concept else "that were named"
    text = [
        f"{len(prices.features):,} features {whose} at {prices.hook}, of which {prices.n_chosen:,} fire often enough"
        f" in the held-out text to be judged, beside {prices.n_others:,} others. At each weight above 0, students were"
        " trained so that a linear readout tells the chosen features. Text and seeds are the same at all weights."
        " Kept means the same as in the section on recoverability.",
        *prices.notes(),
    ]
    caption = (
        f"Nats paid against chosen features kept, a line for each width from weight {_least(prices):g} on; error bars"
        " are 95% intervals over documents. Dotted: the teacher itself."
    )
    figure = ("placement", prices.plot(), caption)
    return replace(empty, text=text, figures=[figure], tables=[_table(prices)])


def _least(prices: Placement) -> float:
    """The smallest weight."""
    return min(price.weight for price in prices)


def _table(prices: Placement) -> PageTable:
    """One row for each width and weight, and one for the teacher."""
    probed = any(price.probe is not None for price in prices)
    header = [
        "width d_S",
        "weight",
        "chosen kept",
        "others kept",
        f"KL ({NATS})",
        "paid",
        "per feature",
        *(["probe accuracy"] if probed else []),
        "budget",
    ]
    rows = [[*_cells(prices, price), *([_probe(price.probe)] if probed else []), _budget(price)] for price in prices]
    ceiling = [
        share_cell(prices.share(prices.teacher[name], of))
        for name, of in (("chosen", prices.n_chosen), ("others", prices.n_others))
        if name in prices.teacher and of
    ]
    if len(ceiling) == 2:
        probe = [_probe(prices.teacher.get("probe"))] if probed else []
        rows.append([Cell("teacher"), Cell(""), *ceiling, Cell("0", order=0.0), Cell(""), Cell(""), *probe, Cell("")])
    return PageTable("The price list", header, rows)


def _cells(prices: Placement, price: Price) -> list[Cell]:
    return [
        number_cell(price.width),
        Cell(f"{price.weight:g}", order=price.weight),
        _share(prices, price.chosen, prices.n_chosen),
        _share(prices, price.others, prices.n_others),
        estimate_cell(price.kl),
        Cell("") if price.paid is None else estimate_cell(price.paid, ".4f"),
        Cell("")
        if price.per_feature is None
        else estimate_cell(price.per_feature, significant(price.per_feature.value, 2)),
    ]


def _share(prices: Placement, count: Estimate, of: int) -> Cell:
    """A count of kept features as a share; empty without features."""
    return share_cell(prices.share(count, of)) if of else Cell("none judged")


def _probe(accuracy: Estimate | None) -> Cell:
    return Cell("") if accuracy is None else share_cell(accuracy)


def _budget(price: Price) -> Cell:
    return Cell(f"{price.budget:,.0f}", order=price.budget)
