"""The toy data of Elhage et al. 2022: sparse features, uniform on [0, 1] if active, and their importances."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

CORRELATIONS = ("independent", "correlated", "anticorrelated")


@dataclass(frozen=True)
class FeatureDistribution:
    """n features. Each is zero with probability α and is otherwise drawn from U[0, 1].

    Attributes:
        n: number of features.
        alpha: sparsity α = P(xᵢ = 0).
        correlation: `independent`; or features 2k and 2k+1 (from 0) are active together (`correlated`), or never
            together (`anticorrelated`), with α as it was.

    Raises:
        ValueError: unless n ≥ 1, 0 < α < 1, and for pairs an even n, and for pairs that exclude each other α > ½.
    """

    n: int
    alpha: float
    correlation: str = "independent"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n = {self.n} is not a number of features: pass at least 1")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha = {self.alpha:.8g} is outside its domain 0 < α < 1")
        if self.correlation not in CORRELATIONS:
            raise ValueError(
                f"{self.correlation!r} is not a correlation of features: choose one of {', '.join(CORRELATIONS)}"
            )
        if self.n % self._group_size:
            raise ValueError(f"n = {self.n} features cannot be paired: pass an even n, or independent features")
        if self.correlation == "anticorrelated" and self.alpha <= 0.5:
            raise ValueError(f"alpha = {self.alpha:.8g} is too small for pairs that exclude each other: pass α > 0.5")

    @property
    def second_moment(self) -> float:
        """E[xᵢ²] = (1−α)/3."""
        return (1 - self.alpha) / 3

    @property
    def variance(self) -> float:
        """Var[xᵢ] = E[xᵢ²] − E[xᵢ]², with E[xᵢ] = (1−α)/2: the loss of a feature that is predicted by its mean."""
        return self.second_moment - ((1 - self.alpha) / 2) ** 2

    @cached_property
    def zero_probability(self) -> float:
        """P₀, the probability that no feature is active."""
        return float((1 - self._group_rate) ** self._groups)

    def sample(self, rows: int, random: np.random.Generator) -> Float[np.ndarray, "feature row"]:
        """Samples from the distribution. Most are zero if α is high."""
        return self._values(random.random((self._groups, rows), dtype=np.float32) < self._group_rate, random)

    def sample_nonzero(self, rows: int, random: np.random.Generator) -> Float[np.ndarray, "feature row"]:
        """Samples with at least one active feature. P₀ is the weight of the others.

        The first active group j has P(first ≤ j) = (1 − q^(j+1)) / (1 − P₀), where q is the probability that a group is
        silent, and is drawn by inversion. The groups before it are silent and those after it independent of it.
        """
        uniform = random.random(rows)
        first = np.zeros(rows)
        if self._group_rate < 1:
            first = np.minimum(
                np.log1p(-uniform * (1 - self.zero_probability)) // np.log1p(-self._group_rate), self._groups - 1
            )
        group = np.arange(self._groups)[:, None]
        active = random.random((self._groups, rows), dtype=np.float32) < self._group_rate
        return self._values((active & (group > first)) | (group == first), random)

    @property
    def _group_size(self) -> int:
        return 1 if self.correlation == "independent" else 2

    @property
    def _groups(self) -> int:
        return self.n // self._group_size

    @property
    def _group_rate(self) -> float:
        """Probability that a group has an active feature."""
        return (1 - self.alpha) * (2 if self.correlation == "anticorrelated" else 1)

    def _values(self, active: NDArray[np.bool_], random: np.random.Generator) -> Float[np.ndarray, "feature row"]:
        """Feature values, given the active groups."""
        active = np.repeat(active, self._group_size, axis=0)
        if self.correlation == "anticorrelated":
            second = np.repeat(random.random((self._groups, active.shape[1]), dtype=np.float32) < 0.5, 2, axis=0)
            active &= second == (np.arange(self.n) % 2 == 1)[:, None]
        return random.random(active.shape, dtype=np.float32) * active


def zipf_importance(n: int, slope: float = 1.0) -> Float[np.ndarray, " feature"]:
    """Importances Iᵢ = i^−s of n features, not normalised. s = 1 is Zipf's law; at s = 0 all are equal.

    Raises:
        ValueError: unless n ≥ 1 and s ≥ 0, so that features are in the order of their importance.
    """
    if n < 1 or not 0 <= slope < np.inf:
        raise ValueError(
            f"n = {n} features with slope = {slope:.8g} have no importances: pass n ≥ 1 and a finite slope ≥ 0"
        )
    return np.asarray(np.arange(1, n + 1, dtype=np.float64) ** -slope)
