"""Judges predictors against the floors that toy models reached, by several definitions of accuracy, and fits the
packing law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import CapacityError
from tl_capacity.results.estimate import standard_errors
from tl_capacity.toy.features import FeatureDistribution, zipf_importance
from tl_capacity.toy.predictors import Case, Predictor, predictors
from tl_capacity.toy.result import SweepResult

TRANSITION = "0.8 ≤ d/d* ≤ 1.2"
BANDS = {"d/d* < 0.8": (0.0, 0.8), TRANSITION: (0.8, 1.2), "d/d* > 1.2": (1.2, np.inf)}
"""Below, around and above the critical width. The middle band includes both ends."""
PUBLISHED_ACCURACY = 0.93
"""The paper's claim of a predictor's median accuracy, at every sparsity."""
ACCURACIES = ("relative", "relative_to_nothing", "r2", "mae", "pearson_r")
CELL = ["n", "alpha", "teacher_width", "width"]
"""Columns that are the same for all seeds of a student."""
SATURATED = 0.9
"""Models that keep a larger share of all features than this do not show how many fit."""
RESAMPLES = 1000


def predictions(result: SweepResult, chosen: Sequence[Predictor] | None = None) -> Any:
    """The converged students of a sweep as a pandas DataFrame, with one more column for each predictor."""
    chosen = predictors() if chosen is None else chosen
    students = result.students[~result.students.diverged].reset_index(drop=True)
    settings = result.settings
    cases = []
    columns = students[["n", "alpha", "width", "teacher_width", "kept_set"]]
    for n, alpha, width, teacher_width, kept in columns.itertuples(index=False):
        distribution, importance = (
            FeatureDistribution(n, alpha, settings.correlation),
            zipf_importance(n, settings.slope),
        )
        second_moment, variance = importance * distribution.second_moment, importance * distribution.variance
        cases.append(Case(second_moment, variance, alpha, width, kept, teacher_width))
    return students.assign(**{p.name: [p.predict(case) for case in cases] for p in chosen})


def cells(students: Any, kind: str = "direct", seeds: str = "mean") -> Any:
    """One row for each configuration and width: the mean of every number over seeds, or the row of the best seed.

    Args:
        students: what `predictions` returned.
        kind: direct or distilled.
        seeds: `mean`, or `best` for the seed with the lowest achieved floor.

    Raises:
        ValueError: on another value of `seeds`.
    """
    if seeds not in ("mean", "best"):
        raise ValueError(f"seeds = {seeds!r} is not a way to combine seeds: choose mean or best")
    chosen = students[students.kind == kind].drop(columns="kept_set")
    if seeds == "best":
        return chosen.loc[chosen.groupby(CELL).achieved_floor.idxmin()].reset_index(drop=True)
    return chosen.drop(columns="kind").groupby(CELL, as_index=False).mean()


def accuracy(rows: Any, names: Sequence[str] | None = None) -> Any:
    """The accuracy of each predictor over all rows, by α, and by band of d/d*.

    With prediction p, observation o and L(0) = Σ Iᵢ·E[xᵢ²], the loss of keeping nothing:
    `relative` is the median of 1 − |p−o|/o, `relative_to_nothing` the median of 1 − |p−o|/L(0), `r2` is 1 −
    Σ(p−o)²/Σ(o−ō)², `mae` the mean of |p−o|, and `pearson_r` Pearson's correlation of p with o. What is not defined,
    such as r for a constant prediction, is NaN.

    Args:
        rows: students or cells that carry predictions.
        names: of the predictors; by default all that say something of these rows.

    Returns:
        A pandas DataFrame with the columns `predictor`, `stratum`, `count` and the five accuracies.
    """
    import pandas

    names = said(rows, predictors()) if names is None else names
    judged = [
        {
            "predictor": name,
            "stratum": stratum,
            "count": len(chosen),
            **_accuracies(chosen[name], chosen.achieved_floor, chosen.nothing),
        }
        for name in names
        for stratum, chosen in strata(rows).items()
    ]
    return pandas.DataFrame(judged, columns=["predictor", "stratum", "count", *ACCURACIES])


def said(rows: Any, chosen: Sequence[Predictor]) -> list[str]:
    """Names of the predictors that predict at least one row; all names if there are no rows.

    A law that needs the teacher's width says nothing of students trained on the data itself.
    """
    return [predictor.name for predictor in chosen if not len(rows) or rows[predictor.name].notna().any()]


def strata(rows: Any) -> dict[str, Any]:
    """All rows, the rows of each α, and those of each band of d/d*. Empty strata are left out."""
    ratio = rows.width / [
        theory.critical_width(n, alpha) for n, alpha in zip(rows.n.astype(float), rows.alpha, strict=True)
    ]
    parts = {"all": rows}
    parts |= {f"α = {alpha:g}": rows[rows.alpha == alpha] for alpha in sorted(rows.alpha.unique())}
    bands = {
        name: ((ratio >= low) & (ratio <= high)) if name == TRANSITION else ((ratio > low) & (ratio < high))
        for name, (low, high) in BANDS.items()
    }
    parts |= {name: rows[inside] for name, inside in bands.items()}
    return {name: chosen for name, chosen in parts.items() if len(chosen)}


def at_every_sparsity(table: Any, threshold: float = PUBLISHED_ACCURACY) -> list[tuple[str, str, float]]:
    """`(predictor, definition, lowest value)` for which the published claim holds.

    It holds if the median accuracy exceeds the threshold at every α.
    """
    by_alpha = table[table.stratum.str.startswith("α")]
    lowest = by_alpha.groupby("predictor", sort=False)[["relative", "relative_to_nothing"]].min()
    return [
        (str(name), definition, float(lowest.loc[name, definition]))
        for definition in ("relative", "relative_to_nothing")
        for name in lowest.index
        if lowest.loc[name, definition] > threshold
    ]


def _accuracies(predicted: Any, observed: Any, nothing: Any) -> dict[str, float]:
    from scipy.stats import pearsonr

    p, o, most = (np.asarray(values, dtype=np.float64) for values in (predicted, observed, nothing))
    error, spread = np.abs(p - o), ((o - o.mean()) ** 2).sum()
    positive = o > 0
    varies = len(p) > 1 and np.ptp(p) > 0 and np.ptp(o) > 0
    return {
        "relative": float(np.median(1 - error[positive] / o[positive])) if positive.any() else float("nan"),
        "relative_to_nothing": float(np.median(1 - error / most)),
        "r2": float(1 - (error**2).sum() / spread) if spread > 0 else float("nan"),
        "mae": float(error.mean()),
        "pearson_r": float(pearsonr(p, o).statistic) if varies else float("nan"),
    }


@dataclass(frozen=True)
class PackingLaw:
    """ĝ = a·g(α)^b, the number of features that trained models keep per dimension, with bootstrap standard errors over
    seeds.

    Attributes:
        alphas, packing: what was fitted: the mean of kept features over d, at each α.
    """

    a: float
    b: float
    a_error: float
    b_error: float
    alphas: tuple[float, ...]
    packing: tuple[float, ...]

    def __str__(self) -> str:
        return f"ĝ = ({self.a:.2f} ± {self.a_error:.2f})·g(α)^({self.b:.2f} ± {self.b_error:.2f})"


def fit_packing_law(
    alpha: Float[np.ndarray, " cell"],
    packing: Float[np.ndarray, "seed cell"],
    resamples: int = RESAMPLES,
    random_seed: int = 0,
) -> PackingLaw:
    """Fit ĝ = a·g(α)^b by least squares of ln ĝ against ln g(α).

    Args:
        alpha: α of each cell (a model size); cells of one α are averaged.
        packing: kept features per dimension, of each seed; a seed with a NaN, for a model that did not converge, is
            left out.
        resamples: bootstrap samples of the seeds, drawn with replacement.

    Raises:
        CapacityError: where fewer than two sparsities have a model that keeps something.
    """
    packing = packing[~np.isnan(packing).any(axis=1)]
    values = np.unique(alpha)
    log_g = np.log([theory.capacity(float(value)) for value in values])

    def averages(seeds: NDArray[np.int_]) -> NDArray[np.float64]:
        chosen = packing[seeds]
        return np.array([chosen[:, alpha == value].mean() for value in values])

    def fit(seeds: NDArray[np.int_]) -> NDArray[np.float64]:
        b, log_a = np.polyfit(log_g, np.log(averages(seeds)), 1)
        return np.array([np.exp(log_a), b])

    everyone = np.arange(len(packing))
    if not len(packing):
        raise CapacityError(
            "no seed converged at every sparsity, so no packing law can be fitted: sweep more seeds, or choose a"
            " smaller learning rate"
        )
    if len(values) < 2:
        raise CapacityError(
            f"models of {len(values)} sparsities keep features, but a packing law needs at least two: sweep more values"
            " of α"
        )
    if not (averages(everyone) > 0).all():
        raise CapacityError(
            "models of one sparsity keep no feature, and a packing law fits logarithms: train for longer, or at other"
            " values of α"
        )
    a, b = fit(everyone)
    errors = standard_errors(fit, len(packing), resamples, random_seed)
    return PackingLaw(
        float(a),
        float(b),
        float(errors[0]),
        float(errors[1]),
        tuple(values.tolist()),
        tuple(averages(everyone).tolist()),
    )


def packing_law(
    result: SweepResult, kind: str = "direct", threshold: float | None = None
) -> tuple[PackingLaw, tuple[int, int]]:
    """The packing law of a sweep's students of one size, and that size (n, d).

    It is the widest size of the largest n that keeps nearly all features at no sparsity.

    Narrower students are limited by their few dimensions and not by the sparsity: of width 1 all keep an antipodal
    pair.

    Args:
        threshold: τ of ‖Wᵢ‖² > τ, one of `result.THRESHOLDS`; by default 0.5.

    Raises:
        CapacityError: where there is no such size, and as `fit_packing_law`.
    """
    students = result.students[~result.students.diverged & (result.students.kind == kind)]
    column = "kept" if threshold is None else f"kept_{threshold:g}"
    fullest = students.groupby(CELL)[column].mean().groupby(["n", "teacher_width", "width"]).max()
    free = [size for size, kept in fullest.items() if kept <= SATURATED * size[0]]
    if not free:
        raise CapacityError(
            "models of every size keep nearly all features, so none shows how many fit: sweep more features or"
            " narrower students"
        )
    n, teacher_width, width = max(free)
    chosen = students[(students.n == n) & (students.teacher_width == teacher_width) & (students.width == width)]
    table = chosen.pivot(index="seed", columns="alpha", values=column)
    return fit_packing_law(np.asarray(table.columns, dtype=np.float64), np.asarray(table, dtype=np.float64) / width), (
        int(n),
        int(width),
    )
