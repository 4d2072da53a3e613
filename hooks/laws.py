"""Capacity laws: how many features a width holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import CapacityContext, CapacityLaw


class CompressedSensing(CapacityLaw):
    """g(α) = 1/((1−α) ln(1/(1−α))), the bound behind the paper's theorem (arXiv:2604.04037, eq. 2)."""

    name = "compressed_sensing"
    summary = "g(α) of the minimum-width theorem"
    is_default = True

    def features_per_dimension(self, alpha: float, importance: NDArray[np.float64]) -> float:
        return theory.capacity(alpha)


class Equilibrium(CapacityLaw):
    """ĝ = a·g(α)^b, fitted to what trained toy models keep: fewer and cleaner features than g allows.

    a = 1.03; b falls with the slope s of the importances Iᵢ ∝ i^−s and was fitted at s = 0, ½, 1, 1½, 2 in an
    independent audit of toy models.
    """

    name = "equilibrium"
    summary = "a·g(α)^b, fitted on trained toy models"
    caveat = "fitted on toy models with at most 40 features; out of its domain for language models"

    _SLOPES = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    _EXPONENTS = np.array([0.93, 0.69, 0.53, 0.44, 0.34])

    def features_per_dimension(self, alpha: float, importance: NDArray[np.float64]) -> float:
        exponent = float(np.interp(importance_slope(importance), self._SLOPES, self._EXPONENTS))
        return float(1.03 * theory.capacity(alpha) ** exponent)


class Proportional(CapacityLaw):
    """F · d_S/d_T: a teacher of width d_T holds its F features, and a student of width d_S holds the same share of them
    as its share of the width, whatever their sparsity.
    """

    name = "proportional"
    summary = "F·d_S/d_T, the same share of the features as of the teacher's width"
    caveat = "a larger dictionary keeps more features: compare dictionaries of one size"

    def kept(self, width: int, at: CapacityContext) -> float:
        return at.n_features * width / at.teacher_width


def importance_slope(importance: NDArray[np.float64]) -> float:
    """s of the power law Iᵢ ∝ i^−s that fits the sorted positive importances best, by least squares in log–log. 0 for
    fewer than two.
    """
    ordered = np.sort(importance[importance > 0])[::-1]
    if len(ordered) < 2:
        return 0.0
    return float(-np.polyfit(np.log(np.arange(1, len(ordered) + 1)), np.log(ordered), 1)[0])


@hookimpl
def register_capacity_laws(register: Callable[[CapacityLaw], None]) -> None:
    register(CompressedSensing())
    register(Equilibrium())
    register(Proportional())
