"""Observed floors: where a student's held-out loss would end if training went on, in nats per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.curves import GIVEN, StudentCurve
from tl_capacity.results.estimate import Estimate, block_resample, percentile_interval

OBSERVED = ("fit", "last_tenth")
"""Two ways to read a student's floor: L∞ of the curve's fit, or the mean over the last tenth of training."""
REPLICATES = 100
MIN_EVALUATIONS = 8
SKIPPED_SHARE = 0.1
"""Share of the curve's beginning that is left out of the fit: it is warm-up and not a power law."""
BLOCK = 4
"""Residuals are resampled in blocks of this size, as neighbouring evaluations share text and nearly their weights."""
EXPONENTS = np.geomspace(0.05, 5, 40)
"""Exponents b tried first, 13% apart. The ends are the bounds."""
HALVINGS = 50
"""Steps of the bisection between neighbouring exponents. They leave nothing but the rounding of b."""


JUDGED = {
    "kl": ("KL(teacher ‖ student), nats per token", ".4f"),
    "cross_entropy": ("its cross-entropy", ".4f"),
    "above_teacher": ("above the teacher's", ".4f"),
    "agreement": ("top-1 agreement", ".4f"),
}
"""Figures that a table shows of a student judged as it came, with headings and formats."""


@dataclass(frozen=True)
class ObservedFloor:
    """The floor of one student.

    Attributes:
        value, low, high: L∞ of the fit L(t) = L∞ + a·t^−b to the held-out curve, with its 95% interval (moving-block
            bootstrap of the residuals), in nats per token; without an interval and equal to `last_tenth` where there
            are too few evaluations to fit. Of a student that somebody else trained, its loss as it came, with a 95%
            interval over documents: no curve says where it would end.
        last_tenth, last_tenth_low, last_tenth_high: mean held-out loss over the last tenth of training, as the paper
            takes it, with its interval likewise.
        a, b: of the fit, with t as a share of the whole training; 0 without a fit.
        residual: root mean square of what the fit leaves, in nats per token.
        falling, falling_low, falling_high: how much the curve would still fall: `last_tenth` − `value`.
    """

    name: str
    width: int
    seed: int
    start: str
    value: float
    low: float | None
    high: float | None
    last_tenth: float
    a: float = 0.0
    b: float = 0.0
    residual: float = 0.0
    last_tenth_low: float | None = None
    last_tenth_high: float | None = None
    falling_low: float | None = None
    falling_high: float | None = None

    @property
    def falling(self) -> float:
        """How far the curve would still fall, in nats per token."""
        return self.last_tenth - self.value

    @property
    def far_from_floor(self) -> bool:
        """Whether the last tenth of training was still more than a tenth above the curve's asymptote."""
        return self.low is not None and self.falling > 0.1 * self.value

    def taken_as(self, which: str) -> Estimate:
        """The observed floor with its interval, read in one of the ways in `OBSERVED`."""
        if which == "fit":
            return Estimate(self.value, self.low, self.high)
        return Estimate(self.last_tenth, self.last_tenth_low, self.last_tenth_high)

    def to_json(self) -> dict[str, Any]:
        """The floor as a flat JSON object."""
        return {**asdict(self), "falling": self.falling}


def observed_floors(run: Iterable[StudentCurve]) -> list[ObservedFloor]:
    """The observed floor of every student of a run."""
    return [observed_floor(student) for student in run]


def observed_floor(student: StudentCurve) -> ObservedFloor:
    """The observed floor of one student. The result is deterministic."""
    who: dict[str, Any] = {"name": student.name, "width": student.width, "seed": student.seed, "start": student.start}
    if student.given:
        kl = Estimate(student.heldout_kl[-1]) if student.judged is None else student.judged.figures["kl"]
        return ObservedFloor(
            **who,
            value=kl.value,
            low=kl.low,
            high=kl.high,
            last_tenth=kl.value,
            last_tenth_low=kl.low,
            last_tenth_high=kl.high,
        )
    tokens, losses = student.curve()
    share = tokens / tokens[-1]
    last_tenth = float(losses[share > 0.9].mean())
    fitted = share >= SKIPPED_SHARE
    # A control starts at its floor and has no power law to fall by.
    if fitted.sum() < MIN_EVALUATIONS or student.start == "teacher":
        return ObservedFloor(**who, value=last_tenth, low=None, high=None, last_tenth=last_tenth)
    figures = _extrapolated(tuple(share[fitted].tolist()), tuple(losses[fitted].tolist()), last_tenth)
    return ObservedFloor(**who, last_tenth=last_tenth, **figures)


