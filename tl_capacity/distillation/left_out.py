"""Errors of candidates at left-out widths, on the observed floors and on bootstrap replicates of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from tl_capacity.distillation.candidates import Candidate, Form, Points
from tl_capacity.distillation.curves import GIVEN, StudentCurve
from tl_capacity.distillation.fitting import solve
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.results.estimate import MIN_GROUPS_FOR_INTERVAL

NOISE_DRAWS = 32
"""Replicates of the observed floors. In each, all candidates are fitted and chosen anew."""
SAME = 6
"""Candidates count as one try if their predictions agree to this many decimals, as shares of the largest floor."""


@dataclass(frozen=True)
class Errors:
    """Errors of one side's candidates at left-out widths, on the observed floors and in each replicate.

    Attributes:
        outer: [width, candidate, replicate] squared error at a left-out width; the first replicate is what was
            observed.
        inner: the same as a mean over the other widths, each left out as well: what the choice is made by.
        distinct: places of the candidates that differ in what they predict: two that differ by a factor are one try.
    """

    candidates: tuple[Candidate, ...]
    outer: NDArray[np.float64]
    inner: NDArray[np.float64]
    distinct: NDArray[np.int64]

    @property
    def tries(self) -> int:
        """The number of different candidates."""
        return len(self.distinct)

    @property
    def best(self) -> Candidate:
        """The candidate with the smallest leave-one-width-out error over all widths."""
        return self.candidates[int(self.outer[:, :, 0].mean(0).argmin())]

    def joined(self, other: Errors) -> Errors:
        """The candidates of both sides; all of the other side's differ from these."""
        return Errors(
            (*self.candidates, *other.candidates),
            np.concatenate([self.outer, other.outer], 1),
            np.concatenate([self.inner, other.inner], 1),
            np.concatenate([self.distinct, len(self.candidates) + other.distinct]),
        )

    def nested(self, tries: int | None = None) -> NDArray[np.float64]:
        """Squared error at each left-out width [width, replicate], of the candidate chosen without that width.

        With fewer tries than there are candidates, it is the mean over all subsets of so many, in closed form: the j-th
        best of n is the best of a subset of k with probability C(n − j, k − 1) / C(n, k).
        """
        order = self.inner[:, self.distinct].argsort(1, kind="stable")
        ordered = np.take_along_axis(self.outer[:, self.distinct], order, 1)
        return np.asarray(np.tensordot(ordered, best_of_subset(self.tries, tries or self.tries), (1, 0)))

    def chosen(self) -> list[Candidate]:
        """The candidate that is chosen without each width."""
        places = self.distinct[self.inner[:, self.distinct, 0].argmin(1)]
        return [self.candidates[place] for place in places]


def errors_of(candidates: Sequence[Candidate], points: Points, noise: NDArray[np.float64]) -> Errors | None:
    """The errors of candidates with the same number of fitted constants; None without candidates."""
    if not candidates:
        return None
    widths, counts = np.unique(points.widths, return_counts=True)
    means = mean_floors(points)
    floors = np.concatenate([means[None], means + noise])
    ordered, parts = [], []
    for form in dict.fromkeys(candidate.form for candidate in candidates):
        alike = [candidate for candidate in candidates if candidate.form is form]
        x = np.stack([candidate.shape.at(widths) for candidate in alike])
        ordered += alike
        parts.append(_misses(form, x, counts.astype(np.float64), floors))
    misses = np.concatenate(parts, 2)
    squares = np.square(misses)
    places = np.arange(len(means))
    outer = squares[places, places]
    inner = (squares.sum(1) - outer) / (len(means) - 1)
    largest = max(float(np.abs(means).max()), np.finfo(float).tiny)
    predicted = np.round(misses[places, places, :, 0].T / largest, SAME)
    distinct = np.sort(np.unique(predicted, axis=0, return_index=True)[1])
    return Errors(tuple(ordered), outer, inner, distinct)


def mean_floors(points: Points) -> NDArray[np.float64]:
    """The mean observed floor of each width, by width."""
    return np.array([points.floors[points.widths == width].mean() for width in np.unique(points.widths)])


