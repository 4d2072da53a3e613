"""The section that compares two measurements: of other layers, dictionaries or models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go

from tl_capacity.measurement.measurement import Measurement
from tl_capacity.report.parts import (
    Cell,
    PageTable,
    Section,
    column_cell,
    estimate_cell,
    number_cell,
    share_cell,
    text_cell,
)
from tl_capacity.report.story import Story
from tl_capacity.results.columns import ALIVE, CRITICAL_WIDTH, FVU, HETEROGENEOUS_CRITICAL_WIDTH, L0
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import LAYER, middle, short_hook
from tl_capacity.show.figures import add_series, line_of, marker_of, new_figure, shown

MORE_TOKENS = 1.1
"""If the tokens of two measurements differ by at least this factor, the page says that F grows with them."""


def beside(story: Story, empty: Section) -> Section:
    """Every hook point of each measurement, and the share of its width that is needed."""
    if not story.results.beside:
        return replace(
            empty,
            missing="One measurement is shown; a second one stands beside it, of other layers, dictionaries or models.",
            command=f"tl-capacity report {story.folder} OTHER_MEASUREMENT",
        )
    called = measurements(story)
    text = [*_differences(called)]
    if len({hook.width for measurement in called.values() for hook in measurement}) > 1:
        text.append("Hook points have different widths, so d* is compared as a share of them.")
    figure = _figure(called)
    caption = (
        "Critical width d* as a share of the hook point's dimensions, with 95% intervals over documents. It is a"
        " property of the model and the dictionary together."
    )
    return replace(
        empty,
        text=text,
        figures=[("beside", figure, caption)] if figure is not None else [],
        tables=[_table(called)],
    )


def measurements(story: Story) -> Mapping[str, Measurement]:
    """The measurements by what tells them apart: models, or else folders. The page's own comes first."""
    every = {story.results.folder: story.measurement, **story.results.beside}
    models = [measurement.provenance.model for measurement in every.values()]
    if len(set(models)) == len(models):
        return dict(zip(models, every.values(), strict=True))
    return every


def told(story: Story) -> list[str]:
    """A sentence on each further measurement, for the verdict."""
    others = list(measurements(story).items())[1:]
    return [
        f"Beside it, {name} needs d* = {CRITICAL_WIDTH.brief(hook)} of {hook.width:,} dimensions at {hook.hook}, for"
        f" F = {ALIVE.brief(hook)} features."
        for name, measurement in others
        for hook in [_counterpart(story.main, measurement)]
        if _sparse(hook)
    ]


def _counterpart(main: HookMeasurement, measurement: Measurement) -> HookMeasurement:
    """The same hook point of another measurement, or else its middle one."""
    return next((hook for hook in measurement if hook.hook == main.hook), middle(measurement))


def _differences(called: Mapping[str, Measurement]) -> Iterator[str]:
    """Sentences on how the texts of the measurements differ."""
    tokens = {name: measurement.hooks[0].summary.n_tokens for name, measurement in called.items()}
    sources = {name: measurement.provenance.source for name, measurement in called.items()}
    read = "; ".join(f"{name}: {tokens[name]:,} tokens of {sources[name]}" for name in called)
    yield f"What was read: {read}."
    if max(tokens.values()) > MORE_TOKENS * min(tokens.values()):
        yield "F grows with the number of tokens, so compare it at equal numbers."
    if len(set(sources.values())) > 1:
        yield "The texts differ, and so may the features that they show."


def _figure(called: Mapping[str, Measurement]) -> go.Figure | None:
    """d* as a share of the width against the layer; None if hook points belong to no layer."""
    figure = new_figure()
    layers: set[int] = set()
    for place, (name, measurement) in enumerate(called.items()):
        points = [
            (int(layer[1]), share_of_width(hook))
            for hook in measurement
            if (layer := LAYER.fullmatch(hook.hook)) is not None and _sparse(hook)
        ]
        if points:
            at, shares = zip(*points, strict=True)
            layers |= set(at)
            add_series(figure, at, shares, shown(name), line_of(place), marker_of(place))
    if not layers:
        return None
    figure.update_xaxes(title="layer", tickvals=sorted(layers))
    figure.update_yaxes(title="d* / d", rangemode="tozero", tickformat=".0%")
    return figure


def _sparse(hook: HookMeasurement) -> bool:
    """Whether a critical width is defined."""
    return 0 < hook.summary.alpha.value < 1


def share_of_width(hook: HookMeasurement) -> Estimate:
    """d* as a share of the hook point's dimensions."""
    width = hook.summary.critical_width
    ends = (None if end is None else end / hook.width for end in (width.low, width.high))
    return Estimate(width.value / hook.width, *ends)


def _table(called: Mapping[str, Measurement]) -> PageTable:
    columns = (ALIVE, L0, CRITICAL_WIDTH, HETEROGENEOUS_CRITICAL_WIDTH, FVU)
    header = ["hook point", "measurement", "d", *(column.heading for column in columns), "d* / d"]
    everything = [hook for measurement in called.values() for hook in measurement]
    rows: list[list[Cell]] = [
        [
            text_cell(short_hook(everything, hook.hook), Path(hook.sae).name),
            text_cell(name, measurement.provenance.model if name != measurement.provenance.model else ""),
            number_cell(hook.width),
            *(column_cell(column, hook) for column in columns),
            share_cell(share_of_width(hook))
            if 0 < hook.summary.alpha.value < 1
            else estimate_cell(Estimate(float("nan"))),
        ]
        for at in dict.fromkeys(hook.hook for hook in everything)
        for name, measurement in called.items()
        for hook in measurement
        if hook.hook == at
    ]
    return PageTable(f"{len(called)} measurements, hook point by hook point", header, rows)
