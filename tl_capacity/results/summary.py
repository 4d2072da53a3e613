"""FeatureSummary: what the sums of one SAE say, in numpy alone, so that a saved measurement is read without importing
torch.

Sums are kept per *document group*: a document belongs to one of 64 groups by a hash of its number, and the document
bootstrap resamples groups. So every figure has an interval clustered by document, any two shards merge exactly, and
memory is O(groups · features) whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, floor, isfinite, log, log10, sqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import CapacityError, MeasurementError, plugin_code
from tl_capacity.interfaces import FeatureSums

DOCUMENT_GROUPS = 64
THRESHOLDS = (0.0, 1e-6, 1e-5, 1e-4)
"""Firing rates above which F is reported; the paper's alive threshold is 1e-5."""
REPLICATES = 200
MASK_REASONS = ("padding", "special", "position")
MIN_GROUPS_FOR_INTERVAL = 8

SUMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "counts": ("int64", ("group", "feature")),  # tokens on which the feature is active (z ≠ 0)
    "sums": ("float64", ("group", "feature")),  # Σ z
    "squares": ("float64", ("group", "feature")),  # Σ z²
    "tokens": ("int64", ("group",)),  # counted tokens
    "documents": ("int64", ("group",)),  # documents with a counted token
    "incidence": ("int64", ("feature",)),  # documents in which the feature is active
    "masked": ("int64", ("reason",)),  # tokens left out, by MASK_REASONS
    "counted_norm": ("float64", ("one",)),  # Σ‖x‖² over counted tokens
    "masked_norm": ("float64", ("one",)),  # Σ‖x‖² over masked tokens other than padding
    "fvu_tokens": ("int64", ("group",)),  # tokens on which the reconstruction was checked
    "residual": ("float64", ("group",)),  # Σ‖x − x̂‖² over those
    "energy": ("float64", ("group",)),  # Σ‖x‖² over those
    "mean_sum": ("float64", ("group", "width")),  # Σ x over those
    "decoder_norm": ("float64", ("feature",)),  # ‖w_dec,i‖, a property of the SAE and no sum
}
"""Every sum by name: its type and axes. Estimators' own sums, named `state/estimator/key`, come beside these."""

