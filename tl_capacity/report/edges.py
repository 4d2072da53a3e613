"""Which features a student of some width keeps and loses first, and what is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tl_capacity.interfaces import CapacityLaw
from tl_capacity.predict.floors import sparsity
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.summary import Resample

SHOWN = 8
"""Features on each side of a budget."""


@dataclass(frozen=True)
class Edge:
    """The features on both sides of a student's budget at one hook point.

    Attributes:
        width: d_S.
        n_kept, n_lost: F_S and F − F_S.
        kept: latents that are just kept, the least important last.
        lost: latents that are lost first, the most important first.
    """

    width: int
    n_kept: int
    n_lost: int
    kept: tuple[int, ...]
    lost: tuple[int, ...]


@dataclass(frozen=True)
class ShownFeature:
    """One latent: its rank, importance and firing rate, with intervals over documents.

    The rank is 1 plus the number of alive features that are more important.
    """

    latent: int
    rank: Estimate
    importance: Estimate
    rate: Estimate


def edges(
    hook: HookMeasurement, widths: Sequence[int], importance: str | None, law: CapacityLaw, shown: int = SHOWN
) -> list[Edge]:
    """The features on both sides of the budget of each width.

    Raises:
        CapacityError: where the hook point has no sparsity.
    """
    at, order = context_at(hook, hook.importance(importance), sparsity(hook)), hook.ranked(importance)
    return [
        Edge(
            width,
            kept,
            len(order) - kept,
            tuple(order[max(0, kept - shown) : kept].tolist()),
            tuple(order[kept : kept + shown].tolist()),
        )
        for width in widths
        for kept in [kept_features(law, width, at)]
    ]


def shown_features(hook: HookMeasurement, latents: Sequence[int], importance: str | None) -> dict[int, ShownFeature]:
    """What is known about some alive latents, by latent."""
    if not latents:
        return {}
    estimator, s, chosen = hook.estimator(importance), hook.summary, np.array(sorted(set(latents)), dtype=np.int64)

    def rank_importance_and_rate(sums: Resample) -> list[float]:
        values = sums.importance(estimator.compute, estimator.name)
        alive = np.sort(values[sums.rates > s.alive_threshold])
        ranks = 1 + len(alive) - np.searchsorted(alive, values[chosen], side="right")
        return list(np.stack([ranks, values[chosen], sums.rates[chosen]], 1).ravel())

    estimates = s.estimates(rank_importance_and_rate)
    return {
        latent: ShownFeature(latent, rank.within(1.0), worth.within(0.0), rate.within(0.0, 1.0))
        for latent, rank, worth, rate in zip(
            chosen.tolist(), estimates[::3], estimates[1::3], estimates[2::3], strict=True
        )
    }
