"""Writes a sweep's results down: `toy.md` with tables and sentences that are computed from it, `toy.json` with one
object per student, and figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_capacity import theory
from tl_capacity.errors import CapacityError
from tl_capacity.show.palette import COLOURS
from tl_capacity.storage.files import make_folder, write_bytes, write_json
from tl_capacity.toy.judging import BANDS, accuracy, at_every_sparsity, cells, packing_law, predictions, strata
from tl_capacity.toy.measures import containment
from tl_capacity.toy.predictors import Predictor, predictors
from tl_capacity.toy.result import THRESHOLDS, SweepResult

TRAINED = {"direct": "trained on the data", "distilled": "distilled from teachers"}
DEFINITIONS = {
    "relative": "median of 1 − \\|p − o\\| / o",
    "relative_to_nothing": "median of 1 − \\|p − o\\| / L(0)",
    "r2": "R² = 1 − Σ(p − o)² / Σ(o − ō)²",
    "mae": "MAE, mean of \\|p − o\\|",
    "pearson_r": "Pearson's r",
}
HOLDS = {"relative": 0.93, "r2": 0.9}
"""What is asked of a predictor that is said to hold: the published accuracy under its strictest reading, and that it
explains nine tenths of the variance.
"""
PUBLISHED = {
    (40, 0.90, 1): (0.0915, 0.0034),
    (40, 0.90, 5): (0.0462, 0.0001),
    (40, 0.90, 9): (0.0293, 0.0003),
    (20, 0.80, 4): (0.0687, 0.0013),
}
"""(n, α, d) → mean and standard deviation of the floor over 5 seeds of 10,000 steps of 1,024 samples, from
github.com/PalmeseMattia/checkerboard.
"""
DASHES, SYMBOLS = ("solid", "dash", "dot", "dashdot"), ("circle", "square", "diamond", "cross")
SHOWN = ("refined", "smooth band", "equilibrium", "measured set")


def write_report(result: SweepResult, folder: Path, command: str) -> None:
    """Write `toy.md`, `toy.json` and the figures; whatever of that name is in the folder is replaced.

    Args:
        command: what the sweep was run with.

    Raises:
        CapacityError: where figures cannot be drawn or the folder cannot be written.
    """
    make_folder(folder)
    chosen = predictors()
    students = predictions(result, chosen)
    for name, figure, (width, height) in (
        ("toy-floors", floors_figure(students), (1100, 760)),
        ("toy-predictors", predictors_figure(students), (1100, 360)),
    ):
        write_bytes(folder / f"{name}.png", _png(figure, width, height))
    write_json(folder / "toy.json", student_list(result))
    write_bytes(folder / "toy.md", markdown(result, students, chosen, command).encode())


def student_list(result: SweepResult) -> list[dict[str, Any]]:
    """`{"n", "alpha", "width", "seed", "achieved_floor", "kept"}` of each student that was trained on the data and
    converged.
    """
    students = result.students
    direct = students[(students.kind == "direct") & ~students.diverged]
    return [
        {
            "n": int(s.n),
            "alpha": float(s.alpha),
            "width": int(s.width),
            "seed": int(s.seed),
            "achieved_floor": float(s.achieved_floor),
            "kept": int(s.kept),
        }
        for s in direct.itertuples()
    ]


def claims(result: SweepResult, students: Any) -> list[str]:
    """What the sweep says about the published claims, one sentence each.

    Args:
        students: what `predictions` returned.
    """
    found = []
    for kind in result.settings.kinds:
        for seeds in ("mean", "best"):
            holds = at_every_sparsity(accuracy(cells(students, kind, seeds)))
            against = {"relative": "o", "relative_to_nothing": "L(0)"}
            listed = "; ".join(
                f"{name}, relative to {against[definition]} (at least {low:.1%})" for name, definition, low in holds
            )
            listed = listed or "no predictor under any definition"
            found.append(
                f"Median accuracy above 93% at every sparsity, students {TRAINED[kind]}, {seeds} of seeds: {listed}."
            )
        try:
            law, (n, width) = packing_law(result, kind)
            found.append(f"Packing law, students {TRAINED[kind]}, n = {n}, d = {width}: {law}.")
        except CapacityError as problem:
            found.append(f"Packing law, students {TRAINED[kind]}: not fitted, {problem}.")
    diverged = result.diverged
    if len(diverged):
        first = diverged.head(10).itertuples()
        listed = ", ".join(
            f"{s.kind} n={s.n} α={s.alpha:g} d={s.width} seed {s.seed} (loss {s.achieved_floor:.3g})" for s in first
        )
        found.append(
            f"{len(diverged)} students diverged and are left out of every figure:"
            f" {listed}{', …' if len(diverged) > 10 else ''}."
        )
    else:
        found.append("No student diverged.")
    return found


def markdown(result: SweepResult, students: Any, chosen: Sequence[Predictor], command: str) -> str:
    """The whole page."""
    s, tables = result.settings, {kind: accuracy(cells(students, kind)) for kind in result.settings.kinds}
    seconds = ", ".join(f"{stage} {value / 60:.1f} min" for stage, value in result.seconds.items())
    versions = ", ".join(
        f"{name} {version}" for name, version in result.versions.items() if name in ("tl-capacity", "torch", "numpy")
    )
    parts = [
        f"# Toy models: {s.configurations} configurations, every predictor judged",
        (
            f"`{command}`: n ∈ {_set(s.features)}, α ∈ {_set(s.alphas)}, teacher widths {_set(s.teacher_widths)}; seeds"
            f" {s.first_seed} to {s.all_seeds[-1]}; {s.steps:,} steps of Adam on {s.batch} samples that are not all"
            f" zero, learning rate {s.lr:g} falling along half a cosine; importances i^−{s.slope:g}, {s.correlation}"
            f" features; floors on {s.evaluation_rows:,} held-out samples. {len(result.students):,} students."
            f" {result.machine}; {versions}; {seconds}. This page, its figures and [toy.json](toy.json) are written by"
            " `--report` from the saved sweep; what the words mean is in [../toy.md](../toy.md)."
        ),
        "## Where the theorem holds, and where not",
        *(verdict(students, tables[kind], kind) for kind in s.kinds),
        "\n".join(f"- {claim}" for claim in claims(result, students)),
        "![Achieved and predicted floors against the student's width](toy-floors.png)",
        "![Achieved against predicted floors](toy-predictors.png)",
        "## Predictors",
        _table(["predictor", "keeps"], [[p.name, p.summary] for p in chosen]),
        "## Accuracy",
        (
            "p is the prediction, o the observed floor, L(0) = Σ Iᵢ·E[xᵢ²] the loss of keeping nothing. One observation"
            " is one configuration and width. n/a: not defined, as r is for a constant prediction. In brackets, the"
            " number of observations."
        ),
    ]
    for kind in s.kinds:
        for definition, title in DEFINITIONS.items():
            parts += [f"Students {TRAINED[kind]}, mean of seeds, {title}:", _accuracy_table(tables[kind], definition)]
        best = accuracy(cells(students, kind, "best"))
        for definition in ("relative", "relative_to_nothing", "r2"):
            parts += [
                f"Students {TRAINED[kind]}, best of seeds, {DEFINITIONS[definition]}:",
                _accuracy_table(best, definition),
            ]
    parts += ["## What the students keep", *_kept(result, students)]
    if s.distilled:
        parts += ["## Distilled students", *_distilled(students)]
    parts += ["## Floors", *_floors(students)]
    return "\n\n".join(parts) + "\n"


def verdict(students: Any, table: Any, kind: str) -> str:
    """In words: the theorem as a bound, as a prediction, and which predictors hold where; all of it computed."""
    rows = cells(students, kind)
    bounding = rows[rows.refined > 0]
    bounded = int((bounding.achieved_floor + 3 * bounding.floor_error >= bounding.refined).sum())
    sentences = [
        f"**Students {TRAINED[kind]}.** The refined floor is above 0, and so bounds anything, in {len(bounding)} of"
        f" {len(rows)} cells; in {bounded} of these the mean of the seeds is not below it by more than three standard"
        " errors."
    ]
    for band, inside in strata(rows).items():
        if band in BANDS:
            row = table[(table.predictor == "refined") & (table.stratum == band)].iloc[0]
            ratio = (inside.refined / inside.achieved_floor.where(inside.achieved_floor > 0)).median()
            sentences.append(
                f"At {_escaped(band)} ({len(inside)} cells) it predicts {ratio:.0%} of what is observed in the median,"
                f" with R² {_number(row.r2, '.2f')} and r {_number(row.pearson_r, '.2f')}."
            )
    sentences.append(
        f"Say that a predictor holds where its median of 1 − |p − o|/o exceeds {HOLDS['relative']:.0%} and its R²"
        f" {HOLDS['r2']:g}."
    )
    by_predictor = (
        table[(table.relative > HOLDS["relative"]) & (table.r2 > HOLDS["r2"])]
        .groupby("predictor", sort=False)
        .stratum.agg(list)
    )
    sentences.append(f"The refined floor then holds {_where(by_predictor.get('refined'))}.")
    others = [f"{name} {_where(where)}" for name, where in by_predictor.items() if name != "refined"]
    sentences.append(f"Of the others, {'; '.join(others)}." if others else "None of the others holds anywhere.")
    return " ".join(sentences)


def _where(names: list[str] | None) -> str:
    return (
        "nowhere"
        if not names
        else "at " + ", ".join("all cells together" if name == "all" else _escaped(name) for name in names)
    )


def _kept(result: SweepResult, students: Any) -> list[str]:
    """Tables of kept features: packing laws, overlap with theory, use of capacity."""
    laws = []
    for kind in result.settings.kinds:
        for threshold in THRESHOLDS:
            try:
                law, (n, width) = packing_law(result, kind, threshold)
                laws.append(
                    [
                        TRAINED[kind],
                        f"{threshold:g}",
                        f"{n}, {width}",
                        f"{law.a:.3f} ± {law.a_error:.3f}",
                        f"{law.b:.3f} ± {law.b_error:.3f}",
                    ]
                )
            except CapacityError:
                laws.append([TRAINED[kind], f"{threshold:g}", "n/a", "n/a", "n/a"])
    header = ["students", "stratum", "overlap with the theory's set", "ordered share", "Σ Cᵢ / d", "kept / ⌊d·g⌋"]
    lines = []
    for kind in result.settings.kinds:
        for name, rows in strata(students[students.kind == kind]).items():
            predicted = [
                theory.kept_features(int(d), a, int(n)) for n, a, d in zip(rows.n, rows.alpha, rows.width, strict=True)
            ]
            used = (rows.total_capacity / np.minimum(rows.width, rows.n)).mean()
            values = [rows.overlap.mean(), rows.ordered.mean(), used, (rows.kept / predicted).mean()]
            lines.append([TRAINED[kind], _escaped(name), *(_number(value, ".3f") for value in values)])
    return [
        (
            "Packing law ĝ = a·g(α)^b of kept features (‖Wᵢ‖² > τ) per dimension, with standard errors from resampled"
            " seeds:"
        ),
        _table(["students", "τ", "n, d", "a", "b"], laws),
        (
            "Overlap is the Jaccard index of the kept set (τ = 0.5) and the ⌊d·g(α)⌋ most important features. The"
            " ordered share says how many of the k kept features are among the k most important. Σ Cᵢ is the fractional"
            " capacity in use. Means over students:"
        ),
        _table(header, lines),
    ]


def _distilled(students: Any) -> list[str]:
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
        _table(
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
    """Floors and kept features of the students trained on the data, and beside them what others found."""
    direct = students[students.kind == "direct"]
    widths = sorted(direct.width.unique())
    by_cell = direct.groupby(["n", "alpha", "width"])
    floor, kept = by_cell.achieved_floor.agg(["mean", "std", "min"]), by_cell.kept.mean()
    nothing = by_cell.nothing.first()

    def shown(cell: tuple[Any, ...]) -> str:  # pandas' own numbers
        return f"{floor.loc[cell, 'mean']:.4f} ± {floor.loc[cell, 'std']:.4f}"

    rows = [
        [
            f"{n}",
            f"{alpha:g}",
            *(
                f"{shown((n, alpha, w))} ({floor.loc[(n, alpha, w), 'min']:.4f}; {kept[(n, alpha, w)]:.1f})"
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
        _table(["n", "α", *(f"d = {w}" for w in widths)], rows),
    ]
    known = [
        [
            f"{cell[0]}",
            f"{cell[1]:g}",
            f"{cell[2]}",
            f"{mean:.4f} ± {spread:.4f}",
            shown(cell),
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
            _table(["n", "α", "d", "replication", "here", "difference"], known),
        ]
    return parts


def floors_figure(students: Any) -> Any:
    """A panel per n and α: achieved floors against the width, from the best to the worst seed, and
    the predicted ones.
    """
    from plotly.subplots import make_subplots

    direct = students[students.kind == "direct"]
    features, alphas = sorted(direct.n.unique()), sorted(direct.alpha.unique())
    titles = [f"n = {n}, α = {alpha:g}" for n in features for alpha in alphas]
    figure = make_subplots(
        rows=len(features), cols=len(alphas), subplot_titles=titles, horizontal_spacing=0.055, vertical_spacing=0.09
    )
    for (n, alpha), panel in direct.groupby(["n", "alpha"]):
        first = n == features[0] and alpha == alphas[0]
        at = {"row": features.index(n) + 1, "col": alphas.index(alpha) + 1, "showlegend": bool(first)}
        by_width = panel.groupby("width")
        achieved = by_width.achieved_floor.agg(["mean", "min", "max"])
        spread = {
            "type": "data",
            "symmetric": False,
            "array": achieved["max"] - achieved["mean"],
            "arrayminus": achieved["mean"] - achieved["min"],
        }
        figure.add_scatter(
            x=achieved.index,
            y=achieved["mean"],
            error_y=spread,
            mode="markers",
            name="achieved: mean, best to worst seed",
            marker={"color": "black", "size": 5},
            legendgroup="a",
            **at,
        )
        for name, colour, dash in zip(SHOWN, COLOURS[: len(SHOWN)], DASHES, strict=True):
            predicted = by_width[name].mean()
            figure.add_scatter(
                x=predicted.index,
                y=predicted,
                mode="lines",
                name=name,
                line={"color": colour, "dash": dash, "width": 2},
                legendgroup=name,
                **at,
            )
        critical = theory.critical_width(float(n), float(alpha))
        if critical <= achieved.index.max():
            figure.add_vline(
                x=critical, line={"color": "grey", "dash": "dot", "width": 1}, row=at["row"], col=at["col"]
            )
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title="width d (dotted: d*)", row=len(features))
    figure.update_yaxes(title="floor", col=1)
    return figure


def predictors_figure(students: Any) -> Any:
    """A panel per predictor: achieved against predicted floor, as shares of the loss of keeping nothing; on the
    diagonal the prediction is true.
    """
    from plotly.subplots import make_subplots

    rows = cells(students)
    figure = make_subplots(cols=len(SHOWN), subplot_titles=SHOWN, horizontal_spacing=0.05, shared_yaxes=True)
    for column, name in enumerate(SHOWN, start=1):
        figure.add_scatter(
            x=[0, 1], y=[0, 1], mode="lines", line={"color": "grey", "width": 1}, showlegend=False, row=1, col=column
        )
        for i, (alpha, chosen) in enumerate(rows.groupby("alpha")):
            marker = {"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 6}
            x, y = chosen[name] / chosen.nothing, chosen.achieved_floor / chosen.nothing
            figure.add_scatter(
                x=x,
                y=y,
                mode="markers",
                marker=marker,
                name=f"α = {alpha:g}",
                legendgroup=f"{alpha:g}",
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(title="predicted / L(0)")
    figure.update_yaxes(title="achieved / L(0)", col=1)
    return figure


def _png(figure: Any, width: int, height: int) -> bytes:
    figure.update_layout(
        template="plotly_white",
        font={"size": 12},
        legend={"orientation": "h", "y": -0.1 if height > 500 else -0.25},
        margin={"l": 60, "r": 20, "t": 40, "b": 40},
    )
    try:
        return bytes(figure.to_image("png", width=width, height=height, scale=1.5))
    except (ImportError, ValueError, RuntimeError) as problem:
        raise CapacityError(
            f"figures cannot be drawn ({str(problem).strip().splitlines()[0]}): install kaleido and Chromium, or leave"
            " --report out"
        ) from problem


def pivot(table: Any, definition: str) -> tuple[list[str], list[list[str]]]:
    """One accuracy as header and rows of text: predictors down, strata across."""
    wide = table.pivot(index="predictor", columns="stratum", values=definition)
    names, columns = table.predictor.unique(), table.stratum.unique()
    shown = ".5f" if definition == "mae" else ".3f"
    return ["predictor", *columns], [
        [name, *(_number(wide.loc[name, column], shown) for column in columns)] for name in names
    ]


def _accuracy_table(table: Any, definition: str) -> str:
    counts = table.groupby("stratum")["count"].first()
    header, rows = pivot(table, definition)
    return _table([header[0], *(f"{_escaped(name)} ({counts[name]})" for name in header[1:])], rows)


def _number(value: float, shown: str) -> str:
    return "n/a" if np.isnan(value) else f"{value:{shown}}".replace("-", "−")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _set(values: Sequence[int] | Sequence[float]) -> str:
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"


def _escaped(text: str) -> str:
    """Text in which Markdown sees no emphasis."""
    return text.replace("*", "\\*")
