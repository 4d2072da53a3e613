"""Least-squares fits of candidates to observed floors, with intervals and leave-one-width-out errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.candidates import Candidate, Form, Points
from tl_capacity.results.estimate import Estimate, percentile_estimate

EXPONENTS = np.geomspace(0.02, 8, 40)
"""Exponents tried for a power law, 17% apart."""
REFINEMENTS = (1.0, 0.1)
"""Steps of the refinement: each takes the top of a parabola through three exponents, this multiple of the grid's step
apart.
"""


@dataclass(frozen=True)
class Fit:
    """A candidate with its fitted constants.

    Attributes:
        c, b: C and B with 95% intervals (bootstrap over widths and, within a width, over seeds), C in nats per token
            for each unit of x; C is None where x is the same at all widths. What was not fitted, and what had too few
            widths, has no interval.
        exponent: s with its interval, where it was free.
        r2: share of the variance explained; None where there is none, as at a single width.
        error: leave-one-width-out error: root mean square, over widths, of the mean observed floor less the one that
            the other widths predict, in nats per token; None where too few widths are left to fit.
        fitted: C · x^s + B at each width, in nats per token.
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
        """The fit as a flat JSON object."""
        shape = self.candidate.shape
        return {
            "name": self.candidate.name,
            "kind": "prediction" if shape.knows_features else "rival",
            "constants": self.candidate.constants,
            "hook": shape.hook,
            "importance": shape.importance,
            "law": shape.law,
            "unit": shape.unit,
            "C": None if self.c is None else self.c.to_json(),
            "B": self.b.to_json(),
            "exponent": None if self.exponent is None else self.exponent.to_json(),
            "r2": self.r2,
            "leave_one_width_out_error": self.error,
            "fitted_floors": {str(width): floor for width, floor in self.fitted.items()},
        }


def fit_candidates(candidates: Sequence[Candidate], points: Points, replicates: NDArray[np.float64]) -> list[Fit]:
    """Fit candidates by least squares. Every student has the same weight.

    Args:
        replicates: [replicate, student] how often each student counts, as `group_resamples` of the widths draws it.
    """
    fits: dict[Candidate, Fit] = {}
    for form in dict.fromkeys(candidate.form for candidate in candidates):
        alike = [candidate for candidate in candidates if candidate.form is form]
        fits |= zip(alike, _fit_form(form, alike, points, replicates), strict=True)
    return [fits[candidate] for candidate in candidates]


def _fit_form(
    form: Form, candidates: Sequence[Candidate], points: Points, replicates: NDArray[np.float64]
) -> list[Fit]:
    """Fit candidates that have the same free constants."""
    widths, at_width = np.unique(points.widths, return_inverse=True)
    of_width = np.eye(len(widths))[at_width]
    x = np.stack([candidate.shape.at(widths) for candidate in candidates])
    means = (points.floors @ of_width) / of_width.sum(0)
    # Solved in one go, as the search for an exponent costs about as much for many rows as for one.
    everybody, without_each = np.ones((1, len(points.widths))), points.widths != widths[:, None]
    weights = np.concatenate([everybody, without_each[: len(widths) if len(widths) > 1 else 0], replicates])
    solved = solve(form, x, weights @ of_width, ((weights * points.floors) @ of_width)[:, None])[:, :, 0]
    fits = []
    for candidate, shape, rows in zip(candidates, x, solved.swapaxes(0, 1), strict=True):
        free_c = form.free_c and bool(np.ptp(shape) > 0 if form.free_b or form.free_exponent else shape.any())
        enough = len(widths) > free_c + form.free_b + form.free_exponent
        misses = None
        if enough:
            left_out = rows[1 : len(widths) + 1] if len(widths) > 1 else rows[:1]
            misses = means - np.diagonal(values_at(left_out, shape))
        drawn = rows[len(rows) - len(replicates) :] if enough else None
        has_c = free_c or not form.free_c
        fits.append(_fit(candidate, points, values_at(rows[0], shape)[at_width], rows[0], drawn, misses, has_c))
    return fits


def _fit(
    candidate: Candidate,
    points: Points,
    values: NDArray[np.float64],
    numbers: NDArray[np.float64],
    drawn: NDArray[np.float64] | None,
    misses: NDArray[np.float64] | None,
    has_c: bool,
) -> Fit:
    """The fit of one candidate, from the solved constants.

    Args:
        values: C · x^s + B of each student.
        numbers, drawn: `[C, B, s]`, and of each replicate; None for no intervals.
        misses: observed less predicted floor of each width that was left out; None where too few are left.
        has_c: whether there is a C.
    """
    form = candidate.form
    spread = float(np.square(points.floors - points.floors.mean()).sum())
    several = len(np.unique(points.widths)) > 1

    def estimate(column: int, fitted: bool) -> Estimate:
        value = float(numbers[column])
        return percentile_estimate(value, drawn[:, column]) if fitted and drawn is not None else Estimate(value)

    return Fit(
        candidate,
        c=estimate(0, form.free_c) if has_c else None,
        b=estimate(1, form.free_b),
        exponent=estimate(2, True) if form.free_exponent and has_c and several else None,
        r2=1 - float(np.square(points.floors - values).sum()) / spread if spread and several else None,
        error=None if misses is None else float(np.sqrt(np.mean(np.square(misses)))),
        fitted={int(width): float(values[points.widths == width][0]) for width in np.unique(points.widths)},
    )


