"""The section on recoverability: which features the students kept, beside what the theorem allows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

import plotly.graph_objects as go

from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery_row import COUNT_LABELS, READOUTS, RecoveryRow
from tl_capacity.report import figures
from tl_capacity.report.parts import Cell, PageTable, Section, estimate_cell, number_cell, text_cell
from tl_capacity.report.story import Story
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.naming import short_hook


def recoverability(story: Story, empty: Section) -> Section:
    """The kept features of each student, beside its budgets, its teacher and random weights.

    Raises:
        CapacityError: where the rows of recoverability cannot be read.
    """
    if story.results.recoverability is None:
        return _not_recovered(story, empty)
    rows = _with_budget_intervals(story.measurement, Recoverability.from_json(story.results.recoverability).rows)
    text = [
        "A feature counts as kept if a linear readout of the student's activations tells where it fires, on held-out"
        " documents, with an AUROC of at least τ. The teacher's own activations are the ceiling, and a student with"
        " random weights is the floor. The budget is what the theorem allows. Features that fire too rarely in the"
        " held-out text are not judged."
    ]
    caption = (
        "Dotted: what the student is compared with. Error bars are 95% intervals over documents; seeds of one width are"
        " open markers around their mean."
    )
    drawn = [("recoverability", _kept_figure(rows), caption), *_threshold_figures(story, rows)]
    tables = [_counts_table(story, rows)]
    if any(row.overlap or any(row.medians.values()) for row in rows):
        text.append(
            "If the theorem's order held, a larger share of the predicted features would be kept than of all"
            " features, which is the share by chance. Average precision and R² stand between their floor and ceiling."
            " AUROC is lenient with rare features, and they are not. Shares, medians and counts at other τ are of"
            " these documents alone and have no intervals."
        )
        tables.append(_shares_table(story, rows))
    return replace(empty, text=text, figures=drawn, tables=tables)


def _not_recovered(story: Story, empty: Section) -> Section:
    """The section without recoverability, with the command that measures it."""
    return replace(
        empty,
        missing=(
            "Recoverability was not measured, so it is not known whether the features that the students kept are the"
            " ones that the theorem names."
        ),
        command=(
            f"tl-capacity run recover {story.folder} {story.students} --hook {shlex.quote(story.main.hook)} --out"
            f" runs/recover\ntl-capacity report {story.folder} {story.students} runs/recover"
        ),
    )


def _kept_figure(rows: Sequence[RecoveryRow]) -> go.Figure:
    series = [
        {
            "series": f"{label}{difference}",
            "width": row.width,
            "value": number.value,
            "low": number.low,
            "high": number.high,
            "baseline": label != COUNT_LABELS["kept"],
        }
        for row, difference in zip(rows, _differences(rows), strict=True)
        for label, number in row.labelled.items()
    ]
    return figures.series_figure(series, "features")


def _threshold_figures(story: Story, rows: Sequence[RecoveryRow]) -> list[tuple[str, go.Figure, str]]:
    """For each hook point, the number of kept features against τ.

    There is a line for each width's first seed, for the teacher, and for random weights of the largest width.
    """
    drawn = []
    for place, hook in enumerate(dict.fromkeys(row.hook for row in rows if row.by_tau)):
        here = sorted((row for row in rows if row.hook == hook and row.by_tau), key=lambda row: row.width)
        first_seeds = {row.width: row for row in reversed(here)}
        kept = {f"width {width:,}": _readout(first_seeds[width], "student") for width in sorted(first_seeds)}
        limits = {
            "the teacher": _readout(here[-1], "teacher"),
            f"random weights, width {here[-1].width:,}": _readout(here[-1], "random"),
        }
        caption = (
            f"Kept features at {short_hook(story.measurement, hook)} against τ, of each width's first seed; the"
            " vertical line is the τ of the table. These counts have no intervals."
        )
        figure = figures.thresholds_figure(kept, limits, sorted({row.tau for row in here}))
        drawn.append((f"thresholds-{place}", figure, caption))
    return drawn


def _readout(row: RecoveryRow, readout: str) -> dict[float, float]:
    """How many features a readout finds at each τ that was counted."""
    return {tau: counts[readout] for tau, counts in sorted(row.by_tau.items()) if readout in counts}


def _counts_table(story: Story, rows: Sequence[RecoveryRow]) -> PageTable:
    """How many features each readout finds, beside the budgets."""
    taus = sorted({row.tau for row in rows})
    labels = dict.fromkeys([*COUNT_LABELS.values(), *(label for row in rows for label in row.labelled)])
    title = "Features that linear readouts find" + (f" at an AUROC of at least {taus[0]:g}" if len(taus) == 1 else "")
    of = {(row.n_judged, row.n_features) for row in rows}
    if len(of) == 1:
        title += ", of {:,} judged and {:,} alive".format(*of.pop())
    cells = [
        [
            text_cell(
                row.student,
                short_hook(story.measurement, row.hook) + (f", τ = {row.tau:g}" if len(taus) > 1 else ""),
            ),
            number_cell(row.width),
            *(estimate_cell(row.labelled[label], ",.0f") if label in row.labelled else Cell("") for label in labels),
            *([Cell(f"{row.n_features:,}", f"{row.n_judged:,} judged", row.n_features)] if of else []),
        ]
        for row in rows
    ]
    return PageTable(title, ["student", "width d_S", *labels, *(["features"] if of else [])], cells)


def _shares_table(story: Story, rows: Sequence[RecoveryRow]) -> PageTable:
    """Kept features beside the predicted ones, and median scores of readouts between floor and ceiling."""
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
            text_cell(row.student, short_hook(story.measurement, row.hook)),
            number_cell(row.width),
            _overlap_cell(row, "kept_of_predicted", "kept_of_all"),
            _overlap_cell(row, "ordered", "ordered_by_chance"),
            _median_cell(row, "average_precision"),
            _median_cell(row, "r2"),
        ]
        for row in rows
    ]
    return PageTable("Kept and predicted features, and how well readouts tell judged ones", header, cells)


def _overlap_cell(row: RecoveryRow, name: str, chance: str) -> Cell:
    """A share, with the share by chance below it."""
    if name not in row.overlap:
        return Cell("")
    by_chance = f"{row.overlap[chance]:.0%} by chance" if chance in row.overlap else ""
    return Cell(f"{row.overlap[name]:.0%}", by_chance, row.overlap[name])


def _median_cell(row: RecoveryRow, score: str) -> Cell:
    """The student's median of a score, with the floor and the ceiling below it."""
    medians = row.medians.get(score, {})
    if "student" not in medians:
        return Cell("")
    around = [f"{READOUTS[readout]} {medians[readout]:.2f}" for readout in ("random", "teacher") if readout in medians]
    return Cell(f"{medians['student']:.2f}", ", ".join(around), medians["student"])


