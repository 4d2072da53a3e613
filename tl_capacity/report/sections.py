"""The sections of the report: each function takes the story, which holds all results, and returns what one section says
and shows, as plain text.

A section without data says in a sentence, with a command, how to get it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from tl_capacity.distillation.decomposition import PAPER, Decomposition
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.predict.caveats import error_warnings
from tl_capacity.predict.floors import FloorPrediction
from tl_capacity.predict.suite import suites
from tl_capacity.report import figures
from tl_capacity.report.results import (
    READOUTS,
    RECOVERED,
    RecoveryRow,
    Results,
    concept_titles,
    probe_rows,
    recoverability_rows,
)
from tl_capacity.report.snippets import Edge, ShownFeature, Snippet, shown_features
from tl_capacity.results.estimate import REPLICATES, Estimate, significant
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import hook_label, short_hook
from tl_capacity.show.figures import legend, power_of_ten
from tl_capacity.text.documents import DOCUMENT_GROUPS

CANDIDATES = 8
"""Of a decomposition that are shown before a click whatever they are."""
PROBE_FIGURES = 16
"""Concepts that get a figure; the table has all."""
COMMONER, CONTROL = "commoner class", "control task"
BUDGETS = {"budget": "compressed_sensing", "equilibrium": "equilibrium"}
"""The budgets of a recoverability row, and the laws that they are by."""
Snippets = Mapping[tuple[int, int], Sequence[Snippet]]


@dataclass(frozen=True)
class ReportSettings:
    """What the page shows.

    Attributes:
        widths: student widths; none for those distilled, or some between a sixteenth of the teacher's width and all of
            it.
        importance, law: of the predictions.
        hook: the hook point that the verdict is about; None for the middle one.
        observed: "fit" or "last_tenth", as in `decompose`.
    """

    widths: tuple[int, ...] = ()
    importance: str = "second_moment"
    law: str = "compressed_sensing"
    hook: str | None = None
    observed: str = "fit"


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it says, its interval or other small print, and what it sorts by."""

    text: str
    small: str = ""
    order: int | float | str | None = None


@dataclass(frozen=True)
class PageTable:
    """A table whose columns can be sorted; a `folded` one is opened with a click on its title."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        legend: colour, symbol and name of each series, where several figures have the same ones.
        missing: in a sentence, why there is nothing to see; `command`, how to get it.
    """

    id: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, go.Figure, str]] = ()
    legend: Sequence[tuple[str, str, str]] = ()
    tables: Sequence[PageTable] = ()
    missing: str = ""
    command: str = ""


@dataclass(frozen=True)
class Story:
    """What all sections share, computed once."""

    results: Results
    settings: ReportSettings
    widths: tuple[int, ...]
    law: CapacityLaw
    main: HookMeasurement
    floors: Mapping[int, Sequence[FloorPrediction]]
    edges: Mapping[int, Sequence[Edge]]
    observed: Sequence[ObservedFloor] = ()
    decomposition: Decomposition | None = None
    undecomposed: str = ""
    snippets: Snippets = field(default_factory=dict)
    snippets_note: str = ""

    @property
    def measurement(self) -> Measurement:
        return self.results.measurement

    @property
    def unit(self) -> str:
        return str(plugins().importance_estimators[self.settings.importance].unit)

    @property
    def folder(self) -> str:
        """The measurement's, as a shell takes it."""
        return _quoted(self.results.folder)

    @property
    def students(self) -> str:
        """The distillation's folder, as a shell takes it."""
        return _quoted(self.results.run_folder)

    def name(self, hook: HookMeasurement) -> str:
        return hook_label(self.measurement, hook)


def verdict(story: Story) -> list[str]:
    hook, s, p = story.main, story.main.summary, story.measurement.provenance
    if not 0 < s.alpha.value < 1:
        alive = int(s.n_alive.value)
        return [
            f"{_where(story, hook)} of {p.model} has {alive:,} alive features at L0 = {s.l0.show(',.2f')}, for which no"
            " sparsity is defined: count more tokens."
        ]
    star = s.critical_width
    fits = "of" if star.value <= hook.width else "more than"
    sentences = [
        f"{_where(story, hook)} of {p.model} holds F = {s.n_alive.show(',.0f')} alive features at L0 ="
        f" {s.l0.show(',.2f')}, so by the minimum-width theorem a student needs d* = {star.show(',.1f')}, {fits} the"
        f" {hook.width:,} dimensions there, to keep them all."
    ]
    floor = _verdict_floor(story)
    if floor is not None:
        worth = floor.predicted_floor.show(significant(floor.predicted_floor.value))
        sentences.append(
            f"A student of width {floor.width:,} keeps about {_percent(floor.kept_share)} of them; its predicted floor"
            f" is {worth} {floor.unit} per token, {_percent(floor.share)} of what all of them are worth."
        )
    if story.decomposition is not None:
        sentences.append(f"Of the students that were distilled: {_short(story, story.decomposition.verdict())}.")
    return sentences


