"""The top of the page: the verdict in sentences, large figures, and what a reader must know."""

from __future__ import annotations

import re

from tl_capacity.predict.caveats import error_warnings
from tl_capacity.predict.floors import FloorPrediction
from tl_capacity.predict.record import records
from tl_capacity.predict.spliced_floor import SplicedFloor, kept_whole
from tl_capacity.report.parts import Cell, column_cell, estimate_cell, percent, sentence
from tl_capacity.report.sections.answers import choice, seen, shown_student
from tl_capacity.report.sections.answers import tiles as answer_tiles
from tl_capacity.report.sections.beside import told
from tl_capacity.report.sections.students import short
from tl_capacity.report.story import Story
from tl_capacity.results.columns import ALIVE, CRITICAL_WIDTH, FVU, L0
from tl_capacity.results.estimate import significant
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.units import NATS, per_token
from tl_capacity.show.tables import said_once


def verdict(story: Story) -> list[str]:
    """The first sentences of the page: what the main hook point holds, and what a student of half its width loses."""
    hook, s, p = story.main, story.main.summary, story.measurement.provenance
    if not 0 < s.alpha.value < 1:
        alive = int(s.n_alive.value)
        return [
            f"{_hook_as_subject(story, hook)} of {p.model} has {alive:,} alive features at L0 ="
            f" {L0.brief(hook)}, for which no sparsity is defined: count more tokens."
        ]
    fits = "of" if s.critical_width.value <= hook.width else "more than"
    sentences = [
        f"{_hook_as_subject(story, hook)} of {p.model} holds F = {ALIVE.brief(hook)} alive features at L0 ="
        f" {L0.brief(hook)}, so by the minimum-width theorem and this dictionary a student needs d* ="
        f" {CRITICAL_WIDTH.brief(hook)}, {fits}"
        f" the {hook.width:,} dimensions there, to keep them all."
    ]
    sentences += [*choice(story), *seen(story), *(told(story) if story.results.beside else [])]
    floor = _verdict_floor(story)
    if floor is not None:
        worth = floor.predicted_floor.brief(significant(floor.predicted_floor.value))
        sentences.append(
            f"By the theorem, a student of width {floor.width:,} keeps {percent(floor.kept_share)} of these features;"
            f" its predicted floor is {worth} {per_token(floor.unit)}, {percent(floor.share)} of what all of them are"
            " worth."
        )
    spliced, student = _verdict_spliced(story), shown_student(story)
    if spliced is not None and (student is None or student.width != spliced.width):
        worth = spliced.floor.brief(significant(spliced.floor.value))
        sentences.append(
            f"The teacher itself, with no more features than width {spliced.width:,} may keep, loses {worth} {NATS};"
            " nothing is fitted to a student."
        )
    if story.decomposition is not None:
        sentences.append(f"Of the students that were distilled: {short(story, story.decomposition.verdict())}.")
    return sentences


def intervals_apart(text: str) -> list[tuple[str, bool]]:
    """A sentence in pieces, each with whether it is an interval. The page prints intervals smaller."""
    return [(piece, piece.startswith("[")) for piece in re.split(r"(\[[^\]]*\])", text) if piece]


def _hook_as_subject(story: Story, hook: HookMeasurement) -> str:
    """A hook point as the beginning of a sentence."""
    name = story.name(hook)
    return f"{name[:1].upper()}{name[1:]} ({hook.hook})" if name.startswith("layer ") else name


def _verdict_floor(story: Story) -> FloorPrediction | None:
    """The predicted floor of the width nearest to half the hook point's."""
    predicted = story.floors.get(story.main_place, ())
    return min(predicted, key=lambda f: abs(f.width - story.main.width / 2), default=None)


def _verdict_spliced(story: Story) -> SplicedFloor | None:
    """The spliced floor of the width nearest to half the main hook point's, by the requested importance."""
    of_main = [f for f in story.spliced_floors if (f.hook, f.order) == (story.main.hook, story.importance.name)]
    return min(of_main, key=lambda f: abs(f.width - story.main.width / 2), default=None)


def tiles(story: Story) -> list[tuple[str, Cell]]:
    """The large figures at the top, each with its label."""
    hook = story.main
    labelled = [
        ("alive features F", column_cell(ALIVE, hook)),
        (
            f"critical width d* by this {hook.kind}; the hook point has {hook.width:,} dimensions",
            column_cell(CRITICAL_WIDTH, hook),
        ),
    ]
    labelled += answer_tiles(story)
    floor = None if story.observed else _verdict_floor(story)
    if floor is not None:
        labelled.append(
            (f"predicted floor at width {floor.width:,}, {per_token(floor.unit)}", estimate_cell(floor.predicted_floor))
        )
    labelled.append((FVU.label, column_cell(FVU, hook)))
    return labelled


def notes(story: Story) -> list[str]:
    """What a reader must know. A note on several hook points is said once."""
    measurement = story.measurement
    warnings = list(measurement.warnings)
    if all(0 < h.summary.alpha.value < 1 for h in measurement):
        warnings += error_warnings(measurement, story.widths, story.law.name)
    said = [*warnings]
    said += [f"{story.law.name}: {story.law.caveat}"] if story.law.caveat else []
    said += story.decomposition.notes()[1:] if story.decomposition is not None else []
    if story.results.spliced is not None:
        said += [*story.results.spliced.notes(), *kept_whole(story.spliced_floors)]
        said += records(floor.key for floor in story.spliced_floors)
    said += story.effective.notes() if story.effective is not None else []
    return [sentence(note) for note in said_once(said)]