Sums = TypeVar("Sums", bound=Any)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over documents; `low` and `high` are None where there are too few documents to
    say.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The three numbers, null where undefined."""
        return {name: value if value is not None and isfinite(value) else None for name, value in vars(self).items()}

    def show(self, digits: str = ",.1f") -> str:
        """`value [low, high]`, or the value alone where no interval can be given."""
        if not isfinite(self.value):
            return "undefined"
        interval = "" if self.low is None or self.high is None else f" [{self.low:{digits}}, {self.high:{digits}}]"
        return f"{self.value:{digits}}{interval}"

    def within(self, least: float, most: float = float("inf")) -> Estimate:
        """The same with an interval that does not leave [least, most], as a shifted one of a count or a share may."""
        low, high = (None if end is None else min(max(end, least), most) for end in (self.low, self.high))
        return Estimate(self.value, low, high)


def significant(value: float, digits: int = 4) -> str:
    """The format in which a number has so many significant digits, and the ends of its interval as many decimals: no
    powers of ten but for tiny ones.
    """
    if not isfinite(value) or abs(value) < 1e-4:
        return f".{digits}g"
    return f",.{max(0, digits - 1 - floor(log10(abs(value))))}f"


def document_resamples(tokens: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """How often each replicate of the document bootstrap takes each document group [replicate, group]; None where too
    few groups have a token.
    """
    occupied = np.flatnonzero(tokens)
    if len(occupied) < MIN_GROUPS_FOR_INTERVAL:
        return None
    weights = np.zeros((REPLICATES, len(tokens)))
    weights[:, occupied] = np.random.default_rng(0).multinomial(
        len(occupied), np.full(len(occupied), 1 / len(occupied)), size=REPLICATES
    )
    return weights


def estimate_around(value: float, replicates: NDArray[np.float64]) -> Estimate:
    """An estimate with the 95% percentile interval of its replicates [replicate].

    The replicates are shifted so that their mean lies on the estimate: a resample repeats some documents and leaves
    others out, so rare features vanish from it and counts of features come out low.
    """
    defined = replicates[
        np.isfinite(replicates)
    ]  # a resample may miss every document on which the statistic is defined
    if len(defined) < 0.9 * len(replicates) or not isfinite(value):
        return Estimate(float(value))
    low, high = np.percentile(defined, [2.5, 97.5]) - defined.mean()
    return Estimate(float(value), float(value + min(low, 0)), float(value + max(high, 0)))


def merge_sums(mine: Mapping[str, Sums], theirs: Mapping[str, Sums]) -> dict[str, Sums]:
    """The sums (arrays or tensors) of two disjoint sets of documents together.

    Raises:
        MeasurementError: where they are not of the same SAE and estimators.
    """
    if mine.keys() != theirs.keys():
        odd = ", ".join(sorted(mine.keys() ^ theirs.keys()))
        raise MeasurementError(
            f"the shards accumulated different statistics ({odd}): measure both with the same importance estimators"
        )
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise MeasurementError(
                f"{name} has shape {tuple(value.shape)} in one shard and {tuple(theirs[name].shape)} in the other: not"
                " the same SAE"
            )
    if not bool((mine["decoder_norm"] == theirs["decoder_norm"]).all()):
        raise MeasurementError("the shards' decoder norms differ: they were measured with different SAE weights")
    return {name: value if name == "decoder_norm" else value + theirs[name] for name, value in mine.items()}


def check_sums(arrays: Mapping[str, NDArray[Any]], where: str) -> None:
    """Whether `arrays` are whole sums of one SAE.

    Raises:
        MeasurementError: where one is missing, or its type or shape does not fit the others.
    """
    sizes: dict[str, int] = {"one": 1, "reason": len(MASK_REASONS)}
    for name, (dtype, axes) in SUMS.items():
        array = arrays.get(name)
        if array is None:
            raise MeasurementError(f"{where} lacks the statistics {name!r}: the measurement was altered, measure again")
        fits = array.ndim == len(axes) and all(
            sizes.setdefault(axis, size) == size for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != dtype:
            found = f"{array.dtype}{list(array.shape)}"
            raise MeasurementError(
                f"{name!r} in {where} is {found}, not {dtype}{list(axes)}: the measurement was altered, measure again"
            )
        if not np.isfinite(array).all() or (dtype == "int64" and (array < 0).any()):
            raise MeasurementError(
                f"{name!r} in {where} has negative counts or non-finite sums: the measurement was altered, measure"
                " again"
            )
    for name, array in arrays.items():
        if name.startswith("state/") and (array.shape[:1] != arrays["tokens"].shape or not np.isfinite(array).all()):
            raise MeasurementError(
                f"{name!r} in {where} has shape {list(array.shape)} or non-finite sums: the measurement was altered,"
                " measure again"
            )
    if (arrays["counts"] > arrays["tokens"][:, None]).any() or (arrays["incidence"] > arrays["documents"].sum()).any():
        raise MeasurementError(
            f"{where} counts latents on more tokens or documents than it has: the measurement was altered, measure"
            " again"
        )


@dataclass(frozen=True)
class FeatureSummary:
    """Everything derived from the sums of one SAE, in numpy; every figure is an `Estimate` with a document-bootstrap
    interval.

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
            raise CapacityError(
                f"nothing was counted: {reason}; run the model on text that is not padding or special tokens"
            )

    @staticmethod
    def check_threshold(threshold: float) -> None:
        """Raises `CapacityError` where an alive threshold is no firing rate."""
        if not 0 <= threshold < 1:
            raise CapacityError(
                f"alive_threshold = {threshold} is no firing rate: choose one in [0, 1), the paper's is 1e-5"
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
        """Tokens left out, by reason."""
        return dict(zip(MASK_REASONS, self.arrays["masked"].tolist(), strict=True))

    @property
    def masked_norm_share(self) -> float:
        """Share of Σ‖x‖² that lies on masked tokens other than padding: what leaving them in would have added."""
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
        return self._figures["n_alive"]

    @property
    def alive_at(self) -> dict[float, Estimate]:
        """F at each of `THRESHOLDS`."""
        return {threshold: self._figures[f"alive_at_{threshold}"] for threshold in THRESHOLDS}

    @property
    def l0(self) -> Estimate:
        """L0, the mean number of active features per counted token."""
        return self._figures["l0"]

    @property
    def alpha(self) -> Estimate:
        """α = 1 − L0/F."""
        return self._figures["alpha"]

    @property
    def capacity(self) -> Estimate:
        """g(α), features per dimension."""
        return self._figures["capacity"]

    @property
    def critical_width(self) -> Estimate:
        """d* = F/g(α)."""
        return self._figures["critical_width"]

    @property
    def heterogeneous_critical_width(self) -> Estimate:
        """d*_het = Σ p ln(1/p)."""
        return self._figures["heterogeneous_critical_width"]

    @property
    def dense_latents(self) -> Estimate:
        """Number of latents that fire on more than 1/e of the tokens."""
        return self._figures["dense_latents"]

    @property
    def fvu(self) -> Estimate | None:
        """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², or None where no reconstruction was checked."""
        return self._figures["fvu"] if self.arrays["fvu_tokens"].sum() > 0 else None

    @property
    def explained_variance(self) -> Estimate | None:
        """1 − FVU."""
        return self._figures["explained_variance"] if self.arrays["fvu_tokens"].sum() > 0 else None

    @property
    def reconstruction_error(self) -> Estimate | None:
        """E‖x − x̂‖² per token, in squared activations, or None where no reconstruction was checked."""
        return self._figures["reconstruction_error"] if self.arrays["fvu_tokens"].sum() > 0 else None

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
        """Chao2 estimate of how many latents can fire at all, seen or not, with Chao's log-normal interval.

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
        replicates = np.array([statistic(Resample(self._floats, w)) for w in draws], dtype=np.float64)
        return [estimate_around(value, column) for value, column in zip(values, replicates.T, strict=True)]

    @cached_property
    def _figures(self) -> dict[str, Estimate]:
        names = [
            "n_alive",
            "l0",
            "alpha",
            "capacity",
            "critical_width",
            "heterogeneous_critical_width",
            "dense_latents",
        ]
        names += [
            "fvu",
            "explained_variance",
            "reconstruction_error",
            *(f"alive_at_{threshold}" for threshold in THRESHOLDS),
        ]
        figures = dict(zip(names, self.estimates(self._figures_of), strict=True))
        counts = [name for name in names if "alive" in name or name == "dense_latents"]
        return figures | {name: figures[name].within(0.0, float(self.d_sae)) for name in counts}

    def sparsity_of(self, sums: Resample) -> float:
        """α of some resampled sums; NaN where nothing is alive."""
        alive = int((sums.rates > self.alive_threshold).sum())
        return 1 - float(sums.rates.sum()) / alive if alive else float("nan")

    def _figures_of(self, sums: Resample) -> list[float]:
        alive, l0, alpha = (
            float((sums.rates > self.alive_threshold).sum()),
            float(sums.rates.sum()),
            self.sparsity_of(sums),
        )
        capacity = theory.capacity(alpha) if 0 < alpha < 1 else float("nan")
        rates = np.minimum(sums.rates, 1.0)
        heterogeneous = theory.heterogeneous_critical_width(rates)
        reconstruction = [sums.fvu, 1 - sums.fvu, sums.reconstruction_error]
        at_thresholds = [float((sums.rates > t).sum()) for t in THRESHOLDS]
        return [
            alive,
            l0,
            alpha,
            capacity,
            alive / capacity,
            heterogeneous,
            float(theory.dense_latents(rates)),
            *reconstruction,
            *at_thresholds,
        ]

    @cached_property
    def _floats(self) -> dict[str, NDArray[Any]]:
        return {name: array.astype(np.float64, copy=False) for name, array in self.arrays.items()}

    @cached_property
    def _whole(self) -> Resample:
        return Resample(self._floats, np.ones(len(self.arrays["tokens"])))


@dataclass(frozen=True)
class Resample:
    """The sums over documents, each document group counted `weights` times."""

    arrays: Mapping[str, NDArray[Any]]
    weights: NDArray[np.float64]

    @property
    def tokens(self) -> float:
        return float(self.weights @ self.arrays["tokens"])

    @cached_property
    def rates(self) -> NDArray[np.float64]:
        """Firing rate [feature]."""
        return np.asarray(self.weights @ self.arrays["counts"] / self.tokens)

    @property
    def reconstruction_error(self) -> float:
        """E‖x − x̂‖² per token; NaN where no reconstruction was checked."""
        count = float(self.weights @ self.arrays["fvu_tokens"])
        return float(self.weights @ self.arrays["residual"]) / count if count else float("nan")

    @property
    def fvu(self) -> float:
        count = float(self.weights @ self.arrays["fvu_tokens"])
        if count == 0:
            return float("nan")
        mean_square = float(((self.weights @ self.arrays["mean_sum"]) ** 2).sum()) / count
        variance = float(self.weights @ self.arrays["energy"]) - mean_square
        return float(self.weights @ self.arrays["residual"]) / variance if variance > 0 else float("nan")

    def importance(self, compute: Callable[[FeatureSums], NDArray[np.float64]], estimator: str) -> NDArray[np.float64]:
        """Importance [feature] of every latent.

        Raises:
            CapacityError: where the estimator fails, or returns another shape, or negative or non-finite values.
        """
        prefix = f"state/{estimator}/"
        sums = FeatureSums(
            tokens=self.tokens,
            counts=np.asarray(self.weights @ self.arrays["counts"]),
            sums=np.asarray(self.weights @ self.arrays["sums"]),
            squares=np.asarray(self.weights @ self.arrays["squares"]),
            decoder_norm=self.arrays["decoder_norm"],
            state={
                k.removeprefix(prefix): np.tensordot(self.weights, v, 1)
                for k, v in self.arrays.items()
                if k.startswith(prefix)
            },
        )
        with plugin_code("importance estimator", estimator, compute):
            importance = np.asarray(compute(sums), dtype=np.float64)
        expected = (self.arrays["counts"].shape[1],)
        if importance.shape != expected:
            raise CapacityError(
                f"the importance estimator {estimator!r} returned shape {importance.shape}, but one value for each of"
                f" {expected} is needed"
            )
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise CapacityError(
                f"the importance estimator {estimator!r} returned negative or non-finite values: importances must be"
                " finite and ≥ 0"
            )
        return importance