def intervals_apart(text: str) -> list[tuple[str, bool]]:
    """A sentence in pieces, each with whether it is an interval, which the page sets smaller."""
    return [(piece, piece.startswith("[")) for piece in re.split(r"(\[[^\]]*\])", text) if piece]


def _where(story: Story, hook: HookMeasurement) -> str:
    """A hook point at the beginning of a sentence."""
    name = story.name(hook)
    return f"{name[:1].upper()}{name[1:]} ({hook.hook})" if name.startswith("layer ") else name


def _verdict_floor(story: Story) -> FloorPrediction | None:
    """The floor of the width that is nearest to half of the hook point's."""
    mine = story.floors.get(_place(story.measurement, story.main), ())
    return min(mine, key=lambda f: abs(f.width - story.main.width / 2), default=None)


def tiles(story: Story) -> list[tuple[str, Cell]]:
    s, hook = story.main.summary, story.main
    tiles = [
        ("alive features F", _estimate(s.n_alive, ",.0f")),
        (f"critical width d*; the hook point has {hook.width:,}", _estimate(s.critical_width, ",.1f")),
    ]
    floor = _verdict_floor(story)
    if floor is not None:
        tiles.append(
            (f"predicted floor at width {floor.width:,}, {floor.unit} per token", _estimate(floor.predicted_floor))
        )
    tiles.append(("FVU of the SAE", Cell("not checked") if s.fvu is None else _estimate(s.fvu, ".3f")))
    return tiles


def notes(story: Story) -> list[str]:
    """What a reader must know, what holds at several hook points said once."""
    measurement = story.measurement
    found = list(measurement.warnings)
    if all(0 < h.summary.alpha.value < 1 for h in measurement):
        found += error_warnings(measurement, story.widths, story.law.name)
    grouped: dict[str, list[str]] = {}
    hooks = {name for h in measurement for name in (h.hook, h.sae, f"{h.hook}, {h.sae}")}
    for note in found:
        where, colon, what = note.partition(": ")
        at = where if colon and where in hooks else ""
        grouped.setdefault(what if at else note, []).extend([at] if at else [])
    notes = [f"{', '.join(dict.fromkeys(where))}: {what}" if where else what for what, where in grouped.items()]
    notes += [f"{story.law.name}: {story.law.caveat}"] if story.law.caveat else []
    return [
        sentence(note)
        for note in [*notes, *(story.decomposition.notes()[1:] if story.decomposition is not None else [])]
    ]


# The sections


def _layers(story: Story, empty: Section) -> Section:
    rows = []
    for row, hook in zip(
        story.measurement.budget(max_fvu=None, law=story.law.name).rows(), story.measurement, strict=True
    ):
        rows.append(
            [
                _words(story.name(hook), f"d = {hook.width:,}"),
                _estimate(row["F"], ",.0f"),
                _estimate(row["L0"], ",.2f"),
                _estimate(row["alpha"], ".4f"),
                _estimate(row["g"], ",.2f"),
                _estimate(row["budget"], ",.0f"),
                _estimate(row["d*"], ",.1f"),
                _estimate(row["d*_het"], ",.1f"),
                Cell("not checked", order=-1) if row["FVU"] is None else _estimate(row["FVU"], ".3f"),
            ]
        )
    header = ["hook point", "F alive", "L0", "α = 1 − L0/F", "g(α)", "budget d·ĝ", "d* = F/g(α)", "d*_het", "FVU"]
    text = [
        "F counts the features whose firing rate exceeds the alive threshold, L0 is the mean number that are active on"
        " a token. One dimension holds g(α) = 1/((1−α) ln(1/(1−α))) features, so d* is the narrowest student that can"
        " keep them all; d*_het = Σ p ln(1/p) lets each feature have its own rate. FVU is the variance that the SAE"
        " leaves unexplained: what it misses is in no feature and in no floor."
    ]
    s, name = story.main.summary, short_hook(story.measurement, story.main.hook)
    named = "" if name == story.main.hook else f"; {name} is {story.main.hook}"
    title = (
        f"{s.n_tokens:,} tokens of {s.n_documents:,} documents, with 95% intervals over documents{named}. A click on a"
        " heading sorts."
    )
    return replace(empty, text=text, tables=[PageTable(title, header, rows)])


def _importance(story: Story, empty: Section) -> Section:
    hook = story.main.hook if sum(h.hook == story.main.hook for h in story.measurement) == 1 else None
    figure = figures.importance_figure(story.measurement, story.widths, story.settings.importance, story.law.name, hook)
    caption = (
        "Bands are 95% intervals over documents. Markers show where the budget of each student width ends: what is to"
        f" the right is lost. Dotted lines, some labelled with the width, are those of {story.name(story.main)}."
    )
    return replace(empty, figures=[("importance", figure, caption)])


