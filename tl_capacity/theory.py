"""Closed forms of the minimum-width theorem: how many sparse features a width can hold, and the loss that a narrower
student cannot avoid.

Pure functions of floats, numpy arrays or torch tensors; what goes in decides what comes out. Equations and symbols
follow Sarkar & Deka 2026 (arXiv:2604.04037). Everything is computed in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tl_capacity.runtime.rounding import whole_below

if TYPE_CHECKING:
    import torch

    Numeric = TypeVar("Numeric", float, NDArray[np.floating[Any]], torch.Tensor)
    Values = Sequence[float] | NDArray[Any] | torch.Tensor
else:  # torch is not imported for those who have no tensors
    Numeric = TypeVar("Numeric")
    Values = Any

__all__ = [
    "budget",
    "capacity",
    "critical_width",
    "dense_latents",
    "heterogeneous_critical_width",
    "kept_features",
    "lost_importance",
    "naive_floor",
    "refined_floor",
    "sparsity",
]


def sparsity(l0: Numeric, n_features: Numeric | int) -> Numeric:
    """Sparsity α = 1 − L0/F.

    Args:
        l0: L0, the mean number of active features per counted token.
        n_features: F, the number of alive features.

    Returns:
        α in [0, 1].

    Raises:
        ValueError: unless 0 < F < ∞ and 0 ≤ L0 ≤ F.

    >>> round(sparsity(218.29, 28665), 8)
    0.99238479
    """
    features = _within("n_features", n_features, lambda f: (f > 0) & np.isfinite(f), "0 < F < ∞")
    active = _within("l0", l0, lambda a: (a >= 0) & (a <= features), f"0 ≤ L0 ≤ F = {_shown(n_features)}")
    result: Numeric = _like(1.0 - active / features, l0, n_features)
    return result


def capacity(alpha: Numeric) -> Numeric:
    """Capacity function g(α) = 1 / ((1−α) ln(1/(1−α))), in features per dimension (arXiv:2604.04037, eq. 2).

    Raises:
        ValueError: unless 0 < α < 1.

    >>> round(capacity(0.99238495), 4)
    26.9227
    """
    result: Numeric = _like(_capacity(alpha), alpha)
    return result


def budget(width: Numeric | int, alpha: Numeric) -> Numeric:
    """Geometric budget d·g(α): how many features of sparsity α a width d can encode.

    Raises:
        ValueError: unless 0 ≤ d < ∞ and 0 < α < 1.

    >>> round(budget(128, 0.98828125), 1)
    2456.4
    """
    result: Numeric = _like(_budget(width, alpha), alpha, width)
    return result


def critical_width(n_features: Numeric | int, alpha: Numeric) -> Numeric:
    """Critical width d* = F / g(α), the narrowest student that the theory lets keep every feature.

    Identical to L0 · ln(F/L0), so it depends mostly on the dictionary's L0.

    Raises:
        ValueError: unless 0 ≤ F < ∞ and 0 < α < 1.

    >>> round(critical_width(2048, 0.98828125), 1)
    106.7
    """
    features = _features(n_features)
    result: Numeric = _like(features / _capacity(alpha), alpha, n_features)
    return result


def heterogeneous_critical_width(firing_rates: Values) -> Any:
    """Heterogeneous critical width Σᵢ pᵢ ln(1/pᵢ), summed over the last axis; needs no alive threshold.

    Equals `critical_width` where all rates are equal, and is never larger (p ln(1/p) is concave). Latents with p > 1/e,
    whose term falls again as they fire more, are counted by `dense_latents`.

    Args:
        firing_rates: p [..., feature], each feature's share of counted tokens on which it is active.

    Raises:
        ValueError: unless every rate lies in [0, 1].

    >>> round(heterogeneous_critical_width([0.1, 0.02, 0.0]), 4)
    0.3085
    """
    rates = _within("firing_rates", firing_rates, lambda p: (p >= 0) & (p <= 1), "0 ≤ p ≤ 1")
    terms = rates * -np.log(np.where(rates > 0, rates, 1.0))
    return _like(np.atleast_1d(terms).sum(axis=-1), firing_rates)


def dense_latents(firing_rates: Values) -> int:
    """How many latents fire on more than 1/e of all tokens. They are too dense for the sparse regime that g(α)
    describes.

    >>> dense_latents([0.9, 0.4, 0.3])
    2
    """
    rates = _within("firing_rates", firing_rates, lambda p: (p >= 0) & (p <= 1), "0 ≤ p ≤ 1")
    return int((rates > np.exp(-1)).sum())


def kept_features(width: Numeric | int, alpha: Numeric, n_features: Numeric | int) -> Any:
    """Features that a student keeps: F_S = min(⌊d_S · g(α)⌋, F), the most important ones.

    Returns:
        An int for plain numbers, an int64 array or tensor otherwise.

    Raises:
        ValueError: unless 0 ≤ d_S < ∞, 0 < α < 1 and 0 ≤ F < ∞.

    >>> kept_features([32, 512], 0.98828125, 2048)
    array([ 614, 2048])
    """
    features = _features(n_features)
    kept = np.minimum(whole_below(_budget(width, alpha)), whole_below(features)).astype(np.int64)
    return _like(kept, width, alpha, n_features, keep_dtype=False)


def lost_importance(importance: Values, kept: Any) -> Any:
    """Σ_{i > kept} I_(i): the importance of all but the `kept` most important features, in the importance's own unit.

    Args:
        importance: I [feature], in any order.
        kept: how many features are kept; an int or an array of them.

    Raises:
        ValueError: where an importance is negative or not finite, or `kept` is negative.

    >>> lost_importance([1.0, 4.0, 2.0], [0, 1, 3])
    array([7., 3., 0.])
    """
    counts = _within("kept", kept, lambda k: k >= 0, "kept ≥ 0").astype(np.int64)
    # Summed from the least important, so that the tiny terms of a long tail are not rounded away against the large
    # ones.
    tail = np.concatenate([[0.0], np.cumsum(np.sort(_importance(importance)))])
    return _like(tail[np.maximum(len(tail) - 1 - counts, 0)], importance)


def refined_floor(importance: Values, width: Any, alpha: Any) -> Any:
    """Refined loss floor L*(d_S) = Σ_{i > F_S} I_(i), I sorted descending (arXiv:2604.04037), in the importance's own
    unit.

    Args:
        importance: I [feature] of the alive features, in any order; F is their number.
        width: d_S, one width or an array of them.
        alpha: sparsity α of the features.

    Raises:
        ValueError: where an importance is negative or not finite, d_S < 0, or α lies outside (0, 1).

    >>> refined_floor([1.0, 4.0, 2.0], width=[0.0, 0.5, 1.0], alpha=0.5)  # g(½) = 2.885
    array([7., 3., 1.])
    """
    kept = np.asarray(kept_features(_width(width), _array(alpha), _importance(importance).size))
    return _like(np.asarray(lost_importance(_importance(importance), kept)), importance)


def naive_floor(importance: Values, width: Any, alpha: Any) -> Any:
    """Naive loss floor L_∞ · max(0, 1 − d_S g(α)/F), with all F features equally important.

    L_∞ = Σ I is the loss of keeping nothing. Arguments and errors as in `refined_floor`.

    >>> naive_floor([1.0, 4.0, 2.0], width=[0.0, 0.5, 1.0], alpha=0.5).round(3)
    array([7.   , 3.634, 0.267])
    """
    values, budgets = _importance(importance), _budget(width, alpha)
    share = 1.0 - budgets / values.size if values.size else np.zeros_like(budgets)
    return _like(values.sum() * np.maximum(0.0, share), importance)


def _capacity(alpha: Any) -> NDArray[np.float64]:
    sparsities = _within("alpha", alpha, lambda a: (a > 0) & (a < 1), "0 < α < 1")
    # log1p, because 1 − α is 1 for the smallest α; for the smallest of all the reciprocal is no float, and a width of 0
    # must still hold nothing.
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(1.0 / ((1.0 - sparsities) * -np.log1p(-sparsities)), np.finfo(np.float64).max))


def _budget(width: Any, alpha: Any) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # a budget that no float holds is infinite
        return np.asarray(_width(width) * _capacity(alpha))


def _width(width: Any) -> NDArray[np.float64]:
    return _within("width", width, lambda d: (d >= 0) & np.isfinite(d), "0 ≤ d < ∞")


def _features(n_features: Any) -> NDArray[np.float64]:
    return _within("n_features", n_features, lambda f: (f >= 0) & np.isfinite(f), "0 ≤ F < ∞")


def _importance(importance: Any) -> NDArray[np.float64]:
    values = _within("importance", importance, lambda i: (i >= 0) & np.isfinite(i), "0 ≤ I < ∞")
    if values.ndim != 1:
        raise ValueError(
            f"importance has shape {values.shape}, not one value per feature: pass a one-dimensional array"
        )
    return values


def _within(name: str, value: Any, holds: Callable[[NDArray[np.float64]], Any], domain: str) -> NDArray[np.float64]:
    """`value` in float64, or a ValueError that names the first value outside the domain."""
    array = _array(value)
    wrong = ~np.asarray(holds(array), dtype=bool)  # comparisons with NaN are false, so NaN is always outside
    if wrong.any():
        first = np.broadcast_to(array, wrong.shape)[wrong].flat[0]
        raise ValueError(f"{name} = {first:.8g} is outside its domain {domain}")
    return array


def _array(value: Any) -> NDArray[np.float64]:
    if _is_tensor(value):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _like(result: Any, *inputs: Any, keep_dtype: bool = True) -> Any:
    """`result` in the richest type among the inputs: a tensor, else an array, else a plain number."""
    result = np.asarray(result)
    for value in inputs:
        if _is_tensor(value):
            torch = sys.modules["torch"]
            dtype = value.dtype if value.is_floating_point() and keep_dtype else None
            return torch.as_tensor(result, device=value.device, dtype=dtype)
    if result.ndim == 0:
        return result.item()
    for value in inputs:
        if keep_dtype and isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            return result.astype(value.dtype)
    return result


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # who holds a tensor has imported torch; who does not need not pay for it
    return torch is not None and isinstance(value, torch.Tensor)


def _shown(value: Any) -> str:
    array = np.asarray(_array(value))
    return f"{array.flat[0]:.8g}" if array.size == 1 else "its n_features"
