"""Pricing: what each chosen feature costs, from what students keep and how far they are from their teacher.

All figures of one student are of the same held-out documents, and are resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tl_capacity.placement.price import Price
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import budgets, context_at
from tl_capacity.probing.probes import Probe
from tl_capacity.probing.recovery import Recovery
from tl_capacity.probing.scores import Scores
from tl_capacity.results.estimate import Estimate, cluster_bootstrap, document_resamples, estimate_around


@dataclass(frozen=True)
class PricedStudent:
    """One student, with the figures that its price is computed from.

    Attributes:
        name: in the recovery.
        width, weight, seed: of the student.
        kl: sums of KL(teacher ‖ student) over the tokens of each document group [group], in nats.
        probe: of the concept; None where there is none.
    """

    name: str
    width: int
    weight: float
    seed: int
    kl: NDArray[np.float64]
    probe: Probe | None = None


@dataclass(frozen=True)
class Tally:
    """A figure, and its value on each bootstrap replicate over documents; None if there are too few documents.

    Attributes:
        value: the figure.
        replicates: [replicate] shifted, so that their mean is the figure: rare features vanish from resamples.
    """

    value: float
    replicates: NDArray[np.float64] | None

    @classmethod
    def of(cls, value: float, replicates: NDArray[np.float64] | None) -> Tally:
        """The tally of a figure and its replicates as drawn."""
        return cls(value, None if replicates is None else replicates - replicates.mean() + value)

    @classmethod
    def mean(cls, tallies: Sequence[Tally]) -> Tally:
        """The mean of several figures over the same documents."""
        drawn = [tally.replicates for tally in tallies if tally.replicates is not None]
        whole = np.mean(drawn, axis=0) if len(drawn) == len(tallies) else None
        return cls(float(np.mean([tally.value for tally in tallies])), whole)

    def less(self, other: Tally) -> Tally:
        """The difference of two figures over the same documents."""
        both = self.replicates is not None and other.replicates is not None
        return Tally(self.value - other.value, self.replicates - other.replicates if both else None)  # type: ignore[operator]

    @property
    def estimate(self) -> Estimate:
        """The figure with its interval."""
        return Estimate(self.value) if self.replicates is None else estimate_around(self.value, self.replicates)

    def per(self, other: Tally) -> Estimate | None:
        """This figure per unit of another; None if the other is not above zero.

        It has no interval if the other might as well be zero.
        """
        if not other.value > 0:
            return None
        value = self.value / other.value
        if self.replicates is None or other.replicates is None:
            return Estimate(value)
        # A resample in which nothing is gained allows any price: where that is more than one in forty, no end is known.
        gains = other.replicates > 0
        prices = np.divide(self.replicates, other.replicates, out=np.full(len(gains), np.inf), where=gains)
        low, high = np.percentile(prices, [2.5, 97.5], method="nearest")
        return (
            Estimate(value, float(min(low, value)), float(max(high, value))) if np.isfinite(high) else Estimate(value)
        )


@dataclass(frozen=True)
class _Figures:
    """What one student keeps, and how far it is from the teacher."""

    chosen: Tally
    others: Tally
    kl: Tally


def prices_of(
    recovery: Recovery, students: Sequence[PricedStudent], tokens: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> tuple[Price, ...]:
    """The price of each width and weight.

    Args:
        recovery: of all the students.
        students: those of weight 0, the students without, among them.
        tokens: predicted tokens of each document group [group] that `kl` is of.
        chosen: whether each alive feature was asked for [feature].
    """
    law = plugins().capacity_laws.default
    at = context_at(recovery.measured, recovery.importances, recovery.measured.summary.alpha.value)
    scores = {student.name: student.student for student in recovery.students}
    figures = {s.name: _figures(recovery, scores[s.name], s.kl, tokens, chosen) for s in students}
    prices = []
    for width in sorted({student.width for student in students}):
        here = [student for student in students if student.width == width]
        without = {student.seed: figures[student.name] for student in here if student.weight == 0}
        for weight in sorted({student.weight for student in here}):
            mine = [student for student in here if student.weight == weight]
            budget = float(budgets(law, [width], at)[0])
            most = float((chosen & recovery.judged).sum()), float((~chosen & recovery.judged).sum())
            before = [without[s.seed] for s in mine]
            prices.append(_price(mine, [figures[s.name] for s in mine], before, budget, most))
    return tuple(prices)


def teacher_figures(recovery: Recovery, chosen: NDArray[np.bool_], probe: Probe | None) -> dict[str, Estimate]:
    """What readouts of the teacher itself find, and the accuracy of its probe."""
    among = {"chosen": chosen & recovery.judged, "others": ~chosen & recovery.judged}
    found = {
        name: _count(recovery.teacher, recovery.tau, some).estimate.within(0.0, float(some.sum()))
        for name, some in among.items()
    }
    return found if probe is None else {**found, "probe": probe.accuracy}


def _price(
    students: Sequence[PricedStudent],
    figures: Sequence[_Figures],
    without: Sequence[_Figures],
    budget: float,
    most: tuple[float, float],
) -> Price:
    """The price of the students of one width and weight.

    Args:
        figures, without: of these students, and of those of the same seeds that were trained without.
        most: how many chosen and other features could be judged.
    """
    chosen, others, kl = (Tally.mean([getattr(f, name) for f in figures]) for name in ("chosen", "others", "kl"))
    probes = [student.probe for student in students if student.probe is not None]
    by_seed: Mapping[str, tuple[float, ...]] = {
        name: tuple(getattr(f, name).value for f in figures) for name in ("chosen", "others", "kl")
    }
    price = {
        "width": students[0].width,
        "weight": students[0].weight,
        "seeds": tuple(student.seed for student in students),
        "budget": budget,
        "chosen": chosen.estimate.within(0.0, most[0]),
        "others": others.estimate.within(0.0, most[1]),
        "kl": kl.estimate.within(0.0),
        "probe": _accuracy(probes) if probes else None,
        "by_seed": {**by_seed, **({"probe": tuple(p.accuracy.value for p in probes)} if probes else {})},
    }
    if students[0].weight == 0:
        return Price(**price)  # type: ignore[arg-type]
    before = {name: Tally.mean([getattr(f, name) for f in without]) for name in ("chosen", "others", "kl")}
    paid, gained = kl.less(before["kl"]), chosen.less(before["chosen"])
    return Price(
        **price,  # type: ignore[arg-type]
        paid=paid.estimate,
        gained=gained.estimate,
        lost=before["others"].less(others).estimate,
        per_feature=paid.per(gained),
    )


def _figures(
    recovery: Recovery,
    scores: Scores,
    kl: NDArray[np.float64],
    tokens: NDArray[np.int64],
    chosen: NDArray[np.bool_],
) -> _Figures:
    # The resamples of `Scores.resampled_auroc`, so that all figures are of the same documents in each.
    weights = document_resamples(scores.firings.sum(1).round().astype(np.int64))
    drawn = None if weights is None else (weights @ kl) / np.maximum(weights @ tokens, 1)
    return _Figures(
        _count(scores, recovery.tau, chosen & recovery.judged),
        _count(scores, recovery.tau, ~chosen & recovery.judged),
        Tally.of(float(kl.sum() / tokens.sum()), drawn),
    )


def _count(scores: Scores, tau: float, among: NDArray[np.bool_]) -> Tally:
    """How many of some features a readout finds."""
    drawn = scores.resampled_auroc
    counts = None if drawn is None else ((drawn >= tau) & among).sum(1).astype(np.float64)
    return Tally.of(float((scores.kept(tau) & among).sum()), counts)


def _accuracy(probes: Sequence[Probe]) -> Estimate:
    """The mean accuracy of the probes of several seeds. All are tested on the same texts."""
    correct = np.mean([probe.correct for probe in probes], axis=0)
    return cluster_bootstrap(lambda weights: (weights @ correct) / weights.sum(1), probes[0].documents)
