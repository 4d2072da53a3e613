"""The section on probes: which concepts the students' activations still tell apart."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

import plotly.graph_objects as go

from tl_capacity.probing.rows import ProbeRow
from tl_capacity.probing.saved_probes import Probes
from tl_capacity.report import figures
from tl_capacity.report.parts import Cell, PageTable, Section, estimate_cell, number_cell, text_cell
from tl_capacity.report.story import Story
from tl_capacity.show.figures import legend

PROBE_FIGURES = 16
"""Number of concepts that get a figure; the table has all of them."""
COMMONER, CONTROL = "commoner class", "control task"


def probes(story: Story, empty: Section) -> Section:
    """Accuracy of the probes on each concept against the student's width, beside their baselines.

    Raises:
        CapacityError: where the rows of the probes cannot be read.
    """
    if story.results.probes is None:
        return _not_probed(story, empty)
    results = Probes.from_json(story.results.probes)
    rows, titles = results.rows, results.titles
    concepts = list(dict.fromkeys(row.concept for row in rows))
    kinds = [*dict.fromkeys(row.kind for row in rows), COMMONER]
    kinds += [CONTROL] if any(row.control is not None for row in rows) else []
    drawn = [
        (
            f"probes-{place}",
            _accuracy_figure([row for row in rows if row.concept == concept], kinds),
            titles.get(concept, concept),
        )
        for place, concept in enumerate(concepts[:PROBE_FIGURES])
    ]
    text = [
        "Accuracy of a logistic regression on activations of unseen documents, with 95% intervals. Dotted lines are"
        " baselines: what random weights, principal components or a bag of embeddings also tell says nothing about"
        " the student. The control task can be solved only by memorising tokens; selectivity is the accuracy above"
        " it. Seeds of one width are open markers around their mean."
    ]
    teachers = {row.width for row in rows if row.model == story.measurement.provenance.model and not row.baseline}
    text += [f"The teacher stands among its students, at its own width of {width:,}." for width in teachers]
    if len(concepts) > PROBE_FIGURES:
        text.append(f"Of {len(concepts)} concepts the first {PROBE_FIGURES} are drawn; the table has all.")
    header = ["concept", "read", "width d_S", "accuracy", "AUROC", "commoner class", "selectivity"]
    table = PageTable("All probes", header, [_cells(row) for row in rows], folded=len(rows) > 12)
    return replace(empty, text=text, figures=drawn, legend=legend(kinds), tables=[table])


def _not_probed(story: Story, empty: Section) -> Section:
    """The section without probes, with the command that trains them."""
    teacher, hook = shlex.quote(story.measurement.provenance.model), shlex.quote(story.main.hook)
    return replace(
        empty,
        missing="No probe was trained, so it is not known which concepts the students' activations still tell apart.",
        command=(
            f"tl-capacity run probe --model {teacher} --model {story.students} --hook {hook} --measurement"
            f" {story.folder} --out runs/probes\ntl-capacity report {story.folder} {story.students} runs/probes"
        ),
    )


def _accuracy_figure(rows: Sequence[ProbeRow], kinds: Sequence[str]) -> go.Figure:
    """One concept's probes and baselines, drawn as in the legend of all concepts."""
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
    ]
    series += [
        {"series": name, "width": row.width, "value": value, "baseline": True}
        for row in rows
        for name, value in ((COMMONER, row.majority), (CONTROL, row.control))
        if not row.baseline and value is not None
    ]
    figure = figures.series_figure(series, "accuracy", kinds)
    return figure.update_yaxes(rangemode="normal").update_layout(showlegend=False)


def _cells(row: ProbeRow) -> list[Cell]:
    return [
        text_cell(row.concept),
        text_cell(row.kind, "baseline" if row.baseline else row.model),
        number_cell(row.width),
        estimate_cell(row.accuracy, ".3f"),
        Cell("") if row.auroc is None else estimate_cell(row.auroc, ".3f"),
        Cell("") if row.majority is None else Cell(f"{row.majority:.3f}", order=row.majority),
        Cell("") if row.selectivity is None else estimate_cell(row.selectivity, ".3f"),
    ]