def _firing_rates(story: Story, empty: Section) -> Section:
    rows = []
    for hook in story.measurement:
        s = hook.summary
        fired = s.alive_at[0.0]
        never = Estimate(*(None if n is None else s.d_sae - n for n in (fired.value, fired.high, fired.low)))  # type: ignore[arg-type]
        counts = [*s.alive_at.values(), s.features_chao2, never, s.dense_latents]
        rows.append([_words(story.name(hook)), *(_estimate(count, ",.0f") for count in counts)])
    thresholds = [f"F at p > {power_of_ten(t)}" for t in story.main.summary.alive_at]
    header = ["hook point", *thresholds, "can fire (Chao2)", "never fired", "dense, p > 1/e"]
    text = [
        "F depends on the threshold, and on how many tokens were read: at a rate of 10⁻⁵ it takes about ten million to"
        " place a feature to within 10%. Chao2 estimates from features that only one or two documents showed how many"
        " can fire at all."
    ]
    caption = (
        "The thick line is the alive threshold of this report, thin dotted ones are others; above 1/e a latent is too"
        " dense for g(α). The histogram is of the text that was read; the table has intervals."
    )
    section = replace(
        empty, text=text, tables=[PageTable("Features at several thresholds, with 95% intervals", header, rows)]
    )
    if not any(hook.summary.alive_at[0.0].value for hook in story.measurement):
        return replace(
            section,
            missing=(
                "No latent fired on the text that was read, so there is no rate to draw: count more tokens, or check"
                " the hook point."
            ),
        )
    return replace(section, figures=[("firing-rates", figures.firing_rate_figure(story.measurement), caption)])


def _suite(story: Story, empty: Section) -> Section:
    found = suites(story.measurement)
    text = [
        "d* = F/g(α) is the same number as L0 · ln(F/L0): it rests on the dictionary's L0, which whoever trained the"
        " SAE chose. One d* is a statement about the model and that SAE together; over several SAEs of one hook point"
        " it shows how much is the model's."
    ]
    if not found:
        return replace(
            empty,
            text=text,
            missing=(
                "Each hook point was measured with one SAE, so it is not known how far d* rests on that choice: measure"
                " several at one hook point."
            ),
            command=(
                f"tl-capacity measure --model {_quoted(story.measurement.provenance.model)} --sae SAE --sae"
                " SAE_OF_ANOTHER_L0 --out runs/suite"
            ),
        )
    text += [sentence(suite.statement()) for suite in found]
    if any(suite.exponent is not None for suite in found):
        text.append("The exponent is of these SAEs alone, which are too few for an interval.")
    rows = [
        [
            _words(hook.sae, short_hook(story.measurement, hook.hook)),
            _number(hook.summary.d_sae),
            _estimate(hook.summary.l0, ",.2f"),
            _estimate(hook.summary.n_alive, ",.0f"),
            _estimate(hook.summary.critical_width, ",.1f"),
            _estimate(hook.summary.heterogeneous_critical_width, ",.1f"),
            Cell("not checked", order=-1) if hook.summary.fvu is None else _estimate(hook.summary.fvu, ".3f"),
        ]
        for suite in found
        for hook in suite.saes
    ]
    return replace(
        empty,
        text=text,
        figures=[
            (
                "suite",
                figures.suite_figure(story.measurement),
                "Error bars are 95% intervals over documents, often smaller than the markers.",
            )
        ],
        tables=[PageTable("SAEs of one hook point", ["SAE", "latents", "L0", "F alive", "d*", "d*_het", "FVU"], rows)],
    )


