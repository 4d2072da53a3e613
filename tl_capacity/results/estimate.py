"""Estimate: a number with its 95% interval over documents, and every bootstrap that gives such intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPLICATES = 200
"""Replicates of the bootstrap over document groups. They are few, because there are many figures and a percentile need
not be exact.
"""
CLUSTER_REPLICATES = 1_000
"""Replicates of the bootstrap over clusters of rows, whose statistics are cheap."""
MIN_GROUPS_FOR_INTERVAL = 8
"""Fewest document groups, or clusters, for an interval."""
WEIGHTS_AT_ONCE = 4_000_000
"""Rows times replicates whose weights are in memory at once: 32 MB."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over documents. `low` and `high` are None if there are too few documents."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The three numbers, null where undefined."""
        return {name: value if value is not None and isfinite(value) else None for name, value in vars(self).items()}

    def show(self, digits: str = ",.1f") -> str:
        """`value [low, high]`, or the value alone without an interval."""
        if not isfinite(self.value):
            return "undefined"
        interval = "" if self.low is None or self.high is None else f" [{self.low:{digits}}, {self.high:{digits}}]"
        return f"{self.value:{digits}}{interval}"

    def brief(self, digits: str = ",.1f") -> str:
        """The same, without an interval whose two ends both round to the value."""
        shown = self.show(digits)
        value, _, interval = shown.partition(" ")
        return value if interval == f"[{value}, {value}]" else shown

    def within(self, least: float, most: float = float("inf")) -> Estimate:
        """The same, with the interval cut to [least, most]. A shifted interval of a count or a share may leave that
        range.
        """
        low, high = (None if end is None else min(max(end, least), most) for end in (self.low, self.high))
        return Estimate(self.value, low, high)


def significant(value: float, digits: int = 4) -> str:
    """A number format with so many significant digits. The ends of the interval get as many decimals. Only tiny numbers
    get powers of ten.
    """
    if not isfinite(value) or abs(value) < 1e-4:
        return f".{digits}g"
    return f",.{max(0, digits - 1 - floor(log10(abs(value))))}f"


def document_resamples(tokens: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """How often each replicate of the document bootstrap takes each document group [replicate, group]; None if too few
    groups have a token.
    """
    occupied = np.flatnonzero(tokens)
    if len(occupied) < MIN_GROUPS_FOR_INTERVAL:
        return None
    weights = np.zeros((REPLICATES, len(tokens)))
    weights[:, occupied] = np.random.default_rng(0).multinomial(
        len(occupied), np.full(len(occupied), 1 / len(occupied)), size=REPLICATES
    )
    return weights


def group_means(sums: NDArray[np.float64], tokens: NDArray[np.int64]) -> list[Estimate]:
    """Means per token of sums over document groups [group, column], each with its interval by the document bootstrap.
    For figures that are never negative.

    Args:
        tokens: [group] tokens of each document group.
    """
    means, weights = sums.sum(0) / tokens.sum(), document_resamples(tokens)
    if weights is None:
        return [Estimate(max(0.0, float(mean))) for mean in means]
    replicates = (weights @ sums) / (weights @ tokens)[:, None]
    return [
        estimate_around(max(0.0, float(mean)), column).within(0.0)
        for mean, column in zip(means, replicates.T, strict=True)
    ]


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    clusters: NDArray[Any],
    seed: int = 0,
    replicates: int = CLUSTER_REPLICATES,
) -> Estimate:
    """A statistic of weighted rows, with its 95% percentile interval when whole clusters are drawn with replacement. No
    interval below eight clusters.

    Args:
        statistic: maps weights of the rows [replicate, row] to the statistic of each replicate [replicate], NaN where
            it is not defined.
        clusters: the cluster of each row [row], such as the number of its document.
    """
    unique, cluster_of_row = np.unique(clusters, return_inverse=True)
    value = float(statistic(np.ones((1, len(clusters))))[0])
    if len(unique) < MIN_GROUPS_FOR_INTERVAL:
        return Estimate(value)
    random, parts, left = np.random.default_rng(seed), [], replicates
    while left > 0:
        size = min(left, max(1, WEIGHTS_AT_ONCE // len(clusters)))
        drawn = random.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=size)
        parts.append(statistic(drawn[:, cluster_of_row].astype(np.float64)))
        left -= size
    values = np.concatenate(parts)
    defined = values[np.isfinite(values)]
    if len(defined) < replicates // 2:
        return Estimate(value)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def standard_errors(
    statistics: Callable[[NDArray[np.int64]], NDArray[np.float64]], points: int, replicates: int, seed: int = 0
) -> NDArray[np.float64]:
    """Standard errors [statistic] by a bootstrap over points; NaN if there is only one point.

    Args:
        statistics: maps the places of the points that count, some of them repeated, to the statistics [statistic].
    """
    places, random = np.arange(points), np.random.default_rng(seed)
    if points < 2:
        return np.full(len(statistics(places)), np.nan)
    return np.asarray(np.std([statistics(random.choice(places, points)) for _ in range(replicates)], axis=0, ddof=1))


def estimate_around(value: float, replicates: NDArray[np.float64]) -> Estimate:
    """An estimate with the 95% percentile interval of its replicates [replicate].

    The replicates are shifted so that their mean lies on the estimate: a resample repeats some documents and leaves
    others out, so rare features vanish from it and counts of features come out low.
    """
    defined = replicates[
        np.isfinite(replicates)
    ]  # a resample may miss every document on which the statistic is defined
    if len(defined) < 0.9 * len(replicates) or not isfinite(value):
        return Estimate(float(value))
    low, high = np.percentile(defined, [2.5, 97.5]) - defined.mean()
    return Estimate(float(value), float(value + min(low, 0)), float(value + max(high, 0)))


def percentile_interval(replicates: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% percentile interval of replicates [replicate]."""
    low, high = np.quantile(replicates, [0.025, 0.975])
    return float(low), float(high)


