"""Capacity laws, asked safely: features that a dimension holds, and features that a width keeps."""

from __future__ import annotations

from math import isfinite

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import PluginError, plugin_code
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.runtime.rounding import whole_below


def features_per_dimension(law: CapacityLaw, alpha: float, importance: NDArray[np.float64]) -> float:
    """ĝ for sparsity `alpha` and the alive features' importances [feature], by some law.

    Raises:
        PluginError: where the law fails, or gives no finite number above 0.
    """
    with plugin_code("capacity law", law.name, law):
        found = float(law.features_per_dimension(alpha, importance))
    if not (isfinite(found) and found > 0):
        raise PluginError(
            f"the capacity law {law.name!r} gives {found:g} features per dimension, but a finite number above 0 is"
            " needed: mend it"
        )
    return found


def kept_features(values: NDArray[np.float64], alpha: float, width: int, law: CapacityLaw) -> int:
    """F_S = min(⌊d_S · ĝ(α)⌋, F) of the alive features' importances [feature], by some law."""
    return int(min(whole_below(width * features_per_dimension(law, alpha, values)), len(values)))
