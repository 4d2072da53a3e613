"""The league: does knowing the teacher's features help to predict the floor of a left-out width?

Candidates that know features are compared with candidates that know none, with as many fitted constants and as many
tries.

Candidates meet by how many constants they fit. Each side's candidate is chosen inside the fold (nested
cross-validation; Cawley & Talbot 2010, JMLR 11): for each left-out width, it is the one with the smallest
leave-one-width-out error among the other widths, and only then is its error at the left-out width taken. So luck with
one width is not counted as skill.

Both sides have the same number of tries. Where more candidates know features, curves over the width alone are added to
the rivals (`added_rivals`), so that they may choose as freely. Whoever has more after that enters with all subsets as
large as the other side, and the mean over these counts. To be ahead, a side must also be so with each side's own tries:
so neither gains by poor candidates on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from tl_capacity.distillation.candidates import Candidate, Points, added_rivals
from tl_capacity.distillation.left_out import Errors, errors_of
from tl_capacity.results.estimate import Estimate

MIN_WIDTHS = 5
"""With fewer widths, laws with two or three free constants cannot be told apart."""
WIDTH_DRAWS = 10_000
"""Bootstrap draws of left-out widths; many, because outer percentiles are needed."""
PLACE_DRAWS = 500
"""Bootstrap draws for the places of candidates."""
FEATURES, RIVALS, NEITHER = "features", "rivals", "not distinguishable"
"""The side that is ahead."""


@dataclass(frozen=True)
class Side:
    """One side of a group: the candidates that know features, or their rivals.

    Attributes:
        best: the candidate with the smallest leave-one-width-out error over all widths, which flatters it.
        error: root mean square error at left-out widths of the candidate chosen without them, with as many tries as the
            other side has, in nats per token, with its 95% interval.
        own_error: the same where each side has its own number of tries.
        tries: how many of its candidates differ in what they predict.
        chosen: for how many left-out widths each candidate was chosen.
    """

    best: Candidate
    error: Estimate
    own_error: Estimate
    tries: int
    chosen: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The side as a JSON object."""
        return {
            "best": self.best.name,
            "error": self.error.to_json(),
            "error_with_own_tries": self.own_error.to_json(),
            "tries": self.tries,
            "chosen": dict(self.chosen),
        }


@dataclass(frozen=True)
class Group:
    """Candidates with the same number of fitted constants.

    Attributes:
        features, rivals: None where there is no such candidate.
        tries: of each side, once they have equally many; 0 where there is one side.
        difference: the error of the rivals less that of what knows features, with its 95% interval; None where there is
            one side. The first is with equally many tries, the second with each side's own.
        places: of each candidate by its leave-one-width-out error among all in the group, with its 95% interval.
    """

    constants: int
    features: Side | None
    rivals: Side | None
    tries: int = 0
    difference: tuple[Estimate, Estimate] | None = None
    places: Mapping[Candidate, Estimate] = field(default_factory=dict)

    @property
    def ahead(self) -> str | None:
        """`FEATURES`, `RIVALS` or `NEITHER`; None if there is only one side.

        A side is ahead if the 95% interval of the difference says so, both with equal tries and with each side's own.
        """
        if self.difference is None:
            return None
        if all(estimate.low is not None and estimate.low > 0 for estimate in self.difference):
            return FEATURES
        if all(estimate.high is not None and estimate.high < 0 for estimate in self.difference):
            return RIVALS
        return NEITHER

    @property
    def leader(self) -> Side | None:
        """The side that is ahead."""
        return {FEATURES: self.features, RIVALS: self.rivals}.get(self.ahead or "")

    def to_json(self) -> dict[str, Any]:
        """The group as a JSON object."""
        equal, own = self.difference or (None, None)
        return {
            "constants": self.constants,
            "ahead": self.ahead,
            "tries": self.tries,
            "features": None if self.features is None else self.features.to_json(),
            "rivals": None if self.rivals is None else self.rivals.to_json(),
            "rivals_less_features": None if equal is None else equal.to_json(),
            "rivals_less_features_with_own_tries": None if own is None else own.to_json(),
            "places": {candidate.name: place.to_json() for candidate, place in self.places.items()},
        }


def league(candidates: Sequence[Candidate], points: Points, noise: NDArray[np.float64]) -> tuple[Group, ...]:
    """Candidates in groups by their number of fitted constants; no groups below five widths.

    Args:
        noise: [replicate, width] what is added to the mean observed floor of each width in a replicate of the
            bootstrap; without a replicate the intervals are over widths alone.
    """
    widths = np.unique(points.widths)
    if len(widths) < MIN_WIDTHS:
        return ()
    constants = sorted({candidate.constants for candidate in candidates})
    return tuple(
        _group(number, [candidate for candidate in candidates if candidate.constants == number], points, noise)
        for number in constants
    )