def values_at(numbers: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """C · x^s + B [..., width] for the constants `[C, B, s]` [..., 3]."""
    c, b, s = np.moveaxis(numbers[..., None, :], -1, 0)
    return np.asarray(c * x**s + b)


def solve(
    form: Form, x: NDArray[np.float64], counts: NDArray[np.float64], totals: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`[C, B, s]` [row, shape, replicate, 3] by least squares. Every student has the same weight.

    Args:
        x: [shape, width], not negative.
        counts: [row, width] how many students count at each width.
        totals: [row, replicate, width] the sum of their floors.
    """
    c, b, s = np.ones((3, len(counts), len(x), totals.shape[1]))
    if form.free_exponent:
        largest = np.maximum(x.max(1), np.finfo(float).tiny)[:, None]  # a power of thousands is no number any more
        s = _exponents(x / largest, counts, totals, form.free_b)
        c, b = _lines((x / largest)[:, None] ** s[..., None], counts, totals, form.free_b)
        c = c / largest**s
    elif form.free_c:
        c, b = _lines(x[None, :, None], counts, totals, form.free_b)
    elif form.free_b:
        offsets = totals.sum(-1)[:, None] - (counts @ x.T)[..., None]
        b = offsets / counts.sum(1)[:, None, None]
    else:
        b = 0 * b
    return np.stack(np.broadcast_arrays(c, b, s), -1)


def _lines(
    x: NDArray[np.float64], counts: NDArray[np.float64], totals: NDArray[np.float64], free_b: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(C, B)` [row, shape, replicate] of least-squares lines, through zero if B is not free.

    C is 0 if nothing determines it, as when x is the same everywhere.

    Args:
        x: [row or 1, shape, replicate or 1, width].
    """
    mean_x, products, spread = _moments(x, counts, totals, free_b)
    c = np.divide(products, spread, out=np.zeros_like(products), where=spread > 0)
    mean_y = (totals.sum(-1) / counts.sum(1)[:, None])[:, None]
    return c, (mean_y - c * mean_x if free_b else np.zeros_like(c))


def _moments(
    x: NDArray[np.float64], counts: NDArray[np.float64], totals: NDArray[np.float64], centred: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean of x, Σ (x − mean)·y and Σ (x − mean)², each [row, shape, replicate or 1].

    Without `centred` the mean is not subtracted. The last sum is 0 if only rounding errors are left of it.
    """
    mean_x = np.einsum("rskw,rw->rsk", x, counts) / counts.sum(1)[:, None, None]
    moved = x - mean_x[..., None] if centred else np.broadcast_to(x, (len(counts), *x.shape[1:]))
    spread = np.einsum("rskw,rskw,rw->rsk", moved, moved, counts)
    varies = spread > 1e-12 * np.einsum("rskw,rskw,rw->rsk", x, x, counts)
    same = x.shape[2] == 1  # in every replicate, which makes it a matrix product
    products = moved[:, :, 0] @ totals.swapaxes(1, 2) if same else np.einsum("rskw,rkw->rsk", moved, totals)
    return mean_x, products, np.where(varies, spread, 0)


def _exponents(
    x: NDArray[np.float64], counts: NDArray[np.float64], totals: NDArray[np.float64], free_b: bool
) -> NDArray[np.float64]:
    """The exponents [row, shape, replicate] whose power of x a straight line fits best."""

    def explained(powers: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much of the sum of squares each line explains."""
        _, products, spread = _moments(powers, counts, totals, free_b)
        return np.divide(np.square(products), spread, out=np.zeros_like(products), where=spread > 0)

    shape = (len(counts), len(x), totals.shape[1])
    best, most = np.ones(shape), np.full(shape, -np.inf)
    for s in EXPONENTS:
        score = explained((x**s)[None, :, None])
        better = score > most
        best[better], most[better] = s, score[better]
    apart = np.log(EXPONENTS[1] / EXPONENTS[0])
    for share in REFINEMENTS:
        below, there, above = (
            explained(x[:, None] ** (best * np.exp(k * share * apart))[..., None]) for k in (-1, 0, 1)
        )
        bend = below - 2 * there + above
        top = np.divide(below - above, 2 * bend, out=np.zeros_like(bend), where=bend < 0)
        best = best * np.exp(share * apart * np.clip(top, -2, 2))
    return np.clip(best, EXPONENTS[0], EXPONENTS[-1])