@lru_cache(maxsize=256)
def _extrapolated(share: tuple[float, ...], losses: tuple[float, ...], last_tenth: float) -> Mapping[str, Any]:
    """The floor from the fit to a curve, with intervals. It is cached, as several stages ask for the same curves.

    Args:
        share: of the training, at each evaluation that is fitted.
        losses: there.
    """
    t, y = np.array(share), np.array(losses)
    best = fit_power_law(t, y)
    curve = power_law(t, *best)
    residuals = (y - curve) * np.sqrt(len(t) / (len(t) - 3))  # the fit has taken three degrees of freedom
    random = np.random.default_rng(0)
    noise = np.stack([block_resample(residuals, BLOCK, random) for _ in range(REPLICATES)])
    floors = fit_power_laws(t, curve + noise)[:, 0]
    last = last_tenth + noise[:, t > 0.9].mean(1)
    low, high = _around(best[0], floors)
    last_low, last_high = _around(last_tenth, last)
    falling_low, falling_high = _around(last_tenth - best[0], last - floors)
    return {
        "value": best[0],
        "low": low,
        "high": high,
        "a": best[1],
        "b": best[2],
        "residual": float(np.sqrt((residuals**2).mean())),
        "last_tenth_low": last_low,
        "last_tenth_high": last_high,
        "falling_low": falling_low,
        "falling_high": falling_high,
    }


def floor_cells(floors: Sequence[ObservedFloor]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of observed floors, as text."""
    header = ["student", "width", "L∞ of the fit", "last tenth", "still falling by", "a", "b"]
    return header, [[f.name, f"{f.width:,}", *_cells(f)] for f in floors]


def judged_cells(students: Iterable[StudentCurve]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of students that were judged as they came, as text."""
    header = ["student", "width d_S", "parameters", *(heading for heading, _ in JUDGED.values())]
    return header, [
        [
            student.name,
            f"{student.width:,}",
            f"{student.parameters:,}",
            *(student.judged.figures[name].show(digits) for name, (_, digits) in JUDGED.items()),
        ]
        for student in students
        if student.judged is not None
    ]


def _cells(floor: ObservedFloor) -> list[str]:
    """A student's table row after its name and width."""
    if floor.start == GIVEN:
        return ["not trained here", Estimate(floor.value, floor.low, floor.high).show(".4f"), "", "", ""]
    if floor.low is None:
        return ["not fitted", f"{floor.last_tenth:.4f}", "", "", ""]
    fit = f"{floor.value:.4f} [{floor.low:.4f}, {floor.high:.4f}]"
    return [fit, f"{floor.last_tenth:.4f}", f"{floor.falling:.4f}", f"{floor.a:.3g}", f"{floor.b:.2f}"]


def power_law(t: NDArray[np.float64], floor: float, a: float, b: float) -> NDArray[np.float64]:
    """L(t) = L∞ + a·t^−b."""
    return np.asarray(floor + a * t**-b)


def fit_power_law(t: NDArray[np.float64], losses: NDArray[np.float64]) -> tuple[float, float, float]:
    """`(L∞, a, b)` of one curve by least squares, as `fit_power_laws` finds them.

    Args:
        t: training so far [evaluation], in (0, 1].
        losses: held-out loss at each t [evaluation].
    """
    floor, a, b = fit_power_laws(t, losses[None])[0].tolist()
    return floor, a, b


def fit_power_laws(t: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(L∞, a, b)` of each curve [curve, 3] by least squares, with L∞ ≥ 0, a ≥ 0 and 0.05 ≤ b ≤ 5.

    A slower fall cannot be told from a straight line in so short a curve.

    For a given b the best L∞ and a are known in closed form, so only b is searched for (variable projection, Golub and
    Pereyra 1973): on a grid, and then by bisection of the error's slope between the best exponent's neighbours.

    Args:
        t: training so far [evaluation], in (0, 1].
        losses: held-out loss of each curve at each t [curve, evaluation].
    """
    errors = np.stack([_given_exponent(t, losses, b)[1] for b in EXPONENTS[:, None]])
    best = errors.argmin(0)
    low, high = EXPONENTS[np.maximum(best - 1, 0)], EXPONENTS[np.minimum(best + 1, len(EXPONENTS) - 1)]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rises = _given_exponent(t, losses, middle)[2] > 0
        low, high = np.where(rises, low, middle), np.where(rises, middle, high)
    b = (low + high) / 2
    return np.column_stack([_given_exponent(t, losses, b)[0], b])


def _given_exponent(
    t: NDArray[np.float64], losses: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The best `(L∞, a)` of each curve [curve, 2] at exponents b [curve or 1]; its squared error and the slope of that
    in b [curve].
    """
    powers = t ** -b[:, None]
    mean, mean_power = losses.mean(1), powers.mean(1)
    centred = powers - mean_power[:, None]
    a = (centred * losses).sum(1) / (centred**2).sum(1)
    floor = mean - a * mean_power
    # Where a bound is exceeded, the best point lies on one of the two: without a floor, or without a fall.
    products, squares = (powers * losses).sum(1), (powers**2).sum(1)
    floorless, flat = np.maximum(products, 0) / squares, np.maximum(mean, 0)
    falls = floorless**2 * squares > flat**2 * len(t)
    outside = (a < 0) | (floor < 0)
    a = np.where(outside, np.where(falls, floorless, 0), a)
    floor = np.where(outside, np.where(falls, 0, flat), floor)
    residuals = losses - floor[:, None] - a[:, None] * powers
    slope = 2 * a * (residuals * powers * np.log(t)).sum(1)
    return np.column_stack([floor, a]), (residuals**2).sum(1), slope


def _around(value: float, replicates: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% interval of replicates, widened to contain the value itself."""
    low, high = percentile_interval(replicates)
    return min(low, value), max(high, value)
