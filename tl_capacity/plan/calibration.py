"""Calibration: predicted floors corrected by what students of some widths reached, and the observed floors by
themselves.

At each width that was distilled, r = observed / predicted; between them log r is a straight line in log d, and beyond
them it stays as at the end. A corrected floor is r times the predicted one. The interval of a corrected width takes the
largest factor by which this missed a width that was left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.by_width import ByWidth
from tl_capacity.plan.methods import first_within, in_log
from tl_capacity.results.estimate import Estimate

MIN_WIDTHS = 3
"""With fewer widths, none lies between two others, so there is no interval."""


@dataclass(frozen=True)
class Observed:
    """The floors that students reached.

    Attributes:
        widths: [width] ascending.
        floors: [width] the mean over the students of each width, in nats per token; above 0.
        left_out: widths whose students reached 0, with which nothing can be compared by a factor.
    """

    widths: NDArray[np.int64]
    floors: NDArray[np.float64]
    left_out: tuple[int, ...] = ()

    @classmethod
    def by_width(cls, by_width: ByWidth) -> Observed:
        """The mean floor of each width."""
        means = {width: float(np.mean([each.value for each in students])) for width, students in by_width.items()}
        above = {width: mean for width, mean in means.items() if mean > 0}
        return cls(
            np.array(list(above), dtype=np.int64), np.array(list(above.values())), tuple(set(means) - set(above))
        )

    def between(self) -> str:
        """The range of widths, in words."""
        first, last = int(self.widths[0]), int(self.widths[-1])
        return f"width {first:,}" if first == last else f"widths {first:,} to {last:,}"

    def reaches(self, target: float) -> bool:
        """Whether a loss lies between those that students reached."""
        return bool(self.floors.min() <= target <= self.floors.max())


@dataclass(frozen=True)
class Corrected:
    """A method's floors, corrected by students.

    Attributes:
        observed: of the students.
        predicted: floors of the method at some widths [width].
    """

    observed: Observed
    predicted: Callable[[NDArray[np.int64]], NDArray[np.float64]]

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """The students' widths at which the method predicts more than 0 [width]."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.predicted(self.observed.widths) > 0)

    @property
    def possible(self) -> bool:
        """Whether there is a width to correct by."""
        return bool(self.known.any())

    @cached_property
    def ratios(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Students' widths [known], and observed over predicted floors there [known]."""
        widths = self.observed.widths[self.known]
        return widths, self.observed.floors[self.known] / self.predicted(widths)

    def floors(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Corrected floors [width], in nats per token."""
        return in_log(*self.ratios, widths) * self.predicted(widths)

    @cached_property
    def missed_by(self) -> float | None:
        """The largest factor, at least 1, by which a left-out width between two others is missed.

        None with fewer than three widths.
        """
        widths, ratios = self.ratios
        if len(widths) < MIN_WIDTHS:
            return None
        misses = []
        for place in range(1, len(widths) - 1):
            others = np.arange(len(widths)) != place
            expected = in_log(widths[others], ratios[others], widths[place : place + 1])[0]
            misses.append(abs(float(np.log(ratios[place] / expected))))
        return float(np.exp(max(misses)))

    def needed(self, target: float, widths: NDArray[np.int64]) -> Estimate | None:
        """The smallest of ascending widths whose corrected floor is within a loss, with its interval; None if there is
        none.
        """
        floors = self.floors(widths)
        value = first_within(widths, floors, target)
        if value is None:
            return None
        if self.missed_by is None:
            return Estimate(float(value))
        low = first_within(widths, floors, target * self.missed_by)
        high = first_within(widths, floors, target / self.missed_by)
        known = low is not None and high is not None
        return Estimate(float(value), float(low or 0), float(high or 0)) if known else Estimate(float(value))


def observed_alone(observed: Observed) -> Corrected:
    """The students' floors by themselves.

    Between two widths, they follow a straight line in log width and log floor.
    """
    return Corrected(observed, lambda widths: np.ones(len(widths)))