def _floors(story: Story, empty: Section) -> Section:
    labelled = [
        replace(f, hook=story.name(story.measurement.hooks[place]))
        for place, mine in story.floors.items()
        for f in mine
    ]
    if not labelled:
        raise CapacityError("no hook point has enough alive features for a prediction: count more tokens")
    same_unit = story.settings.importance == "decoder_weighted"
    errors = {story.name(h): h.summary.reconstruction_error for h in story.measurement} if same_unit else {}
    drawn = figures.floors_figure(labelled, {name: error.value for name, error in errors.items() if error is not None})
    unit = f"{story.unit} per token"
    caption = (
        f"Predicted floor L*(d_S), the importance ({story.settings.importance}) of what a student of that width cannot"
        " keep, with 95% intervals."
    )
    section_figures = [("predicted-floors", drawn, caption)]
    tables = _floor_tables(story)
    text = [
        "A student of width d_S keeps the F_S = min(⌊d_S · ĝ(α)⌋, F) most important features and loses the importance"
        f" of the rest. The unit is {unit}"
        + (
            "."
            if story.unit.startswith("nats")
            else ", so a predicted floor can be compared with a loss in nats only through a fitted factor C."
        )
    ]
    section = replace(empty, text=text, figures=section_figures, tables=tables)
    if story.results.run is None:
        widths = ",".join(map(str, story.widths))
        teacher = _quoted(story.measurement.provenance.model)
        return replace(
            section,
            missing="No student was distilled, so nothing was observed that could contradict the prediction.",
            command=(
                f"tl-capacity run distill --teacher {teacher} --widths {widths} --tokens 1000000 --repeat --out"
                f" {story.students}\ntl-capacity report {story.folder} {story.students}"
            ),
        )
    if story.observed:
        observed = figures.observed_figure(story.observed, story.decomposition, story.settings.observed)
        section_figures.append(
            (
                "observed-floors",
                observed,
                "Observed floors of the distilled students, in nats per token, with 95% intervals of the fit.",
            )
        )
        tables.append(_observed_table(story))
    found = story.decomposition
    if found is None:
        return replace(
            section, missing=sentence(f"Predicted and observed floors could not be compared: {story.undecomposed}")
        )
    text.append(
        f"{_short(story, found.verdict())}. Error and R² are of these widths alone, which are too few for an interval."
    )
    tables += _candidate_tables(story, found)
    return section


def _floor_tables(story: Story) -> list[PageTable]:
    """The floors at the hook point of the verdict, and folded those at all."""

    def cells(f: FloorPrediction) -> list[Cell]:
        counts = [_estimate(count, ",.0f") for count in (f.features_kept, f.features_lost)]
        return [
            _number(f.width),
            *counts,
            _share(f.kept_share),
            _estimate(f.predicted_floor),
            _share(f.share),
            _estimate(f.naive_floor),
        ]

    header = [
        "width d_S",
        "kept F_S",
        "lost",
        "share kept",
        f"predicted floor, {story.unit} per token",
        "share of all importance",
        "naive floor",
    ]
    title = f"importance {story.settings.importance}, law {story.law.name}"
    main = _place(story.measurement, story.main)
    tables = []
    if main in story.floors:
        tables.append(
            PageTable(
                f"Predicted floors at {story.name(story.main)}: {title}", header, [cells(f) for f in story.floors[main]]
            )
        )
    if set(story.floors) - {main}:
        rows = [
            [Cell(story.name(story.measurement.hooks[place]), order=place), *cells(f)]
            for place, mine in story.floors.items()
            for f in mine
        ]
        tables.append(
            PageTable(
                f"Predicted floors at all {len(story.floors)} hook points: {title}", ["hook point", *header], rows, True
            )
        )
    return tables


def _observed_table(story: Story) -> PageTable:
    predicted = {} if story.decomposition is None else story.decomposition.predicted
    rows = [
        [
            _words(f.name, "began with the teacher's weights" if f.start == "teacher" else ""),
            _number(f.width),
            _number(f.seed),
            Cell("not fitted", order=f.value) if f.low is None else _estimate(Estimate(f.value, f.low, f.high), ".4f"),
            _estimate(Estimate(f.last_tenth, f.last_tenth_low, f.last_tenth_high), ".4f"),
            Cell("") if f.low is None else _estimate(Estimate(f.falling, f.falling_low, f.falling_high), ".4f"),
            _estimate(predicted[f.width]) if f.width in predicted and f.start != "teacher" else Cell(""),
        ]
        for f in story.observed
    ]
    header = [
        "student",
        "width d_S",
        "seed",
        "L∞ of the fit, nats per token",
        "mean of the last tenth",
        "still falling by",
        f"predicted, {story.unit} per token",
    ]
    return PageTable("Observed floors", header, rows)


def _candidate_tables(story: Story, found: Decomposition) -> list[PageTable]:
    """The best candidates with those that they are to be compared with, and folded all of them."""
    rows = {
        place: [
            _number(place),
            _words(_short(story, f.candidate.name), f"{f.candidate.kind}{', asked for' if f is found.chosen else ''}"),
            Cell("too few widths", order=float("inf")) if f.error is None else Cell(f"{f.error:.4f}", order=f.error),
            Cell("too few widths", order=float("-inf")) if f.r2 is None else Cell(f"{f.r2:.4f}", order=f.r2),
            (
                Cell("")
                if f.c is None
                else Cell("1", "fixed", 1.0)
                if f.candidate.as_is
                else _estimate(f.c, significant(f.c.value, 3))
            ),
            _estimate(f.b, significant(f.b.value, 3)),
            Cell("") if f.exponent is None else _estimate(f.exponent, ".2f"),
        ]
        for place, f in enumerate(found.fits, 1)
    }
    header = ["place", "candidate", "error, nats per token", "R²", "C", "B, nats per token", "exponent"]
    first = [rows[place] for place, _ in found.shown(CANDIDATES)]
    title = (
        "What explains the observed floors: observed = C · candidate + B, the smallest error at a width that was left"
        " out first"
    )
    tables = [PageTable(title, header, first)]
    return (
        tables
        if len(first) == len(rows)
        else [*tables, PageTable(f"All {len(rows)} candidates", header, list(rows.values()), True)]
    )