def _with_budget_intervals(measurement: Measurement, rows: Sequence[RecoveryRow]) -> list[RecoveryRow]:
    """The rows with an interval for each budget, taken from the measurement.

    Hook points that were measured with several SAEs get none.
    """
    alone = [h.hook for h in measurement if sum(other.hook == h.hook for other in measurement) == 1]
    laws = dict.fromkeys(law for row in rows for law in row.budgets if law in plugins().capacity_laws)
    measured = {
        law: {row["hook"]: row["budget"] for row in measurement.budget(max_fvu=None, law=law).rows()} for law in laws
    }
    return [
        replace(
            row,
            budgets={
                law: _scaled_like(budget, measured[law][row.hook]) if law in measured and row.hook in alone else budget
                for law, budget in row.budgets.items()
            },
        )
        for row in rows
    ]


def _scaled_like(budget: Estimate, measured: Estimate) -> Estimate:
    """A budget with the measured one's interval, in proportion; unchanged if that has none."""
    if measured.low is None or measured.high is None:
        return budget
    ends = (budget.value * end / measured.value for end in (measured.low, measured.high))
    return Estimate(budget.value, *ends)


def _differences(rows: Sequence[RecoveryRow]) -> list[str]:
    """What tells series of recoverability rows apart: hook point and τ, if there are several."""
    hooks, taus = len({row.hook for row in rows}) > 1, len({row.tau for row in rows}) > 1
    return [(f" at {row.hook}" if hooks else "") + (f", τ = {row.tau:g}" if taus else "") for row in rows]
