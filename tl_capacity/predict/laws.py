"""Capacity laws, asked safely: how many features a width keeps, and which width keeps so many features."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError, PluginError, plugin_code
from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.runtime.rounding import whole_above, whole_below

if TYPE_CHECKING:
    from tl_capacity.results.hook import HookMeasurement

WIDEST = 2**31
"""The largest width that is searched."""


def context_at(hook: HookMeasurement, importance: NDArray[np.float64], alpha: float) -> CapacityContext:
    """What a law is told about a hook point, for these importances of its alive features and their sparsity."""
    return CapacityContext(alpha, importance, hook.width, hook.teacher_width)


def knows_enough(law: CapacityLaw, at: CapacityContext) -> bool:
    """Whether a law can be asked.

    A law that overrides `kept` may need widths that a bare curve does not have.
    """
    return _is_per_dimension(law) or bool(at.hook_width and at.teacher_width)


def budgets(law: CapacityLaw, widths: Sequence[int], at: CapacityContext) -> NDArray[np.float64]:
    """d_S · ĝ for each width d_S, by one law: the number of features that it keeps, before rounding down.

    Raises:
        CapacityError: where the law needs widths that are not known.
        PluginError: where the law fails, or gives numbers that are none of features.
    """
    if _is_per_dimension(law):
        return np.array(widths) * _features_per_dimension(law, at)
    return np.array([_kept(law, width, at) for width in widths])


def kept_features(law: CapacityLaw, width: int, at: CapacityContext) -> int:
    """F_S = min(⌊d_S · ĝ⌋, F), by one law."""
    return int(features_within(budgets(law, [width], at), at.n_features)[0])


def features_within(budgets: Any, n_features: int) -> NDArray[np.int64]:
    """min(⌊budget⌋, F): how many of F features fit each budget d_S · ĝ(α)."""
    return np.asarray(np.minimum(whole_below(budgets), n_features), dtype=np.int64)


def exact_width(law: CapacityLaw, features: int, at: CapacityContext) -> float:
    """The narrowest width d_S that keeps so many features, by one law.

    It is not a whole number if the law is linear in the width.

    Raises:
        CapacityError: where no width keeps as many.
    """
    if _is_per_dimension(law):
        return features / _features_per_dimension(law, at)
    if features <= 0:
        return 0.0

    def enough(width: int) -> bool:
        return bool(whole_below(_kept(law, width, at)) >= features)

    wide = 1
    while not enough(wide):
        wide *= 2
        if wide > WIDEST:
            raise CapacityError(
                f"no width up to {WIDEST:,} keeps {features:,} features by the capacity law {law.name!r}: ask for fewer"
            )
    return float(bisect_left(range(wide), True, lo=wide // 2, key=enough))


def narrowest_width(law: CapacityLaw, features: int, at: CapacityContext) -> int:
    """The narrowest whole width d_S with ⌊d_S · ĝ⌋ ≥ `features`, by some law."""
    return int(whole_above(exact_width(law, features, at)))


def _is_per_dimension(law: CapacityLaw) -> bool:
    return getattr(type(law), "kept", CapacityLaw.kept) is CapacityLaw.kept


def _features_per_dimension(law: CapacityLaw, at: CapacityContext) -> float:
    with plugin_code("capacity law", law.name, law.features_per_dimension):
        ratio = float(law.features_per_dimension(at.alpha, at.importance))
    if not (isfinite(ratio) and ratio > 0):
        raise PluginError(
            f"the capacity law {law.name!r} gives {ratio:g} features per dimension, but a finite number above 0 is"
            " needed: fix it"
        )
    return ratio


def _kept(law: CapacityLaw, width: int, at: CapacityContext) -> float:
    if not knows_enough(law, at):
        raise CapacityError(
            f"the capacity law {law.name!r} asks for the widths of the hook point and of the teacher, which are not"
            " known here: measure again, or write the teacher's width as `d_model` into the curve's file"
        )
    with plugin_code("capacity law", law.name, law.kept):
        kept = float(law.kept(width, at))
    if not (isfinite(kept) and kept >= 0):
        raise PluginError(
            f"the capacity law {law.name!r} keeps {kept:g} features at width {width:,}, but a finite number of at"
            " least 0 is needed: fix it"
        )
    return kept
