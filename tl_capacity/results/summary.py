"""FeatureSummary: what the sums of one SAE say. It needs numpy alone, so a saved measurement is read without importing
torch.

Sums are kept per *document group*: a document belongs to one of 64 groups by a hash of its number, and the document
bootstrap resamples groups. So every figure has an interval clustered by document, any two shards merge exactly, and
memory is O(groups · features) whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import exp, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import CapacityError, NothingCountedError, plugin_code
from tl_capacity.interfaces import FeatureSums
from tl_capacity.results.estimate import Estimate, document_resamples, estimate_around
from tl_capacity.text.counting import MASK_REASONS

SUMS_AT_ONCE = 2**19
"""Replicates times latents whose sums are in memory at once: 4 MB for each array, so that a block stays in a cache."""
THRESHOLDS = (0.0, 1e-6, 1e-5, 1e-4)
"""Firing rates for which F is reported; the paper's alive threshold is 1e-5."""


@dataclass(frozen=True)
class FeatureSummary:
    """Everything derived from the sums of one SAE. Every figure is an `Estimate` with a document-bootstrap interval.

    Attributes:
        arrays: the arrays of `FeatureStatistics.tensors`.
        alive_threshold: a feature is alive where its firing rate exceeds this.
    """

    arrays: Mapping[str, NDArray[Any]]
    alive_threshold: float = 1e-5

    def __post_init__(self) -> None:
        self.check_threshold(self.alive_threshold)
        if self.n_tokens == 0:
            masked = int(self.arrays["masked"].sum())
            reason = f"all {masked:,} tokens were masked" if masked else "no tokens were seen"
            raise NothingCountedError(
                f"nothing was counted: {reason}; run the model on text that is not padding or special tokens"
            )

    @staticmethod
    def check_threshold(threshold: float) -> None:
        """Check that an alive threshold is a firing rate."""
        if not 0 <= threshold < 1:
            raise CapacityError(
                f"alive_threshold = {threshold} is not a firing rate: choose one in [0, 1), such as the paper's 1e-5"
            )

    @property
    def n_tokens(self) -> int:
        """Counted tokens."""
        return int(self.arrays["tokens"].sum())

    @property
    def n_documents(self) -> int:
        """Documents with a counted token."""
        return int(self.arrays["documents"].sum())

    @property
    def d_sae(self) -> int:
        """Latents of the SAE, alive or not."""
        return int(self.arrays["counts"].shape[1])

    @property
    def masked(self) -> dict[str, int]:
        """Tokens that do not count, by reason."""
        return dict(zip(MASK_REASONS, self.arrays["masked"].tolist(), strict=True))

    @property
    def masked_norm_share(self) -> float:
        """Share of Σ‖x‖² on masked tokens other than padding, which counting them would have added."""
        masked, counted = float(self.arrays["masked_norm"][0]), float(self.arrays["counted_norm"][0])
        return masked / (masked + counted) if masked + counted > 0 else 0.0

    @cached_property
    def firing_rates(self) -> NDArray[np.float64]:
        """p [feature]: share of counted tokens on which each latent is active."""
        return np.asarray(self.arrays["counts"].sum(0) / self.n_tokens)

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """[feature] whether the firing rate exceeds the alive threshold."""
        return np.asarray(self.firing_rates > self.alive_threshold)

    @property
    def n_alive(self) -> Estimate:
        """F, the number of alive features."""
        return self._count("n_alive")

    @property
    def alive_at(self) -> dict[float, Estimate]:
        """F at each of `THRESHOLDS`."""
        return {threshold: self._count(f"alive_at_{threshold}") for threshold in THRESHOLDS}

    @property
    def l0(self) -> Estimate:
        """L0, the mean number of active features per counted token."""
        return self._headline["l0"]

    @property
    def alpha(self) -> Estimate:
        """α = 1 − L0/F."""
        return self._headline["alpha"]

    @property
    def capacity(self) -> Estimate:
        """g(α), features per dimension."""
        return self._headline["capacity"]

    @property
    def critical_width(self) -> Estimate:
        """d* = F/g(α)."""
        return self._headline["critical_width"]

    @property
    def heterogeneous_critical_width(self) -> Estimate:
        """d*_het = Σ p ln(1/p)."""
        return self._headline["heterogeneous_critical_width"]

    @property
    def dense_latents(self) -> Estimate:
        """Number of latents that fire on more than 1/e of the tokens."""
        return self._count("dense_latents")

    @property
    def fvu(self) -> Estimate | None:
        """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², or None where no reconstruction was checked."""
        return self._of_reconstruction("fvu")

    @property
    def explained_variance(self) -> Estimate | None:
        """1 − FVU."""
        return self._of_reconstruction("explained_variance")

    @property
    def reconstruction_error(self) -> Estimate | None:
        """E‖x − x̂‖² per token, in squared activations, or None where no reconstruction was checked."""
        return self._of_reconstruction("reconstruction_error")

    def firing_rate_histogram(self, bins_per_decade: int = 4) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
        """`(edges, features per bin, features that never fired)` of the firing rates, on a logarithmic scale down to
        one token in all.
        """
        lowest = min(np.floor(np.log10(1 / self.n_tokens) * bins_per_decade), -1)
        edges = 10 ** (np.arange(lowest, 1) / bins_per_decade)
        fired = self.firing_rates[self.firing_rates > 0]
        counts = np.histogram(np.clip(fired, edges[0], edges[-1]), edges)[0]
        return edges, counts.astype(np.int64), self.d_sae - len(fired)

    @property
    def features_chao2(self) -> Estimate:
        """Chao2's estimate of how many latents can fire at all, seen or not, with Chao's log-normal interval.

        F_obs + (m−1)/m · Q₁(Q₁−1) / (2(Q₂+1)), the bias-corrected form, where Q₁ and Q₂ features were seen in exactly
        one and two of m documents (Chao 1987; Colwell 2013, EstimateS). A lower bound on the richness, capped at the
        SAE's size.
        """
        incidence, m = self.arrays["incidence"], self.n_documents
        seen = int((incidence > 0).sum())
        once, twice = int((incidence == 1).sum()), int((incidence == 2).sum())
        if m < 2:
            return Estimate(float(seen))
        share = (m - 1) / m
        unseen = share * once * (once - 1) / (2 * (twice + 1))
        variance = share * once * (once - 1) / (2 * (twice + 1))
        variance += share**2 * once * (2 * once - 1) ** 2 / (4 * (twice + 1) ** 2)
        variance += share**2 * once**2 * twice * (once - 1) ** 2 / (4 * (twice + 1) ** 4)
        if unseen <= 0:
            return Estimate(float(seen), float(seen), float(seen))
        spread = exp(1.959964 * sqrt(log(1 + variance / unseen**2)))
        cap = float(self.d_sae)
        return Estimate(min(seen + unseen, cap), min(seen + unseen / spread, cap), min(seen + unseen * spread, cap))

    def importance(self, compute: Callable[[FeatureSums], NDArray[np.float64]], estimator: str) -> NDArray[np.float64]:
        """Importance [feature] of the alive features, in the SAE's own order."""
        return self._whole.importance(compute, estimator)[self.alive]

    def estimates(self, statistic: Callable[[Resample], Sequence[float]]) -> list[Estimate]:
        """Estimates of several statistics of the sums, each with the percentile interval of the document bootstrap.

        How many features no document showed is another question: `features_chao2`.
        """
        values = np.asarray(statistic(self._whole), dtype=np.float64)
        draws = document_resamples(self.arrays["tokens"])
        if draws is None:
            return [Estimate(float(v)) for v in values]
        replicates = np.array([statistic(resample) for resample in self._resamples(draws)], dtype=np.float64)
        return [estimate_around(value, column) for value, column in zip(values, replicates.T, strict=True)]

    def _resamples(self, draws: NDArray[np.float64]) -> Iterator[Resample]:
        """A resample for each row of weights [replicate, group]."""
        at_once = max(1, SUMS_AT_ONCE // self.d_sae)
        for first in range(0, len(draws), at_once):
            sums = GroupSums(self._floats, draws[first : first + at_once])
            yield from (Resample(sums, place) for place in range(len(sums.weights)))

    @cached_property
    def _headline(self) -> dict[str, Estimate]:
        names = list(self._headline_of(self._whole))
        values = self.estimates(lambda sums: list(self._headline_of(sums).values()))
        return dict(zip(names, values, strict=True))

    def _count(self, name: str) -> Estimate:
        """A headline figure that counts latents, of which there are no more than the SAE has."""
        return self._headline[name].within(0.0, float(self.d_sae))

    def _of_reconstruction(self, name: str) -> Estimate | None:
        """A headline figure that needs the reconstruction; None if that was not checked."""
        return self._headline[name] if self.arrays["fvu_tokens"].sum() > 0 else None

    def sparsity_of(self, sums: Resample) -> float:
        """α of some resampled sums; NaN where nothing is alive."""
        alive = int((sums.rates > self.alive_threshold).sum())
        return 1 - float(sums.rates.sum()) / alive if alive else float("nan")

    def _headline_of(self, sums: Resample) -> dict[str, float]:
        """The headline figures of some resampled sums."""
        alive, alpha = float((sums.rates > self.alive_threshold).sum()), self.sparsity_of(sums)
        capacity = theory.capacity(alpha) if 0 < alpha < 1 else float("nan")
        rates = np.minimum(sums.rates, 1.0)
        return {
            "n_alive": alive,
            "l0": float(sums.rates.sum()),
            "alpha": alpha,
            "capacity": capacity,
            "critical_width": alive / capacity,
            "heterogeneous_critical_width": theory.heterogeneous_critical_width(rates),
            "dense_latents": float(theory.dense_latents(rates)),
            "fvu": sums.fvu,
            "explained_variance": 1 - sums.fvu,
            "reconstruction_error": sums.reconstruction_error,
            **{f"alive_at_{threshold}": float((sums.rates > threshold).sum()) for threshold in THRESHOLDS},
        }

    @cached_property
    def _floats(self) -> dict[str, NDArray[Any]]:
        return {name: array.astype(np.float64, copy=False) for name, array in self.arrays.items()}

    @cached_property
    def _whole(self) -> Resample:
        return Resample(GroupSums(self._floats, np.ones((1, len(self.arrays["tokens"])))), 0)


@dataclass(frozen=True)
class GroupSums:
    """Sums over document groups for several replicates at once: a matrix product reads the groups once for all of them.

    Attributes:
        arrays: [group, ...]
        weights: [replicate, group] how often each replicate counts each group.
    """

    arrays: Mapping[str, NDArray[Any]]
    weights: NDArray[np.float64]
    taken: dict[str, NDArray[Any]] = field(default_factory=dict)

    def of(self, name: str) -> NDArray[Any]:
        """An array summed over groups [replicate, ...]; computed on first use."""
        if name not in self.taken:
            self.taken[name] = np.tensordot(self.weights, self.arrays[name], 1)
        return self.taken[name]


@dataclass(frozen=True)
class Resample:
    """The sums over documents of one replicate.

    Attributes:
        sums: of this replicate and others.
        place: of this replicate among them.
    """

    sums: GroupSums
    place: int

    def total(self, name: str) -> Any:
        """An array summed over document groups, each counted as often as the replicate draws it."""
        return self.sums.of(name)[self.place]

    @property
    def tokens(self) -> float:
        return float(self.total("tokens"))

    @cached_property
    def rates(self) -> NDArray[np.float64]:
        """Firing rate [feature]."""
        return np.asarray(self.total("counts") / self.tokens)

    @property
    def reconstruction_error(self) -> float:
        """E‖x − x̂‖² per token; NaN where no reconstruction was checked."""
        count = float(self.total("fvu_tokens"))
        return float(self.total("residual")) / count if count else float("nan")

    @property
    def fvu(self) -> float:
        count = float(self.total("fvu_tokens"))
        if count == 0:
            return float("nan")
        mean_square = float((self.total("mean_sum") ** 2).sum()) / count
        variance = float(self.total("energy")) - mean_square
        return float(self.total("residual")) / variance if variance > 0 else float("nan")

    def importance(self, compute: Callable[[FeatureSums], NDArray[np.float64]], estimator: str) -> NDArray[np.float64]:
        """Importance [feature] of every latent.

        Raises:
            CapacityError: where the estimator fails, or returns another shape, or negative or non-finite values.
        """
        prefix = f"state/{estimator}/"
        sums = FeatureSums(
            tokens=self.tokens,
            counts=self.total("counts"),
            sums=self.total("sums"),
            squares=self.total("squares"),
            decoder_norm=self.sums.arrays["decoder_norm"],
            state={k.removeprefix(prefix): self.total(k) for k in self.sums.arrays if k.startswith(prefix)},
        )
        with plugin_code("importance estimator", estimator, compute):
            importance = np.asarray(compute(sums), dtype=np.float64)
        expected = (len(sums.counts),)
        if importance.shape != expected:
            raise CapacityError(
                f"the importance estimator {estimator!r} returned shape {importance.shape} instead of {expected}: "
                "return one importance for each feature"
            )
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise CapacityError(
                f"the importance estimator {estimator!r} returned negative or non-finite values: importances must be"
                " finite and ≥ 0"
            )
        return importance