def _short(story: Story, text: str) -> str:
    """A sentence of a decomposition with short names of hook points, and without the law where it
    is the theorem's own.
    """
    for hook in sorted(story.measurement, key=lambda h: -len(h.hook)):
        text = text.replace(f" at {hook.hook}", f" at {short_hook(story.measurement, hook.hook)}")
    return text.replace(f", {PAPER}", "")


def _curves(story: Story, empty: Section) -> Section:
    run = story.results.run
    if run is None:
        command = f"tl-capacity report {story.folder} {story.students}"
        return replace(
            empty,
            missing="There are no training curves, as no distillation was given: once there is one, name its folder.",
            command=command,
        )
    text = [
        f"{run.teacher}, d = {run.teacher_width:,}, distilled on {run.students[0].tokens[-1]:,} tokens of"
        f" {run.source or 'text'}; judged in nats per token at temperature 1 on {run.heldout_tokens:,} held-out tokens."
        " Not the last value is the floor but where the curve is heading."
    ]
    caption = "Thin dotted lines are the fits L∞ + a·t^−b, thin dashed ones their asymptotes L∞."
    figure = figures.curves_figure(run, story.observed)
    return replace(empty, text=text, figures=[("curves", figure, caption)])


def _probes(story: Story, empty: Section) -> Section:
    if story.results.probes is None:
        return replace(
            empty,
            missing=(
                "No probe was trained, so it is not known which concepts the students' activations still tell apart."
            ),
            command=(
                f"tl-capacity run probe --model {_quoted(story.measurement.provenance.model)} --model {story.students} "
                f"--hook {_quoted(story.main.hook)} --measurement {story.folder} --out runs/probes\n"
                f"tl-capacity report {story.folder} {story.students} runs/probes"
            ),
        )
    rows, titles = probe_rows(story.results.probes), concept_titles(story.results.probes)
    concepts, kinds = (
        list(dict.fromkeys(row.concept for row in rows)),
        [
            *dict.fromkeys(row.kind for row in rows),
            COMMONER,
        ],
    )
    kinds += [CONTROL] if any(row.control is not None for row in rows) else []
    drawn = []
    for place, concept in enumerate(concepts[:PROBE_FIGURES]):
        series = [
            {
                "series": row.kind,
                "width": row.width,
                "value": row.accuracy.value,
                "low": row.accuracy.low,
                "high": row.accuracy.high,
                "baseline": row.baseline,
            }
            for row in rows
            if row.concept == concept
        ]
        series += [
            {"series": name, "width": row.width, "value": value, "baseline": True}
            for row in rows
            for name, value in ((COMMONER, row.majority), (CONTROL, row.control))
            if row.concept == concept and not row.baseline and value is not None
        ]
        figure = (
            figures.series_figure(series, "accuracy", kinds)
            .update_yaxes(rangemode="normal")
            .update_layout(showlegend=False)
        )
        drawn.append((f"probes-{place}", figure, titles.get(concept, concept)))
    cells = [
        [
            _words(row.concept),
            _words(row.kind, "baseline" if row.baseline else row.model),
            _number(row.width),
            _estimate(row.accuracy, ".3f"),
            Cell("") if row.auroc is None else _estimate(row.auroc, ".3f"),
            Cell("") if row.majority is None else Cell(f"{row.majority:.3f}", order=row.majority),
            Cell("") if row.selectivity is None else _estimate(row.selectivity, ".3f"),
        ]
        for row in rows
    ]
    text = [
        "Accuracy of a logistic regression on activations of unseen documents, with 95% intervals. Dotted lines are"
        " baselines: what a model with random weights, principal components or a bag of embeddings tell as well says"
        " nothing about the student. The control task can be told only by knowing tokens by heart; selectivity is the"
        " accuracy above it. Seeds of one width are open markers around their mean."
    ]
    teachers = {row.width for row in rows if row.model == story.measurement.provenance.model and not row.baseline}
    text += [f"The teacher stands among its students, at its own width of {width:,}." for width in teachers]
    if len(concepts) > PROBE_FIGURES:
        text.append(f"Of {len(concepts)} concepts the first {PROBE_FIGURES} are drawn; the table has all.")
    header = ["concept", "read", "width d_S", "accuracy", "AUROC", "commoner class", "selectivity"]
    table = PageTable("All probes", header, cells, folded=len(cells) > 12)
    return replace(empty, text=text, figures=drawn, legend=legend(kinds), tables=[table])