def best_of_subset(candidates: int, tries: int) -> NDArray[np.float64]:
    """The probability [candidate] of being the best of a random subset of `tries`, for candidates in order,
    best first.
    """
    probabilities = np.zeros(candidates)
    probabilities[0] = tries / candidates
    for place in range(1, candidates - tries + 1):
        probabilities[place] = probabilities[place - 1] * (candidates - place - tries + 1) / (candidates - place)
    return probabilities


def _misses(
    form: Form, x: NDArray[np.float64], counts: NDArray[np.float64], floors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Observed less predicted floor at a second left-out width [left-out width, width, shape, replicate].

    Args:
        x: [shape, width].
        counts: [width] students.
        floors: [replicate, width].
    """
    n = len(counts)
    pairs = [(a, b) for a in range(n) for b in range(a, n)]
    row_of = np.zeros((n, n), dtype=np.int64)
    kept = np.ones((len(pairs), n))
    for row, (a, b) in enumerate(pairs):
        row_of[a, b] = row_of[b, a] = row
        kept[row, [a, b]] = 0
    fitted = counts * kept
    numbers = solve(form, x, fitted, fitted[:, None] * floors)  # [pair, shape, replicate, C B s]
    misses = np.empty((n, n, len(x), len(floors)))
    for width in range(n):
        c, b, s = np.moveaxis(numbers[row_of[:, width]], -1, 0)
        misses[:, width] = floors[:, width] - (c * x[:, width, None] ** s + b)
    return misses


def floor_noise(
    students: Sequence[ObservedFloor], which: str, curves: Iterable[StudentCurve] = ()
) -> NDArray[np.float64]:
    """Random errors of the mean observed floors of the widths [replicate, width].

    They come from three sources: the seeds, the fit of each curve, and the choice of documents that students were
    judged on.

    A width seldom has many seeds, so deviations from the mean of a width are pooled over all widths that have several
    (each times √(n/(n − 1)), as the mean took one degree of freedom), and each student draws one. To that comes normal
    noise as wide as the student's own interval, and what the students' losses differ by on a resample of the held-out
    text, the same one for all of them. No replicate where nothing of this is known.

    Args:
        curves: of the students, with the loss on each part of the held-out text where it was kept.
    """
    widths, at_width = np.unique([student.width for student in students], return_inverse=True)
    floors = [student.taken_as(which) for student in students]
    values = np.array([floor.value for floor in floors])
    errors = np.array(
        [0.0 if f.low is None or f.high is None else (f.high - f.low) / (2 * norm.ppf(0.975)) for f in floors]
    )
    text = text_noise(students, curves)
    if text is not None:
        errors[[student.start == GIVEN for student in students]] = 0  # whose intervals are over documents
    of_width = np.eye(len(widths))[at_width]
    seeds = of_width.sum(0)
    several = (seeds > 1)[at_width]
    deviations = (values - ((values @ of_width) / seeds)[at_width])[several]
    pool = deviations * np.sqrt(seeds / np.maximum(seeds - 1, 1))[at_width][several]
    if not len(pool) and not errors.any() and text is None:
        return np.zeros((0, len(widths)))
    random = np.random.default_rng(0)
    size = (NOISE_DRAWS, len(students))
    drawn = (random.choice(pool, size) if len(pool) else 0) + errors * random.normal(size=size)
    return np.asarray((drawn if text is None else drawn + text) @ of_width / seeds)


def text_noise(students: Sequence[ObservedFloor], curves: Iterable[StudentCurve]) -> NDArray[np.float64] | None:
    """How far each student's loss moves when the parts of the held-out text are resampled [replicate, student].

    None if the students were not judged on the same parts, or on fewer than eight.
    """
    by_name = {curve.name: curve.kl_by_part() for curve in curves}
    parts = [part for student in students if (part := by_name.get(student.name)) is not None]
    if len(parts) < len(students) or any(not np.array_equal(tokens, parts[0][0]) for tokens, _ in parts):
        return None
    tokens, sums = parts[0][0], np.stack([sums for _, sums in parts], 1)
    if len(tokens) < MIN_GROUPS_FOR_INTERVAL:
        return None
    counts = np.random.default_rng(1).multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), NOISE_DRAWS)
    return np.asarray((counts @ sums) / (counts @ tokens)[:, None] - sums.sum(0) / tokens.sum())
