"""Figures of probes and of recoverability against the student's width. Seeds of one width are not joined by a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from tl_capacity.plugins import plugins
from tl_capacity.probing.recovery_row import COUNTS, RecoveryRow
from tl_capacity.probing.rows import COMPONENTS, EMBEDDINGS, RANDOM, TRAINED, ProbedConcept, ProbeRow
from tl_capacity.results.estimate import Estimate
from tl_capacity.show.figures import GREY, add_series, legend_entry, line_of, new_figure
from tl_capacity.show.palette import BLUE, GREEN, PURPLE, VERMILION

SHOWN = (
    ("student", BLUE, "circle"),
    ("student with random weights", VERMILION, "square"),
    ("teacher's principal components, as many as d", GREEN, "diamond"),
    ("teacher", PURPLE, "cross"),
)
KINDS = {TRAINED: (BLUE, "circle"), RANDOM: (VERMILION, "square"), COMPONENTS: (GREEN, "diamond")}
LEVELS = {"majority": ("dot", "cross"), "control task (teacher)": ("dashdot", "x"), EMBEDDINGS: ("dash", "star")}
"""Dash and symbol of what does not depend on width. With a single width, only the symbol shows."""
PANELS_IN_A_ROW = 4
DASHES = ("dash", "dot", "dashdot", "longdash")
"""Dashes of the budgets' lines; the default law's comes first."""


def thresholds_figure(
    kept: Mapping[str, Mapping[float, float]], limits: Mapping[str, Mapping[float, float]], taus: Sequence[float]
) -> go.Figure:
    """How many features are kept at each τ, one line for each student.

    Grey lines show what students are compared with. The requested τ are marked.
    """
    figure = new_figure()
    for place, (label, counts) in enumerate(kept.items()):
        figure.add_scatter(
            x=list(counts), y=list(counts.values()), mode="lines", line=line_of(place), **legend_entry(label)
        )
    for dash, (label, counts) in zip(("dash", "dot"), limits.items(), strict=False):
        figure.add_scatter(
            x=list(counts),
            y=list(counts.values()),
            mode="lines",
            line={"color": GREY, "dash": dash, "width": 2},
            **legend_entry(label),
        )
    for tau in taus:
        annotation = {"text": f"τ = {tau:g}", "font": {"size": 10}}
        figure.add_vline(x=tau, line={"color": GREY, "width": 2}, annotation=annotation, annotation_position="top left")
    figure.update_xaxes(title="τ (least AUROC of a kept feature)")
    figure.update_yaxes(title="features kept", rangemode="tozero")
    return figure


def recoverability_figure(panels: Sequence[Sequence[RecoveryRow]]) -> Any:
    """The figure of features kept against width, from the rows of each hook point."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        cols=len(panels), subplot_titles=[rows[0].hook for rows in panels], shared_yaxes=True, horizontal_spacing=0.04
    )
    for column, rows in enumerate(panels, start=1):
        at = {"row": 1, "col": column, "showlegend": column == 1}
        for key, (name, colour, symbol) in zip(COUNTS.values(), SHOWN, strict=True):
            counted = [row for row in rows if key in row.counts]
            add_series(
                figure,
                [row.width for row in counted],
                [row.counts[key] for row in counted],
                name,
                {"color": colour},
                {"color": colour, "symbol": symbol, "size": 8},
                **at,
            )
        laws = dict.fromkeys(law for row in rows for law in row.budgets)
        for law, dash in zip(laws, cycle(DASHES), strict=False):
            limited = [row for row in rows if law in row.budgets]
            # With a single width there is no line, only the marker.
            add_series(
                figure,
                [row.width for row in limited],
                [Estimate(float(min(row.budgets[law].value, row.n_features))) for row in limited],
                "d·g(α), at most F" if law == plugins().capacity_laws.default.name else f"{law} law",
                {"color": "black", "dash": dash},
                {"color": "black", "symbol": "line-ew-open", "size": 9},
                **at,
            )
    figure.update_xaxes(title="student width d_S (dimensions)")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=f"features with AUROC ≥ τ = {panels[0][0].tau:g}", col=1)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.2})
    return figure


def accuracy_figure(probe_rows: Sequence[ProbeRow], concepts: Sequence[ProbedConcept]) -> Any:
    """Accuracy against width, one panel for each concept, with 95% intervals.

    Models and baselines of the same widths are points. What does not depend on width is a line; the bag of embeddings
    has its own interval at both ends.
    """
    from plotly.subplots import make_subplots

    columns = min(PANELS_IN_A_ROW, len(concepts))
    n_rows = -(-len(concepts) // columns)
    titles = [" or ".join(concept.classes) for concept in concepts]
    figure = make_subplots(
        rows=n_rows, cols=columns, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.3 / n_rows
    )
    widths = sorted({row.width for row in probe_rows if row.kind == TRAINED})
    for i, concept in enumerate(concepts):
        at = {"row": i // columns + 1, "col": i % columns + 1, "showlegend": i == 0}
        rows = [row for row in probe_rows if row.concept == concept.name]
        for kind, (colour, symbol) in KINDS.items():
            shown = [row for row in rows if row.kind == kind]
            add_series(
                figure,
                [row.width for row in shown],
                [row.accuracy for row in shown],
                kind,
                {"color": colour},
                {"color": colour, "symbol": symbol},
                **at,
            )
        for name, value in _levels(rows).items():
            dash, symbol = LEVELS[name]
            add_series(
                figure,
                [widths[0], widths[-1]],
                [value] * 2,
                name,
                {"color": "gray", "dash": dash},
                {"color": "gray", "symbol": symbol},
                **at,
            )
    figure.update_xaxes(title={"text": "width (dimensions)", "standoff": 2}, type="log", tickvals=widths)
    figure.update_yaxes(range=[0.4, 1.02])
    figure.update_yaxes(title="accuracy", col=1)
    figure.update_layout(
        template="plotly_white",
        height=130 + 260 * n_rows,
        legend={"orientation": "h", "y": 1 + 0.2 / n_rows, "yanchor": "bottom"},
    )
    return figure


def _levels(rows: Sequence[ProbeRow]) -> dict[str, Estimate]:
    """The rows of one concept that do not depend on width, by the names in `LEVELS`."""
    teacher = next(row for row in rows if row.kind == TRAINED)
    levels = {"majority": teacher.majority, "control task (teacher)": teacher.control}
    known = {name: Estimate(level) for name, level in levels.items() if level is not None}
    return known | {row.kind: row.accuracy for row in rows if row.kind == EMBEDDINGS}
