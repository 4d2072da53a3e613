"""SplicedCurve: KL of a teacher in which only its most important features pass a hook point, against how many pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.plugins import plugins
from tl_capacity.results.estimate import Estimate, document_resamples, estimate_around

GRID = 2_000
"""Number of places at which a curve is evaluated when it is read backwards."""


@dataclass(frozen=True)
class SplicedCurve:
    """KL(teacher ‖ teacher with only the most important features) at one hook point, against how many stay.

    Attributes:
        hook, sae, sae_digest, architecture, width: as in the measurement.
        order: by what features were ranked: an importance estimator, or a name that was given to an order.
        lost: what stands for a lost latent: "mean" or "zero".
        keep_error: whether the SAE's own error stays in the stream.
        kept: ascending numbers of latents that stay, from none to all that are alive; the last keeps the others too.
        kl: [group, kept] sums over the tokens of each document group, in nats.
        tokens: [group] predicted tokens.
    """

    hook: str
    sae: str
    sae_digest: str
    architecture: str
    width: int
    order: str
    lost: str
    keep_error: bool
    kept: tuple[int, ...]
    kl: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def alive(self) -> int:
        """F, the number of alive features."""
        return self.kept[-1]

    @property
    def importance(self) -> str | None:
        """The estimator that ranked the features.

        None for an order of the user's own, which has no importances for a law to look at.
        """
        return self.order if self.order in plugins().importance_estimators else None

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """KL in nats per token [kept]."""
        return np.asarray(self.kl.sum(0) / self.tokens.sum())

    @cached_property
    def replicates(self) -> NDArray[np.float64] | None:
        """KL in each replicate of the document bootstrap [replicate, kept]; None with too few documents."""
        weights = document_resamples(self.tokens)
        return None if weights is None else (weights @ self.kl) / (weights @ self.tokens)[:, None]

    def at(self, kept: int | float) -> Estimate:
        """KL in nats per token if so many features stay, with its interval over documents.

        Between the numbers that were run it is interpolated (PCHIP, over the logarithm of the number plus one).

        Raises:
            CapacityError: where `kept` is no number of the alive features.
        """
        if not 0 <= kept <= self.alive:
            raise CapacityError(
                f"{kept:,.0f} features cannot stay at {self.hook}, which has {self.alive:,} alive ones: choose a"
                f" number from 0 to {self.alive:,}"
            )
        return self._estimate(lambda curves: _interpolated(self.kept, curves, np.array([float(kept)]))[:, 0])

    def values(self, kept: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """KL in nats per token [number] for several numbers of features that stay, without intervals."""
        return np.asarray(_interpolated(self.kept, self.mean[None], np.asarray(kept, dtype=np.float64))[0])

    def features_for(self, kl: int | float, draws: NDArray[np.float64] | None = None) -> Estimate | None:
        """How many features must stay for at most this KL in nats per token, with its interval over documents.

        None if not even all of them are enough.

        Args:
            kl: in nats per token.
            draws: [replicate] the same KL drawn anew for each of `replicates`, where it is itself uncertain.
        """
        grid: NDArray[np.float64] = np.unique(np.round(np.geomspace(1, self.alive + 1, GRID)) - 1)

        def smallest(curves: NDArray[np.float64], most: NDArray[np.float64]) -> NDArray[np.float64]:
            reached = _interpolated(self.kept, curves, grid) <= most[:, None]
            return np.where(reached.any(1), grid[reached.argmax(1)], np.nan)

        value = float(smallest(self.mean[None], np.array([float(kl)]))[0])
        if not isfinite(value):
            return None
        if self.replicates is None:
            return Estimate(value)
        most = np.full(len(self.replicates), float(kl)) if draws is None else draws
        return estimate_around(value, smallest(self.replicates, most)).within(0.0, float(self.alive))

    @property
    def error(self) -> Estimate:
        """KL with every latent kept: the loss that the dictionary's own reconstruction costs."""
        return self.at(self.alive)

    def _estimate(self, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Estimate:
        """A statistic of the mean curve, with its interval over documents; it maps curves [curve, kept] to numbers
        [curve].
        """
        value = float(statistic(self.mean[None])[0])
        if self.replicates is None:
            return Estimate(value)
        return estimate_around(value, statistic(self.replicates)).within(0.0)

    def to_json(self) -> dict[str, Any]:
        """The curve as a JSON object. Sums have all their digits, so that a floor read later is the same."""
        return {
            **{name: getattr(self, name) for name in _NAMES},
            "kept": list(self.kept),
            "kl": self.kl.tolist(),
            "tokens": self.tokens.tolist(),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SplicedCurve:
        """The checked curve that `to_json` gave."""
        curve = cls(
            **{name: saved[name] for name in _NAMES},
            kept=tuple(int(number) for number in saved["kept"]),
            kl=np.array(saved["kl"], dtype=np.float64),
            tokens=np.array(saved["tokens"], dtype=np.int64),
        )
        ascending = all(a < b for a, b in zip(curve.kept, curve.kept[1:], strict=False))
        if curve.kl.shape != (len(curve.tokens), len(curve.kept)) or not ascending or not curve.tokens.sum() > 0:
            raise ValueError(f"a curve at {curve.hook} of shape {curve.kl.shape}")
        if not np.isfinite(curve.kl).all():
            raise ValueError(f"a curve at {curve.hook} with numbers that are not finite")
        return curve


_NAMES = ("hook", "sae", "sae_digest", "architecture", "width", "order", "lost", "keep_error")


def _interpolated(kept: Sequence[int], curves: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves [curve, kept] at other numbers of features → [curve, wanted]. They are exact where one was run."""
    from scipy.interpolate import PchipInterpolator

    if len(kept) == 1:
        return np.repeat(curves, len(wanted), axis=1)
    exact = np.searchsorted(kept, wanted)
    found = np.asarray(PchipInterpolator(np.log1p(kept), curves, axis=1)(np.log1p(wanted)))
    for place, number in enumerate(wanted):
        if kept[min(exact[place], len(kept) - 1)] == number:
            found[:, place] = curves[:, exact[place]]
    return found
