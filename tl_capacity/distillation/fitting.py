"""Fits of candidates to observed floors by least squares, with intervals and the error at a width that was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.candidates import Candidate, Points
from tl_capacity.results.estimate import Estimate, percentile_estimate

EXPONENTS = np.geomspace(0.02, 8, 3000)
"""Among which the exponent of a power law is looked for: 0.2% apart."""


@dataclass(frozen=True)
class Fit:
    """A candidate, fitted.

    Attributes:
        c, b: C and B with 95% intervals (bootstrap over widths and, within a width, over seeds), C in nats per token
            for each unit of x; C is None where x is the same at all widths, and has no interval where it was not
            fitted.
        exponent: s with its interval, where it was free.
        r2: share of the variance explained; None where there is none, as at a single width.
        error: leave-one-width-out error: root mean square, over widths, of the mean observed floor less the one that
            the other widths predict, in nats per token; None where too few widths are left to fit.
        fitted: C · x + B at each width, in nats per token.
    """

    candidate: Candidate
    c: Estimate | None
    b: Estimate
    exponent: Estimate | None
    r2: float | None
    error: float | None
    fitted: Mapping[int, float]

    def show_error(self) -> str:
        """The leave-one-width-out error as text."""
        return "too few widths" if self.error is None else f"{self.error:.4f}"

    def to_json(self) -> dict[str, Any]:
        """A flat object."""
        return {
            "name": self.candidate.name,
            "kind": self.candidate.kind,
            "hook": self.candidate.hook,
            "importance": self.candidate.importance,
            "law": self.candidate.law,
            "unit": self.candidate.unit,
            "C": None if self.c is None else self.c.to_json(),
            "B": self.b.to_json(),
            "exponent": None if self.exponent is None else self.exponent.to_json(),
            "r2": self.r2,
            "leave_one_width_out_error": self.error,
            "fitted_floors": {str(width): floor for width, floor in self.fitted.items()},
        }


def fit_candidate(candidate: Candidate, points: Points, replicates: NDArray[np.float64]) -> Fit:
    """Fit a candidate by least squares, every student counting the same.

    Args:
        replicates: [replicate, student] how often each student counts, as `group_resamples` of the widths draws it.
    """
    widths = np.unique(points.widths)
    free_c = bool(np.ptp(candidate.x(points)) > 0) and not candidate.as_is
    enough = len(widths) > 1 + free_c + candidate.free_exponent
    everybody = np.ones((1, len(points.widths)))
    # Of a single width nothing is left without it, and nothing can be fitted to that.
    without_each = (points.widths != widths[:, None])[: len(widths) if enough else 0].astype(np.float64)
    # Solved in one go, as the search for an exponent costs about as much for many rows as for one.
    solved = _solve(candidate, points, np.concatenate([everybody, without_each, replicates]))
    (c, b, exponent), left_out, drawn = (
        solved[0],
        solved[1 : 1 + len(without_each)],
        solved[1 + len(without_each) :],
    )
    values = _values(candidate, points, solved[0])
    error = None
    if enough:
        misses = [
            (points.floors - _values(candidate, points, numbers))[points.widths == width].mean()
            for width, numbers in zip(widths, left_out, strict=True)
        ]
        error = float(np.sqrt(np.mean(np.square(misses))))
    spread = float(np.square(points.floors - points.floors.mean()).sum())

    def estimate(value: float, column: int, with_interval: bool) -> Estimate:
        return percentile_estimate(value, drawn[:, column]) if with_interval else Estimate(float(value))

    return Fit(
        candidate,
        c=estimate(c, 0, enough and free_c) if free_c or candidate.as_is else None,
        b=estimate(b, 1, enough),
        exponent=estimate(exponent, 2, enough) if candidate.free_exponent and len(widths) > 1 else None,
        r2=1 - float(np.square(points.floors - values).sum()) / spread if spread and len(widths) > 1 else None,
        error=error,
        fitted={int(width): float(values[points.widths == width][0]) for width in widths},
    )


def _solve(candidate: Candidate, points: Points, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[C, B, s]` by least squares, a row for each row of weights [replicate, student]."""
    x, y = candidate.x(points), points.floors
    no_exponent = np.full(len(weights), -1.0)
    if candidate.as_is:
        return np.stack([np.ones(len(weights)), weights @ (y - x) / weights.sum(1), no_exponent], 1)
    if not candidate.free_exponent:
        return np.stack([*_line(x, y, weights), no_exponent], 1)
    # The best C and B of each exponent are a straight line's, so only the exponent is searched for.
    best, smallest = np.zeros((len(weights), 3)), np.full(len(weights), np.inf)
    for s in EXPONENTS:
        power = _power(x, s)
        c, b = _line(power, y, weights)
        left = (weights * np.square(y - c[:, None] * power - b[:, None])).sum(1)
        better = left < smallest
        best[better], smallest[better] = np.stack([c, b, np.full_like(c, s)], 1)[better], left[better]
    return best


def _values(candidate: Candidate, points: Points, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """C · x + B, or C · x^−s + B, of each point."""
    x = candidate.x(points)
    return np.asarray(numbers[0] * (_power(x, numbers[2]) if candidate.free_exponent else x) + numbers[1])


def _power(x: NDArray[np.float64], s: float) -> NDArray[np.float64]:
    return np.asarray(x**-s)


def _line(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(C, B)` of the weighted least-squares line of each row of weights; C is 0 where x is the same everywhere, as
    nothing tells what it is.
    """
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    centred = weights * (x - mean_x[:, None])
    spread, product = centred @ x, centred @ y
    varies = spread > 1e-12 * (weights @ x**2)  # below it is what rounding leaves of zero
    c = np.divide(product, spread, out=np.zeros_like(total), where=varies)
    return c, mean_y - c * mean_x
