"""Fits of L∞ + a·t^−b to many curves at once, against scipy's `curve_fit` of each."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.observed import fit_power_law, fit_power_laws, power_law
from tl_capacity.distillation.run import DistillationRun

BOUNDS = np.array([0.0, 0.0, 0.05]), np.array([np.inf, np.inf, 5.0])
SHARE = np.linspace(0.1, 1, 37)


def curves(constants: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """Curves [curve, evaluation] of constants `(L∞, a, b)` [curve, 3], with noise."""
    exact = np.stack([power_law(SHARE, *each) for each in constants])
    return exact + np.random.default_rng(1).normal(0, noise, exact.shape)


def scipys(losses: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fit of one curve by scipy's trust-region search, as exact as it can be."""
    within = np.clip(start, BOUNDS[0] + 1e-6, BOUNDS[1] - 1e-6)
    exact = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "x_scale": "jac", "max_nfev": 5000}
    return np.asarray(curve_fit(power_law, SHARE, losses, p0=within, bounds=BOUNDS, **exact)[0])


def errors(losses: NDArray[np.float64], fitted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared error of each curve's fit [curve]."""
    return np.square(losses - np.stack([power_law(SHARE, *each) for each in fitted])).sum(1)


@pytest.mark.parametrize(
    ("floors", "heights", "exponents"),
    [
        ((0.01, 3), (0.05, 2), (0.1, 4)),
        ((0, 0), (0.05, 2), (0.05, 5)),  # without a floor
        ((0.01, 3), (0, 0), (0.05, 5)),  # without a fall
        ((0.01, 3), (0.05, 2), (0.05, 0.05)),  # as slow as is allowed
        ((0.01, 3), (0.05, 2), (5, 5)),  # and as fast
    ],
)
@pytest.mark.parametrize("noise", [3e-4, 1e-2])
def test_many_fits_are_those_of_scipy(
    floors: tuple[float, float], heights: tuple[float, float], exponents: tuple[float, float], noise: float
) -> None:
    random = np.random.default_rng(0)
    constants = np.column_stack([random.uniform(*ends, 4) for ends in (floors, heights, exponents)])
    losses = curves(constants, noise)
    fitted = fit_power_laws(SHARE, losses)
    assert np.all((fitted >= BOUNDS[0]) & (fitted <= BOUNDS[1]))
    # Scipy finds the nearest valley, so it begins in ours and from the truth: it finds nothing lower, and stays.
    nearby = np.stack([scipys(each, start) for each, start in zip(losses, fitted, strict=True)])
    # The losses are of order 1. A floor near 0 is the small difference of such numbers.
    np.testing.assert_allclose(fitted[:, 0], nearby[:, 0], rtol=1e-6, atol=1e-6)
    elsewhere = np.stack([scipys(each, start) for each, start in zip(losses, constants, strict=True)])
    assert np.all(errors(losses, fitted) <= np.minimum(errors(losses, nearby), errors(losses, elsewhere)) * (1 + 1e-7))


def test_each_bound_is_reached() -> None:
    """Curves that would go on beyond the bounds: L∞ < 0, a rise, a straight line, and a wall."""
    straight, wall = 2 - SHARE, 1 + (SHARE < 0.11)
    floorless, rising, slow, fast = fit_power_laws(SHARE, np.stack([straight - 1, SHARE, straight + 30, wall]))
    assert floorless[0] == 0
    assert rising[1] == 0
    assert rising[0] == pytest.approx(SHARE.mean(), rel=1e-12)
    assert slow[2] == pytest.approx(0.05, rel=1e-9)
    assert fast[2] == pytest.approx(5, rel=1e-9)


def test_one_curve_is_fitted_as_among_many() -> None:
    losses = curves(np.array([[1.0, 0.5, 1.0], [0.2, 1.0, 0.6], [0.0, 0.3, 2.0]]), 0.01)
    together = fit_power_laws(SHARE, losses)
    for each, fitted in zip(losses, together, strict=True):
        np.testing.assert_allclose(fit_power_law(SHARE, each), fitted, rtol=1e-9, atol=1e-12)


def test_a_run_says_what_it_is() -> None:
    curve = StudentCurve("width8-seed0", 8, 0, "random", 900, 200, (0, 1_500), (2.0, 1.0), (1.0,))
    run = DistillationRun((curve,), "embedded", 128, source="text", heldout_tokens=2_000)
    assert repr(run) == "DistillationRun(embedded into width8-seed0; 1,500 tokens of text)"
