"""What the distilled students showed: training curves, observed floors, and what explains the floors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tl_capacity.distillation.candidates import without_default_law
from tl_capacity.distillation.curves import GIVEN
from tl_capacity.distillation.decomposition import Decomposition
from tl_capacity.distillation.fitting import Fit
from tl_capacity.distillation.observed import ObservedFloor, judged_cells
from tl_capacity.distillation.observed_table import judged_notes, judged_title
from tl_capacity.distillation.standings import league_cells
from tl_capacity.report import figures
from tl_capacity.report.parts import Cell, PageTable, Section, estimate_cell, number_cell, sentence, text_cell
from tl_capacity.report.story import Story
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.results.naming import short_hook
from tl_capacity.runtime.units import per_token

CANDIDATES = 2
"""For each number of fitted constants, this many candidates are always shown without a click."""


def observed_table(story: Story) -> PageTable:
    """The observed floor of each student, beside the predicted floor of its width."""
    header = [
        "student",
        "width d_S",
        "seed",
        "L∞ of the fit, nats per token",
        "mean of the last tenth",
        "still falling by",
        f"predicted, {per_token(story.unit)}",
    ]
    predicted = {} if story.decomposition is None else story.decomposition.predicted
    return PageTable("Observed floors", header, [_observed_row(floor, predicted) for floor in story.observed])


def _observed_row(floor: ObservedFloor, predicted: Mapping[int, Estimate]) -> list[Cell]:
    control = floor.start == "teacher"
    if floor.start == GIVEN:
        fit, falling = Cell("not trained here", order=floor.value), Cell("")
    elif floor.low is None:
        fit, falling = Cell("not fitted", order=floor.value), Cell("")
    else:
        fit = estimate_cell(Estimate(floor.value, floor.low, floor.high), ".4f")
        falling = estimate_cell(Estimate(floor.falling, floor.falling_low, floor.falling_high), ".4f")
    return [
        text_cell(floor.name, "began with the teacher's weights" if control else ""),
        number_cell(floor.width),
        number_cell(floor.seed),
        fit,
        estimate_cell(Estimate(floor.last_tenth, floor.last_tenth_low, floor.last_tenth_high), ".4f"),
        falling,
        estimate_cell(predicted[floor.width]) if floor.width in predicted and not control else Cell(""),
    ]


def candidate_tables(story: Story, decomposition: Decomposition) -> list[PageTable]:
    """The league, the best candidates and those to compare them with, and, folded, all candidates.

    Nothing is ranked below five widths.
    """
    header = ["constants", "place", "candidate", "error, nats per token", "R²", "C", "B, nats per token", "exponent"]

    def row(place: str, fit: Fit) -> list[Cell]:
        return [*_place_cells(place, fit), *_candidate_row(story, fit, fit is decomposition.chosen)]

    first = [row(place, fit) for place, fit in decomposition.shown(CANDIDATES)]
    title = "Candidates: observed = C · candidate^exponent + B"
    if not decomposition.groups:
        return [PageTable(title, header, first)]
    columns, cells = league_cells(decomposition.groups, lambda candidate: short(story, candidate.name))
    league = PageTable(
        "Error at a left-out width, nats per token, of the candidate chosen without it",
        columns,
        [[text_cell(cell) for cell in line] for line in cells],
    )
    tables = [league, PageTable(f"{title}, the smallest error at a left-out width first", header, first)]
    everything = [row(place, fit) for place, fit in decomposition.shown(len(decomposition.fits))]
    if len(first) < len(everything):
        tables.append(PageTable(f"All {len(everything)} candidates", header, everything, folded=True))
    return tables


def _place_cells(place: str, fit: Fit) -> list[Cell]:
    """How many constants a candidate fits, and its place among those with as many."""
    number, _, interval = place.partition(" ")
    return [
        number_cell(fit.candidate.constants),
        Cell(number, interval, int(number) if number else float("inf")),
    ]


def _candidate_row(story: Story, fit: Fit, chosen: bool) -> list[Cell]:
    form, side = fit.candidate.form, "knows features" if fit.candidate.shape.knows_features else "rival"
    c = Cell("") if fit.c is None else estimate_cell(fit.c, significant(fit.c.value, 3))
    b = estimate_cell(fit.b, significant(fit.b.value, 3))
    return [
        text_cell(short(story, fit.candidate.name), f"{side}{', asked for' if chosen else ''}"),
        Cell("too few widths", order=float("inf")) if fit.error is None else Cell(f"{fit.error:.4f}", order=fit.error),
        Cell("too few widths", order=float("-inf")) if fit.r2 is None else Cell(f"{fit.r2:.4f}", order=fit.r2),
        c if form.free_c else Cell("1", "fixed", 1.0),
        b if form.free_b else Cell("0", "fixed", 0.0),
        Cell("") if fit.exponent is None else estimate_cell(fit.exponent, ".2f"),
    ]


def short(story: Story, text: str) -> str:
    """A sentence of a decomposition with short names of hook points, and without the default law's name."""
    for hook in sorted(story.measurement, key=lambda h: -len(h.hook)):
        text = text.replace(f" at {hook.hook}", f" at {short_hook(story.measurement, hook.hook)}")
    return without_default_law(text)


def curves(story: Story, empty: Section) -> Section:
    """Held-out loss against tokens, with the fits."""
    run = story.results.run
    if run is None:
        command = f"tl-capacity report {story.folder} {story.students}"
        return replace(
            empty,
            missing="There are no training curves, because no distillation was given: pass its folder.",
            command=command,
        )
    if run.observed:
        header, rows = judged_cells(run)
        cells = [[text_cell(row[0]), *(Cell(cell) for cell in row[1:])] for row in rows]
        notes = [sentence(note) for note in judged_notes(run)]
        return replace(empty, text=notes, tables=[PageTable(judged_title(run), header, cells)])
    text = [
        f"{run.teacher}, d = {run.teacher_width:,}, distilled on {run.students[0].tokens[-1]:,} tokens of"
        f" {run.source or 'text'}; judged in nats per token at temperature 1 on {run.heldout_tokens:,} held-out tokens."
        " The mean of the last tenth is what students reached; L∞ is where the curve is heading."
    ]
    caption = "Thin dotted lines are the fits L∞ + a·t^−b, thin dashed ones their asymptotes L∞."
    figure = figures.curves_figure(run, story.observed)
    return replace(empty, text=text, figures=[("curves", figure, caption)])
