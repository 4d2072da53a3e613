"""The sections on splicing: floors in nats without any fit, and the features that distilled students are worth."""

from __future__ import annotations

import shlex
from dataclasses import replace

from tl_capacity.distillation.effective import EffectiveWidth
from tl_capacity.predict.spliced_floor import SplicedFloor
from tl_capacity.report import figures
from tl_capacity.report.parts import Cell, PageTable, Section, estimate_cell, number_cell, sentence, text_cell
from tl_capacity.report.story import Story
from tl_capacity.results.naming import short_hook
from tl_capacity.runtime.units import NATS

SENTENCES = 3
"""This many curves get a sentence; the table has all of them."""


def spliced(story: Story, empty: Section) -> Section:
    """KL of the spliced teacher against the number of features that stay, with the floor of each width."""
    curves = story.results.spliced
    if curves is None:
        missing = "The teacher was not spliced, so nothing here predicts a loss in nats before students are trained."
        return replace(empty, missing=story.results.splice_note or missing, command=_splice_command(story))
    text = [
        "The teacher itself runs, but only its most important features pass the hook point: as many as each width may"
        " keep. The floor is what its predictions lose, KL(teacher ‖ spliced teacher). Nothing is fitted to a"
        " student. With every feature kept, the dictionary's own error remains, so no floor here is lower."
    ]
    caption = (
        f"Lines: KL in {NATS} against the number of features that stay, with 95% intervals over documents; dotted, with"
        f" every feature. Large markers: what students of the widths keep by {story.law.name}."
    )
    figure = figures.spliced_figure(list(curves), story.spliced_floors)
    tables = [_floor_table(story)] if story.spliced_floors else []
    return replace(empty, text=text, figures=[("spliced", figure, caption)], tables=tables)


def effective(story: Story, empty: Section) -> Section:
    """Features per dimension that students of each width are worth, beside the capacity function.

    Raises:
        CapacityError: where students of no width are worth a number of features.
    """
    found = story.effective
    if found is None:
        spliced_too = story.results.spliced is None
        missing = "How many features a student is worth for each of its dimensions is not known"
        missing += " without a splice of the teacher." if spliced_too else " without distilled students."
        return replace(
            empty, missing=missing, command=_splice_command(story) if spliced_too else _distil_command(story)
        )
    verdicts = found.verdict()
    caption = (
        "Features that the spliced teacher must keep for the KL that students reached (mean of the last tenth of"
        f" training), divided by d_S, with 95% intervals; dotted, what {found.law} says."
    )
    return replace(
        empty,
        text=[sentence(said) for said in (verdicts if len(verdicts) <= SENTENCES else [])],
        figures=[("effective", found.plot(), caption)],
        tables=[
            PageTable(
                "Features that students are worth",
                ["hook point", "order", "width d_S", f"observed, {NATS}", "features", "per dimension", found.law],
                [_worth_row(story, row) for row in found.rows],
                folded=len(found.rows) > 12,
            )
        ],
    )


def _floor_table(story: Story) -> PageTable:
    header = ["hook point", "order", "width d_S", "kept F_S", f"floor, {NATS}"]
    rows = [_floor_row(story, floor) for floor in story.spliced_floors]
    title = f"Floors of the spliced teacher, law {story.law.name}"
    return PageTable(title, header, rows, folded=len(rows) > 12)


def _place(story: Story, place: SplicedFloor | EffectiveWidth) -> Cell:
    """A hook point, with its SAE below it if several were measured there."""
    several = sum(hook.hook == place.hook for hook in story.measurement) > 1
    return text_cell(short_hook(story.measurement, place.hook), place.sae if several else "")


def _floor_row(story: Story, floor: SplicedFloor) -> list[Cell]:
    return [
        _place(story, floor),
        text_cell(floor.order),
        number_cell(floor.width),
        number_cell(floor.features_kept),
        estimate_cell(floor.floor),
    ]


def _worth_row(story: Story, row: EffectiveWidth) -> list[Cell]:
    return [
        _place(story, row),
        text_cell(row.order),
        number_cell(row.width),
        estimate_cell(row.observed),
        Cell("not reached", order=float("inf")) if row.features is None else estimate_cell(row.features, ",.0f"),
        Cell("", order=float("inf")) if row.per_dimension is None else estimate_cell(row.per_dimension, ".3g"),
        estimate_cell(row.expected, ".3g"),
    ]


def _splice_command(story: Story) -> str:
    widths = ",".join(map(str, story.widths))
    return (
        f"tl-capacity run splice {story.folder} --widths {widths} --out runs/splice\ntl-capacity report"
        f" {story.folder} --splice runs/splice"
    )


def _distil_command(story: Story) -> str:
    widths, teacher = ",".join(map(str, story.widths)), shlex.quote(story.measurement.provenance.model)
    return (
        f"tl-capacity run distill --teacher {teacher} --widths {widths} --tokens 1000000 --repeat --out"
        f" {story.students}\ntl-capacity report {story.folder} {story.students}"
    )
