"""What a sweep says about the published claims, in sentences computed from it."""

from __future__ import annotations

from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.toy.judging import BANDS, PUBLISHED_ACCURACY, accuracy, at_every_sparsity, cells, packing_law, strata
from tl_capacity.toy.result import SweepResult
from tl_capacity.toy.tables import escaped, number

TRAINED = {"direct": "trained on the data", "distilled": "distilled from teachers"}
"""The kinds of students, in words."""
HOLDS = {"relative": PUBLISHED_ACCURACY, "r2": 0.9}
"""Thresholds for saying that a predictor holds: the published accuracy in its strictest reading, and R² of 0.9."""


def claims(result: SweepResult, students: Any) -> list[str]:
    """What the sweep says about the published claims, one sentence for each.

    Args:
        students: what `predictions` returned.
    """
    sentences = []
    for kind in result.settings.kinds:
        sentences += [_accuracy_claim(students, kind, seeds) for seeds in ("mean", "best")]
        try:
            law, (n, width) = packing_law(result, kind)
            sentences.append(f"Packing law, students {TRAINED[kind]}, n = {n}, d = {width}: {law}.")
        except CapacityError as problem:
            sentences.append(f"Packing law, students {TRAINED[kind]}: not fitted, {problem}.")
    return [*sentences, _diverged_claim(result.diverged)]


def _accuracy_claim(students: Any, kind: str, seeds: str) -> str:
    """Which predictors reach the published accuracy at every sparsity."""
    against = {"relative": "o", "relative_to_nothing": "L(0)"}
    listed = "; ".join(
        f"{name}, relative to {against[definition]} (at least {low:.1%})"
        for name, definition, low in at_every_sparsity(accuracy(cells(students, kind, seeds)))
    )
    return (
        f"Median accuracy above {PUBLISHED_ACCURACY:.0%} at every sparsity, students {TRAINED[kind]}, {seeds} of seeds:"
        f" {listed or 'no predictor under any definition'}."
    )


def _diverged_claim(diverged: Any) -> str:
    """How many students diverged, and the first of them."""
    if not len(diverged):
        return "No student diverged."
    first = ", ".join(
        f"{s.kind} n={s.n} α={s.alpha:g} d={s.width} seed {s.seed} (loss {s.achieved_floor:.3g})"
        for s in diverged.head(10).itertuples()
    )
    return (
        f"{len(diverged):,} students diverged and are left out of every figure: {first}{', …' * (len(diverged) > 10)}."
    )


def verdict(students: Any, table: Any, kind: str) -> str:
    """The answer in words: the theorem as a bound and as a prediction, and where each predictor holds.

    All of it is computed.
    """
    rows = cells(students, kind)
    bounding = rows[rows.refined > 0]
    bounded = int((bounding.achieved_floor + 3 * bounding.floor_error >= bounding.refined).sum())
    sentences = [
        f"**Students {TRAINED[kind]}.** The refined floor is above 0, and so bounds anything, in {len(bounding):,} of"
        f" {len(rows):,} cells; in {bounded:,} of these the mean of the seeds is not below it by more than three"
        " standard errors."
    ]
    for band, inside in strata(rows).items():
        if band in BANDS:
            row = table[(table.predictor == "refined") & (table.stratum == band)].iloc[0]
            ratio = (inside.refined / inside.achieved_floor.where(inside.achieved_floor > 0)).median()
            sentences.append(
                f"At {escaped(band)} ({len(inside):,} cells) it predicts {ratio:.0%} of what is observed in the median,"
                f" with R² {number(row.r2, '.2f')} and r {number(row.pearson_r, '.2f')}."
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
    sentences.append(f"The refined floor then holds {_listed(by_predictor.get('refined'))}.")
    others = [f"{name} {_listed(held)}" for name, held in by_predictor.items() if name != "refined"]
    sentences.append(f"Of the others, {'; '.join(others)}." if others else "None of the others holds anywhere.")
    return " ".join(sentences)


def _listed(strata_names: list[str] | None) -> str:
    """Strata in words, as they follow a verb."""
    if not strata_names:
        return "nowhere"
    return "at " + ", ".join("all cells together" if name == "all" else escaped(name) for name in strata_names)
