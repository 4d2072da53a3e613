"""Whole numbers out of floats that should have been whole: 100 · 0.29 is 28.999999999999996, and 29 is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-12
"""Share of a number that rounding in float64 may have added or taken; a few operations leave 1e-15."""


def whole_below(values: float | NDArray[Any]) -> Any:
    """⌊x⌋ of each value, as a float; a value that is below a whole number for rounding alone gives that number."""
    return np.floor(np.asarray(values, dtype=np.float64) * (1 + TOLERANCE))


def whole_above(values: float | NDArray[Any]) -> Any:
    """⌈x⌉ of each value, as a float; a value that is above a whole number for rounding alone gives that number."""
    return np.ceil(np.asarray(values, dtype=np.float64) * (1 - TOLERANCE))
