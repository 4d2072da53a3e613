"""Capacity laws, asked safely: features that a dimension holds, and features that a width keeps."""

from __future__ import annotations

from math import isfinite
from typing import Any

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
        ratio = float(law.features_per_dimension(alpha, importance))
    if not (isfinite(ratio) and ratio > 0):
        raise PluginError(
            f"the capacity law {law.name!r} gives {ratio:g} features per dimension, but a finite number above 0 is"
            " needed: mend it"
        )
    return ratio


def kept_features(values: NDArray[np.float64], alpha: float, width: int, law: CapacityLaw) -> int:
    """F_S = min(⌊d_S · ĝ(α)⌋, F) of the alive features' importances [feature], by some law."""
    return int(features_within(width * features_per_dimension(law, alpha, values), len(values)))


def features_within(budgets: Any, n_features: int) -> NDArray[np.int64]:
    """min(⌊budget⌋, F): how many of F features fit each budget d_S · ĝ(α)."""
    return np.asarray(np.minimum(whole_below(budgets), n_features), dtype=np.int64)