def _group(constants: int, candidates: Sequence[Candidate], points: Points, noise: NDArray[np.float64]) -> Group:
    """One group, with equal tries for both sides."""
    features, rivals = (
        errors_of([c for c in candidates if c.shape.knows_features == knows], points, noise) for knows in (True, False)
    )
    places = _places([side for side in (features, rivals) if side is not None])
    if features is None or rivals is None:
        known, unknown = (None if side is None else _side(side, side) for side in (features, rivals))
        return Group(constants, known, unknown, places=places)
    lacking = features.tries - rivals.tries
    more = added_rivals(constants, lacking, np.unique(points.widths)) if lacking > 0 else []
    added = errors_of(more, points, noise)
    many = rivals if added is None else rivals.joined(added)
    tries = min(features.tries, many.tries)
    differences = (
        _interval(many.nested(tries), features.nested(tries)),
        _interval(rivals.nested(), features.nested()),
    )
    known, unknown = _side(features, features, tries), _side(rivals, many, tries)
    return Group(constants, known, unknown, tries, differences, places)


def _side(side: Errors, many: Errors, tries: int | None = None) -> Side:
    """The figures of one side.

    Args:
        many: its candidates with those that were added to have as many as the other side.
        tries: of each side.
    """
    chosen = Counter(candidate.name for candidate in many.chosen())
    error, own_error = _interval(many.nested(tries)), _interval(side.nested())
    return Side(side.best, error, own_error, side.tries, dict(chosen.most_common()))


def _resampled(nested: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square error [draw] over left-out widths drawn with replacement, each replicate equally often.

    The draws are the same for whatever is compared, so that it is compared in pairs.
    """
    widths, replicates = nested.shape
    noisy = nested[:, 1:] if replicates > 1 else nested
    drawn = _width_draws(widths, noisy.shape[1], WIDTH_DRAWS) @ noisy.T[..., None]
    return np.asarray(np.sqrt(drawn / widths).ravel())


@lru_cache(maxsize=8)
def _width_draws(widths: int, replicates: int, least: int) -> NDArray[np.float64]:
    """How often each width is drawn [replicate, draw, width], with at least `least` draws over all replicates."""
    size = (replicates, -(-least // replicates))
    return np.random.default_rng(0).multinomial(widths, np.full(widths, 1 / widths), size=size).astype(np.float64)


def _interval(nested: NDArray[np.float64], less: NDArray[np.float64] | None = None) -> Estimate:
    """The root mean square error over widths with its 95% interval, or its difference from another one.

    A bootstrap over few widths is too narrow, so its percentiles are expanded to what a t interval would have
    (Hesterberg 2015, arXiv:1411.5279, section 3.2).
    """
    n = len(nested)
    value, drawn = np.sqrt(nested[:, 0].mean()), _resampled(nested)
    if less is not None:
        value, drawn = value - np.sqrt(less[:, 0].mean()), drawn - _resampled(less)
    tail = norm.cdf(-np.sqrt(n / (n - 1)) * student_t.ppf(0.975, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def _places(sides: Sequence[Errors]) -> dict[Candidate, Estimate]:
    """The place of each candidate by its leave-one-width-out error, with its 95% interval.

    Equal candidates share a place.
    """
    everybody = [candidate for side in sides for candidate in side.candidates]
    outer = np.concatenate([side.outer for side in sides], 1)
    distinct = np.concatenate([np.isin(np.arange(len(side.candidates)), side.distinct) for side in sides])
    widths, _, replicates = outer.shape
    noisy = range(1, replicates) if replicates > 1 else range(1)
    draws = _width_draws(widths, len(noisy), PLACE_DRAWS)
    drawn = np.concatenate(
        [_ranks(draw @ outer[:, :, place], distinct) for draw, place in zip(draws, noisy, strict=True)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0, method="nearest")
    observed = _ranks(outer[:, :, 0].sum(0, keepdims=True), distinct)[0]
    return {
        candidate: Estimate(float(place), float(min(a, place)), float(max(b, place)))
        for candidate, place, a, b in zip(everybody, observed, low, high, strict=True)
    }


def _ranks(errors: NDArray[np.float64], distinct: NDArray[np.bool_]) -> NDArray[np.int64]:
    """One plus the number of different candidates that are better [draw, candidate]."""
    better = np.sort(errors[:, distinct], axis=1)
    return np.stack([1 + np.searchsorted(row, each * (1 - 1e-9)) for row, each in zip(better, errors, strict=True)])