def _recoverability(story: Story, empty: Section) -> Section:
    if story.results.recoverability is None:
        return replace(
            empty,
            missing=(
                "Recoverability was not measured, so it is not known whether the features that the students kept are"
                " the ones that the theorem names."
            ),
            command=(
                f"tl-capacity run recover {story.folder} {story.students} --hook {_quoted(story.main.hook)} --out"
                f" runs/recover\ntl-capacity report {story.folder} {story.students} runs/recover"
            ),
        )
    rows = _with_budget_intervals(story.measurement, recoverability_rows(story.results.recoverability))
    taus = sorted({row.tau for row in rows})
    series = [
        {
            "series": f"{label}{which}",
            "width": row.width,
            "value": row.counts[key].value,
            "low": row.counts[key].low,
            "high": row.counts[key].high,
            "baseline": key != "kept",
        }
        for row, which in zip(rows, _which(rows), strict=True)
        for key, label in RECOVERED.items()
        if key in row.counts
    ]
    header = ["student", "width d_S", *RECOVERED.values(), "features"]
    cells = [
        [
            _words(
                row.student,
                short_hook(story.measurement, row.hook) + (f", τ = {row.tau:g}" if len(taus) > 1 else ""),
            ),
            _number(row.width),
            *(_estimate(row.counts[key], ",.0f") if key in row.counts else Cell("") for key in RECOVERED),
            Cell(f"{row.n_features:,}", f"{row.n_judged:,} judged", row.n_features),
        ]
        for row in rows
    ]
    text = [
        "A feature counts as kept where a linear readout of the student's activations tells, on held-out documents, at"
        " an AUROC of at least τ where it fires. The teacher's own activations are the ceiling, a student with random"
        " weights the floor. The theorem speaks of the budget. Features that fire too seldom in the held-out text are"
        " not judged."
    ]
    caption = (
        "Dotted: what the student is compared with. Error bars are 95% intervals over documents; seeds of one width are"
        " open markers around their mean."
    )
    drawn = [("recoverability", figures.series_figure(series, "features"), caption), *_thresholds(story, rows)]
    tables = [
        PageTable(
            "Features that linear readouts find" + (f" at an AUROC of at least {taus[0]:g}" if len(taus) == 1 else ""),
            header,
            cells,
        )
    ]
    if any(row.overlap or any(row.medians.values()) for row in rows):
        text.append(
            "If the theorem's order held, more of the predicted features would be kept than of all, which is what"
            " chance would give. Average precision and R² lie between the floor and the ceiling; AUROC is lenient with"
            " rare features, and they are not. Shares, medians and counts at other τ are of these documents alone and"
            " have no intervals."
        )
        tables.append(_kept_table(story, rows))
    return replace(empty, text=text, figures=drawn, tables=tables)


def _thresholds(story: Story, rows: Sequence[RecoveryRow]) -> list[tuple[str, go.Figure, str]]:
    """For each hook point the kept features against τ: of each width's first seed, of the teacher, and of random
    weights of the largest width.
    """
    found = []
    for place, hook in enumerate(dict.fromkeys(row.hook for row in rows if row.by_tau)):
        mine = sorted((row for row in rows if row.hook == hook and row.by_tau), key=lambda row: row.width)
        of_width = {row.width: row for row in reversed(mine)}
        kept = {f"width {width:,}": _readout(of_width[width], "student") for width in sorted(of_width)}
        limits = {
            "the teacher": _readout(mine[-1], "teacher"),
            f"random weights, width {mine[-1].width:,}": _readout(mine[-1], "random"),
        }
        caption = (
            f"Kept features at {short_hook(story.measurement, hook)} against τ, of each width's first seed; the"
            " vertical line is the τ of the table. These counts have no intervals."
        )
        found.append(
            (f"thresholds-{place}", figures.thresholds_figure(kept, limits, sorted({row.tau for row in mine})), caption)
        )
    return found


def _readout(row: RecoveryRow, readout: str) -> dict[float, float]:
    """How many features a readout finds at each τ that it was counted at."""
    return {tau: counts[readout] for tau, counts in sorted(row.by_tau.items()) if readout in counts}


