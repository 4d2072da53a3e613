"""Whole numbers from floats that should have been whole: 100 · 0.29 gives 28.999999999999996, where 29 is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-12
"""Share of a number by which rounding in float64 may have changed it. A few operations change it by 1e-15."""


def whole_below(values: float | NDArray[Any]) -> Any:
    """⌊x⌋ of each value, as a float. A value that only rounding put below a whole number gives that number."""
    return np.floor(np.asarray(values, dtype=np.float64) * (1 + TOLERANCE))


def whole_above(values: float | NDArray[Any]) -> Any:
    """⌈x⌉ of each value, as a float. A value that only rounding put above a whole number gives that number."""
    return np.ceil(np.asarray(values, dtype=np.float64) * (1 - TOLERANCE))
