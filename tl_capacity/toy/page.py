"""The page on a sweep, `toy.md`, as Markdown: the sweep, what it says of the claims, and all tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tl_capacity import theory
from tl_capacity.errors import CapacityError
from tl_capacity.toy.claims import TRAINED, claims, verdict
from tl_capacity.toy.judging import accuracy, cells, packing_law, strata
from tl_capacity.toy.measures import containment
from tl_capacity.toy.predictors import Predictor
from tl_capacity.toy.result import THRESHOLDS, SweepResult
from tl_capacity.toy.tables import accuracy_table, escaped, markdown_table, number, value_set

DEFINITIONS = {
    "relative": "median of 1 − \\|p − o\\| / o",
    "relative_to_nothing": "median of 1 − \\|p − o\\| / L(0)",
    "r2": "R² = 1 − Σ(p − o)² / Σ(o − ō)²",
    "mae": "MAE, mean of \\|p − o\\|",
    "pearson_r": "Pearson's r",
}
"""How each accuracy is computed, with p the prediction and o the observed floor."""
PUBLISHED = {
    (40, 0.90, 1): (0.0915, 0.0034),
    (40, 0.90, 5): (0.0462, 0.0001),
    (40, 0.90, 9): (0.0293, 0.0003),
    (20, 0.80, 4): (0.0687, 0.0013),
}
"""(n, α, d) → mean and standard deviation of the floor over 5 seeds of 10,000 steps of 1,024 samples, from
github.com/PalmeseMattia/checkerboard.
"""


def markdown(result: SweepResult, students: Any, chosen: Sequence[Predictor], command: str) -> str:
    """The whole page.

    Args:
        students: what `predictions` returned.
        chosen: the predictors that are judged.
        command: what the sweep was run with.
    """
    s, tables = result.settings, {kind: accuracy(cells(students, kind)) for kind in result.settings.kinds}
    parts = [
        f"# Toy models: {s.configurations} configurations, every predictor judged",
        _what_was_run(result, command),
        "## Where the theorem holds, and where not",
        *(verdict(students, tables[kind], kind) for kind in s.kinds),
        "\n".join(f"- {claim}" for claim in claims(result, students)),
        "![Achieved and predicted floors against the student's width](toy-floors.png)",
        "![Achieved against predicted floors](toy-predictors.png)",
        "## Predictors",
        markdown_table(["predictor", "keeps"], [[p.name, p.summary] for p in chosen]),
        "## Accuracy",
        (
            "p is the prediction, o the observed floor, L(0) = Σ Iᵢ·E[xᵢ²] the loss of keeping nothing. One observation"
            " is one configuration and width. n/a: not defined, as r is for a constant prediction. In brackets, the"
            " number of observations."
        ),
    ]
    for kind in s.kinds:
        parts += _accuracies(tables[kind], DEFINITIONS, f"Students {TRAINED[kind]}, mean of seeds")
        best = accuracy(cells(students, kind, "best"))
        parts += _accuracies(
            best, ("relative", "relative_to_nothing", "r2"), f"Students {TRAINED[kind]}, best of seeds"
        )
    parts += ["## What the students keep", *_packing_laws(result), *_kept_sets(students, s.kinds)]
    if s.distilled:
        parts += ["## Distilled students", *_distilled(students)]
    parts += ["## Floors", *_floors(students)]
    return "\n\n".join(parts) + "\n"


def _what_was_run(result: SweepResult, command: str) -> str:
    s = result.settings
    seconds = ", ".join(f"{stage} {value / 60:.1f} min" for stage, value in result.seconds.items())
    versions = ", ".join(
        f"{name} {version}" for name, version in result.versions.items() if name in ("tl-capacity", "torch", "numpy")
    )
    return (
        f"`{command}`: n ∈ {value_set(s.features)}, α ∈ {value_set(s.alphas)}, teacher widths"
        f" {value_set(s.teacher_widths)}; seeds {s.first_seed} to {s.all_seeds[-1]}; {s.steps:,} steps of Adam on"
        f" {s.batch} samples that are not all zero, learning rate {s.lr:g} falling along half a cosine; importances"
        f" i^−{s.slope:g}, {s.correlation} features; floors on {s.evaluation_rows:,} held-out samples."
        f" {len(result.students):,} students. {result.machine}; {versions}; {seconds}. This page, its figures and"
        " [toy.json](toy.json) are written by `--report` from the saved sweep; what the words mean is in"
        " [../about-toy-models.md](../about-toy-models.md)."
    )


def _accuracies(table: Any, definitions: Iterable[str], whose: str) -> list[str]:
    """A heading and a table for each definition of accuracy."""
    return [
        text
        for definition in definitions
        for text in (f"{whose}, {DEFINITIONS[definition]}:", accuracy_table(table, definition))
    ]


def _packing_laws(result: SweepResult) -> list[str]:
    """The packing laws at each threshold."""
    rows = []
    for kind in result.settings.kinds:
        for threshold in THRESHOLDS:
            try:
                law, (n, width) = packing_law(result, kind, threshold)
                a, b = f"{law.a:.3f} ± {law.a_error:.3f}", f"{law.b:.3f} ± {law.b_error:.3f}"
                rows.append([TRAINED[kind], f"{threshold:g}", f"{n}, {width}", a, b])
            except CapacityError:
                rows.append([TRAINED[kind], f"{threshold:g}", "n/a", "n/a", "n/a"])
    return [
        (
            "Packing law ĝ = a·g(α)^b of kept features (‖Wᵢ‖² > τ) per dimension, with standard errors from resampled"
            " seeds:"
        ),
        markdown_table(["students", "τ", "n, d", "a", "b"], rows),
    ]


def _kept_sets(students: Any, kinds: Sequence[str]) -> list[str]:
    """Which features are kept, beside those of the theory, and how much of the capacity is used."""
    lines = []
    for kind in kinds:
        for name, rows in strata(students[students.kind == kind]).items():
            predicted = [
                theory.kept_features(int(d), a, int(n)) for n, a, d in zip(rows.n, rows.alpha, rows.width, strict=True)
            ]
            used = (rows.total_capacity / np.minimum(rows.width, rows.n)).mean()
            values = [rows.overlap.mean(), rows.ordered.mean(), used, (rows.kept / predicted).mean()]
            lines.append([TRAINED[kind], escaped(name), *(number(value, ".3f") for value in values)])
    header = ["students", "stratum", "overlap with the theory's set", "ordered share", "Σ Cᵢ / d", "kept / ⌊d·g⌋"]
    return [
        (
            "Overlap is the Jaccard index of the kept set (τ = 0.5) and the ⌊d·g(α)⌋ most important features. The"
            " ordered share says how many of the k kept features are among the k most important. Σ Cᵢ is the fractional"
            " capacity in use. Means over students:"
        ),
        markdown_table(header, lines),
    ]


def _distilled(students: Any) -> list[str]:
    """Whether distilled students keep what their teachers keep, and how their floors differ from those trained on the
    data.
    """
    distilled, direct = students[students.kind == "distilled"], students[students.kind == "direct"]
    contained = distilled.contained.dropna()
    whole = int((contained == 1).sum())
    paired = distilled.merge(direct, on=["n", "alpha", "width", "seed"], suffixes=("", "_direct"))
    of_teacher = {(s.n, s.alpha, s.width, s.seed): s.kept_set for s in direct.itertuples()}
    teachers = zip(paired.n, paired.alpha, paired.teacher_width, paired.seed, strict=True)
    paired["contained_direct"] = [
        containment(kept, of_teacher[teacher]) if teacher in of_teacher else float("nan")
        for kept, teacher in zip(paired.kept_set_direct, teachers, strict=True)
    ]
    share = paired.width / paired.teacher_width
    lines = []
    for name, inside in (
        ("d_S < d_T/2", share < 0.5),
        ("d_T/2 ≤ d_S < d_T", (share >= 0.5) & (share < 1)),
        ("d_S = d_T", share == 1),
    ):
        chosen = paired[inside]
        if len(chosen):
            ratio = (chosen.achieved_floor / chosen.achieved_floor_direct).replace([np.inf, -np.inf], np.nan)
            lines.append(
                [
                    name.replace("_", "\\_"),
                    f"{len(chosen):,}",
                    *(f"{q:.3f}" for q in ratio.quantile([0.25, 0.5, 0.75])),
                    f"{(chosen.kept - chosen.kept_direct).mean():+.2f}".replace("-", "−"),
                    f"{chosen.contained.mean():.4f}",
                    f"{chosen.contained_direct.mean():.4f}",
                ]
            )
    return [
        (
            f"**Teacher containment.** {whole:,} of {len(contained):,} distilled students keep only features that their"
            f" teacher keeps; the mean share of kept features that it keeps as well is {contained.mean():.4f}, the"
            f" lowest {contained.min():.3f}."
        ),
        (
            "Against the student of the same size and seed that was trained on the data itself. It never saw the"
            " teacher, so the share of its features that the teacher keeps is what containment would be by itself; at"
            " d\\_S = d\\_T it is the teacher."
        ),
        markdown_table(
            [
                "width",
                "students",
                "ratio of floors, first quartile",
                "median",
                "third quartile",
                "kept features more",
                "contained",
                "contained, trained on the data",
            ],
            lines,
        ),
    ]


def _floors(students: Any) -> list[str]:
    """Floors and kept features of the students trained on the data, beside an independent replication."""
    direct = students[students.kind == "direct"]
    widths = sorted(direct.width.unique())
    by_cell = direct.groupby(["n", "alpha", "width"])
    floor, kept = by_cell.achieved_floor.agg(["mean", "std", "min"]), by_cell.kept.mean()
    nothing = by_cell.nothing.first()

    def mean_and_spread(cell: tuple[Any, ...]) -> str:  # pandas' own numbers
        return f"{floor.loc[cell, 'mean']:.4f} ± {floor.loc[cell, 'std']:.4f}"

    rows = [
        [
            f"{n}",
            f"{alpha:g}",
            *(
                f"{mean_and_spread((n, alpha, w))} ({floor.loc[(n, alpha, w), 'min']:.4f}; {kept[(n, alpha, w)]:.1f})"
                for w in widths
            ),
        ]
        for n, alpha in direct.groupby(["n", "alpha"]).groups
    ]
    excess = floor["mean"] - floor["min"]
    error = (direct.floor_error / direct.achieved_floor).median()
    parts = [
        (
            "Students trained on the data: mean ± standard deviation over seeds (best seed; kept features at τ = 0.5)."
            " Some seeds stay in local minima: the mean exceeds the best seed by"
            f" {(excess / floor['min']).median():.1%} in the median, and by {(excess / nothing).max():.1%} of the loss"
            f" of keeping nothing at most. The Monte-Carlo error of one floor is {error:.2%} of it in the median."
        ),
        markdown_table(["n", "α", *(f"d = {w}" for w in widths)], rows),
    ]
    known = [
        [
            f"{cell[0]}",
            f"{cell[1]:g}",
            f"{cell[2]}",
            f"{mean:.4f} ± {spread:.4f}",
            mean_and_spread(cell),
            f"{floor.loc[cell, 'mean'] / mean - 1:+.1%}".replace("-", "−"),
        ]
        for cell, (mean, spread) in PUBLISHED.items()
        if cell in floor.index
    ]
    if known:
        parts += [
            (
                "Beside an [independent replication](https://github.com/PalmeseMattia/checkerboard) (5 seeds, 10,000"
                " steps of 1,024 samples):"
            ),
            markdown_table(["n", "α", "d", "replication", "here", "difference"], known),
        ]
    return parts