def _kept_table(story: Story, rows: Sequence[RecoveryRow]) -> PageTable:
    """Kept features beside the predicted ones, and medians of what readouts reach, between floor and ceiling."""

    def share(row: RecoveryRow, name: str, chance: str) -> Cell:
        if name not in row.overlap:
            return Cell("")
        by_chance = f"{row.overlap[chance]:.0%} by chance" if chance in row.overlap else ""
        return Cell(f"{row.overlap[name]:.0%}", by_chance, row.overlap[name])

    def median(row: RecoveryRow, name: str) -> Cell:
        found = row.medians.get(name, {})
        around = ", ".join(
            f"{READOUTS[readout]} {found[readout]:.2f}" for readout in ("random", "teacher") if readout in found
        )
        return Cell(f"{found['student']:.2f}", around, found["student"]) if "student" in found else Cell("")

    header = [
        "student",
        "width d_S",
        "of the F_S predicted, kept",
        "of the k kept, among the k most important",
        "average precision, median",
        "R², median",
    ]
    cells = [
        [
            _words(row.student, short_hook(story.measurement, row.hook)),
            _number(row.width),
            share(row, "kept_of_predicted", "kept_of_all"),
            share(row, "ordered", "ordered_by_chance"),
            median(row, "average_precision"),
            median(row, "r2"),
        ]
        for row in rows
    ]
    return PageTable("Kept and predicted features, and how well readouts tell judged ones", header, cells)


def _with_budget_intervals(measurement: Measurement, rows: Sequence[RecoveryRow]) -> list[RecoveryRow]:
    """The rows with budgets as uncertain as the measured ones of their hook points, where those were measured with one
    SAE.
    """
    alone = [h.hook for h in measurement if sum(other.hook == h.hook for other in measurement) == 1]
    found = list(rows)
    for key, law in BUDGETS.items():
        measured = {
            row["hook"]: row["budget"]
            for row in measurement.budget(max_fvu=None, law=law).rows()
            if row["hook"] in alone
        }
        for place, row in enumerate(found):
            whole, mine = measured.get(row.hook), row.counts.get(key)
            if mine is not None and whole is not None and whole.low is not None and whole.high is not None:
                interval = Estimate(
                    mine.value, mine.value * whole.low / whole.value, mine.value * whole.high / whole.value
                )
                found[place] = replace(row, counts={**row.counts, key: interval})
    return found


def _which(rows: Sequence[RecoveryRow]) -> list[str]:
    """What tells the series of recoverability rows apart: hook point and τ, where there are several."""
    hooks, taus = len({row.hook for row in rows}) > 1, len({row.tau for row in rows}) > 1
    return [(f" at {row.hook}" if hooks else "") + (f", τ = {row.tau:g}" if taus else "") for row in rows]


SECTIONS: tuple[tuple[Section, Callable[[Story, Section], Section]], ...] = (
    (Section("layers", "What each layer holds"), _layers),
    (Section("importance", "How importance is spread, and where each width's budget ends"), _importance),
    (Section("firing-rates", "How often features fire"), _firing_rates),
    (Section("suite", "Critical width and the dictionary's L0"), _suite),
    (Section("floors", "Predicted and observed floors"), _floors),
    (Section("training", "Training curves and where they are heading"), _curves),
    (Section("probes", "What students still know: probes"), _probes),
    (Section("recoverability", "Features that students kept"), _recoverability),
)
"""The sections with figures and tables in their order, empty, and what fills each."""


def all_sections(story: Story) -> list[Section]:
    """Every section with figures and tables; in place of one that cannot be, the reason."""
    return [_filled(story, empty, fill) for empty, fill in SECTIONS]


def _filled(story: Story, empty: Section, fill: Callable[[Story, Section], Section]) -> Section:
    try:
        return fill(story, empty)
    except CapacityError as problem:
        return replace(empty, missing=sentence(str(problem)))


# Which features go first


def features(story: Story) -> dict[str, Any]:
    """What the page's script needs for the lists of features, every number as text."""
    hooks = []
    for place, around in story.edges.items():
        hook = story.measurement.hooks[place]
        latents = sorted({latent for edge in around for latent in (*edge.kept, *edge.lost)})
        known = shown_features(hook, latents, story.settings.importance)
        hooks.append(
            {
                "name": story.name(hook),
                "main": hook is story.main,
                "edges": [
                    {
                        "width": e.width,
                        "n_kept": f"{e.n_kept:,}",
                        "n_lost": f"{e.n_lost:,}",
                        "kept": list(e.kept),
                        "lost": list(e.lost),
                    }
                    for e in around
                ],
                "features": {str(latent): _shown_feature(story, place, feature) for latent, feature in known.items()},
            }
        )
    return {"unit": story.unit, "hooks": hooks, "snippets": bool(story.snippets)}


def _shown_feature(story: Story, place: int, feature: ShownFeature) -> dict[str, Any]:
    return {
        "rank": feature.rank.show(",.0f"),
        "importance": feature.importance.show(significant(feature.importance.value, 3)),
        "rate": _percent(feature.rate),
        "snippets": [
            {
                "strength": f"{snippet.strength:.3g}",
                "document": snippet.document,
                "pieces": _joined(snippet),
            }
            for snippet in story.snippets.get((place, feature.latent), ())
        ],
    }


