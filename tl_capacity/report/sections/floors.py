"""The section on floors: the predicted ones, beside those observed on distilled students."""

from __future__ import annotations

import shlex
from dataclasses import replace

import plotly.graph_objects as go

from tl_capacity.errors import CapacityError
from tl_capacity.predict.floors import FloorPrediction
from tl_capacity.report import figures
from tl_capacity.report.parts import Cell, PageTable, Section, estimate_cell, number_cell, sentence, share_cell
from tl_capacity.report.sections.students import candidate_tables, observed_table, short
from tl_capacity.report.story import Story
from tl_capacity.runtime.units import per_token


def floors(story: Story, empty: Section) -> Section:
    """Predicted floors, then observed floors and what explains them.

    Raises:
        CapacityError: where no floor can be predicted.
    """
    caption = (
        f"Predicted floor L*(d_S), the importance ({story.importance.name}) of what a student of that width cannot"
        " keep, with 95% intervals."
    )
    text = (
        "A student of width d_S keeps the F_S = min(⌊d_S · ĝ(α)⌋, F) most important features and loses the importance"
        f" of the rest. The unit is {per_token(story.unit)}"
    )
    text += (
        "."
        if story.unit.startswith("nats")
        else ", so a predicted floor can be compared with a loss in nats only through a fitted factor C."
    )
    predicted = replace(
        empty, text=[text], figures=[("predicted-floors", _predicted_figure(story), caption)], tables=_tables(story)
    )
    return _not_distilled(story, predicted) if story.results.run is None else _with_observed(story, predicted)


def _predicted_figure(story: Story) -> go.Figure:
    labelled = [
        replace(floor, hook=story.name(story.measurement.hooks[place]))
        for place, floors in story.floors.items()
        for floor in floors
    ]
    if not labelled:
        raise CapacityError("no hook point has enough alive features for a prediction: count more tokens")
    compared = story.importance.compares_with_reconstruction_error
    hooks = [h for h in story.measurement if compared and h.linear is not False]
    errors = {story.name(h): h.summary.reconstruction_error for h in hooks}
    return figures.floors_figure(labelled, {name: error.value for name, error in errors.items() if error is not None})


def _not_distilled(story: Story, predicted: Section) -> Section:
    """The section without observed floors, with the command that distils students."""
    widths = ",".join(map(str, story.widths))
    teacher = shlex.quote(story.measurement.provenance.model)
    return replace(
        predicted,
        missing="No student was distilled, so nothing was observed that could contradict the prediction.",
        command=(
            f"tl-capacity run distill --teacher {teacher} --widths {widths} --tokens 1000000 --repeat --out"
            f" {story.students}\ntl-capacity report {story.folder} {story.students}"
        ),
    )


def _with_observed(story: Story, section: Section) -> Section:
    """The section with observed floors, and what explains them if that is known."""
    if story.observed:
        figure = figures.observed_figure(story.observed, story.decomposition, story.settings.observed)
        observed = story.results.run is not None and story.results.run.observed
        caption = (
            "Losses of the students as they came, in nats per token, with 95% intervals over documents."
            if observed
            else "Observed floors of the distilled students, in nats per token, with 95% intervals of the fit."
        )
        if story.decomposition is not None:
            caption += " Lines are fitted to these losses, as in the table below: they are no forecasts."
        section = replace(
            section,
            figures=[*section.figures, ("observed-floors", figure, caption)],
            tables=[*section.tables, observed_table(story)],
        )
    decomposition = story.decomposition
    if decomposition is None:
        reason = f"Predicted and observed floors could not be compared: {story.undecomposed}"
        return replace(section, missing=sentence(reason))
    answers = dict.fromkeys(decomposition.verdicts().values())
    return replace(
        section,
        text=[*section.text, *(sentence(short(story, answer)) for answer in answers)],
        tables=[*section.tables, *candidate_tables(story, decomposition)],
    )


def _tables(story: Story) -> list[PageTable]:
    """The floors at the verdict's hook point, and, folded, the floors at all of them."""
    header = [
        "width d_S",
        "kept F_S",
        "lost",
        "share kept",
        f"predicted floor, {per_token(story.unit)}",
        "share of all importance",
        "naive floor",
    ]
    title = f"importance {story.importance.name}, law {story.law.name}"
    main = story.main_place
    tables = []
    if main in story.floors:
        rows = [_row(floor) for floor in story.floors[main]]
        tables.append(PageTable(f"Predicted floors at {story.name(story.main)}: {title}", header, rows))
    if set(story.floors) - {main}:
        rows = [
            [Cell(story.name(story.measurement.hooks[place]), order=place), *_row(floor)]
            for place, floors in story.floors.items()
            for floor in floors
        ]
        whole = f"Predicted floors at all {len(story.floors)} hook points: {title}"
        tables.append(PageTable(whole, ["hook point", *header], rows, folded=True))
    return tables


def _row(floor: FloorPrediction) -> list[Cell]:
    return [
        number_cell(floor.width),
        estimate_cell(floor.features_kept, ",.0f"),
        estimate_cell(floor.features_lost, ",.0f"),
        share_cell(floor.kept_share),
        estimate_cell(floor.predicted_floor),
        share_cell(floor.share),
        estimate_cell(floor.naive_floor),
    ]