def percentile_estimate(value: float, replicates: NDArray[np.float64]) -> Estimate:
    """An estimate with the 95% percentile interval of its replicates [replicate], unchanged."""
    return Estimate(float(value), *percentile_interval(replicates))


def group_resamples(groups: NDArray[Any]) -> NDArray[np.float64]:
    """How often each replicate of a bootstrap over groups counts each point [replicate, point].

    Groups are drawn with replacement, and then points within each group that was drawn. Where there are several groups,
    a replicate has at least two different ones, because nothing can be fitted to one.

    Args:
        groups: [point] the group of each point.
    """
    random = np.random.default_rng(0)
    points_of = {group: np.flatnonzero(groups == group) for group in np.unique(groups)}
    names = np.array(list(points_of))
    counts: list[NDArray[np.int64]] = []
    while len(counts) < REPLICATES:
        drawn = random.choice(names, len(names))
        if len(names) == 1 or np.ptp(drawn) > 0:
            points = np.concatenate([random.choice(points_of[group], len(points_of[group])) for group in drawn])
            counts.append(np.bincount(points, minlength=len(groups)))
    return np.array(counts, dtype=np.float64)


def block_resample(series: NDArray[np.float64], block: int, random: np.random.Generator) -> NDArray[np.float64]:
    """One replicate of a moving-block bootstrap: a series of the same length, made of blocks of neighbours."""
    n = len(series)
    starts = random.integers(0, n - block + 1, size=-(-n // block))
    return np.concatenate([series[start : start + block] for start in starts])[:n]


def pair_interval(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    replicates: int = 1000,
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic of pairs, by a bootstrap over pairs.

    A replicate on which the statistic is not defined (NaN) is left out.
    """
    draws = np.random.default_rng(0).integers(0, len(a), size=(replicates, len(a)))
    low, high = np.nanquantile([statistic(a[places], b[places]) for places in draws], [0.025, 0.975])
    return float(low), float(high)