def _joined(snippet: Snippet) -> list[tuple[str, float]]:
    """The pieces with neighbours of equal share joined: most of the text is not active, and the
    page is smaller for it.
    """
    rounded = [(text, round(share, 2)) for text, share in snippet.pieces]
    return [
        ("".join(text for text, _ in run).replace("\n", "⏎"), share)
        for share, run in groupby(rounded, key=lambda piece: piece[1])
    ]


def features_missing(story: Story) -> str:
    return "" if story.edges else "No hook point has enough alive features to rank: count more tokens."


# Method


def method(story: Story) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of what decided the figures."""
    m, p, s = story.measurement, story.measurement.provenance, story.main.summary
    masked = ", ".join(f"{count:,} {reason}" for reason, count in s.masked.items())
    estimator = plugins().importance_estimators[story.settings.importance]
    settings = {name: value for name, value in p.settings.items() if name != "masked_token_ids"}
    shards = f"; shard {', '.join(map(str, p.shards))} of {p.shard_count}" if p.shard_count > 1 else ""
    measured = [
        ("model", f"{p.model}, {p.dtype}, revision {(p.revision or 'unknown')[:16]}"),
        ("text", f"{p.source}: {s.n_tokens:,} counted tokens of {s.n_documents:,} documents{shards}"),
        (
            "masked tokens",
            f"{masked}; special and first positions (BOS) hold {s.masked_norm_share:.1%} of Σ‖x‖² and are not counted",
        ),
        ("settings", _in_words(settings) or "none recorded"),
        ("alive", f"firing rate > {s.alive_threshold:g}"),
        ("time", f"{p.seconds:,.0f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in p.versions.items()) or "not recorded"),
    ]
    groups = [("Measurement", measured)]
    groups.append(
        (
            "Dictionaries",
            [
                (story.name(h), f"{h.sae}: {h.architecture}, {h.summary.d_sae:,} latents, SHA-256 {h.sae_digest[:12]}")
                for h in m
            ],
        ),
    )
    groups.append(
        (
            "Predictions",
            [
                ("importance", f"{story.settings.importance}: {estimator.summary or 'no description'} ({story.unit})"),
                ("law", f"{story.law.name}: {story.law.summary}"),
                ("intervals", f"95%, bootstrap over documents in {DOCUMENT_GROUPS} groups, {REPLICATES} replicates"),
            ],
        )
    )
    run = story.results.run
    if run is not None:
        groups.append(
            (
                "Distillation",
                [
                    ("teacher", f"{run.teacher}, d = {run.teacher_width:,}"),
                    (
                        "text",
                        f"{run.source}; held out: {run.heldout_tokens:,} tokens of {run.heldout_source or run.source}",
                    ),
                    ("settings", _in_words(run.settings)),
                    (
                        "intervals",
                        (
                            "95%: of floors, moving-block bootstrap of what the fit leaves; of C, B and exponent,"
                            " bootstrap over widths and seeds"
                        ),
                    ),
                    ("time", f"{run.seconds:,.0f} s"),
                ],
            )
        )
    return [(title, [(key, value) for key, value in rows]) for title, rows in groups]


# Small things


def _estimate(estimate: Estimate, digits: str = "") -> Cell:
    """A number with its interval beneath it."""
    if not isfinite(estimate.value):
        return Cell("undefined", order=float("-inf"))
    number, _, interval = estimate.show(digits or significant(estimate.value)).partition(" ")
    return Cell(number, interval, estimate.value)


def _percent(share: Estimate) -> str:
    """A share as a percentage of three significant digits, with its interval."""
    return share.show(significant(100 * (share.value or share.high or 1.0), 3).replace("f", "%").replace("g", "%"))


def _share(share: Estimate) -> Cell:
    number, _, interval = _percent(share).partition(" ")
    return Cell(number, interval, share.value)


def _in_words(settings: Mapping[str, Any]) -> str:
    """Settings as a list of names and values, nested ones in their place, those that are empty left out."""
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.append(_in_words(value))
        elif value not in (None, "", [], {}):
            found.append(f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return ", ".join(found)


def _words(text: str, small: str = "") -> Cell:
    """Text that sorts as such."""
    return Cell(text, small, text)


def _number(value: int) -> Cell:
    return Cell(f"{value:,}", order=value)


def sentence(text: str) -> str:
    """A message as a sentence of its own."""
    text = text.strip()
    if text.partition(" ")[0].isalpha():  # no name of a hook point
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _quoted(text: str) -> str:
    return shlex.quote(text)


def _place(measurement: Measurement, hook: HookMeasurement) -> int:
    return next(place for place, each in enumerate(measurement) if each is hook)
