"""Scores: how well one readout tells when each feature fires."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tl_capacity.results.estimate import Estimate, document_resamples, estimate_around


@dataclass(frozen=True)
class Scores:
    """How well one readout predicts each feature on held-out tokens.

    Attributes:
        auroc, average_precision: of whether the feature fires, by the readout's score [feature]; NaN where it never
            does. Firings below zero are ranked by the score turned round, and the two sides are averaged by their
            firings.
        auroc_error, average_precision_error: how far binning can have moved them [feature].
        r2: of the rectified readout max(0, ẑ), or of ẑ where latents have either sign, against z [feature]; below 0
            where the mean predicts better.
        ranks: sums over firings of the share of silent tokens that score lower, or higher for firings below zero
            [group, feature].
        firings: on held-out tokens [group, feature].
        tokens: held-out tokens.
        ridge: the penalty that was chosen.
    """

    auroc: NDArray[np.float64]
    auroc_error: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    average_precision_error: NDArray[np.float64]
    r2: NDArray[np.float64]
    ranks: NDArray[np.float64]
    firings: NDArray[np.int32]
    tokens: int
    ridge: float

    def kept(self, tau: float) -> NDArray[np.bool_]:
        """Whether each feature's AUROC is at least τ [feature]."""
        return np.asarray(self.auroc >= tau)

    def count(self, tau: float, among: NDArray[np.bool_]) -> Estimate:
        """How many of some features are kept, with a 95% interval over documents.

        The readout is taken as it is, and so are the silent tokens: there are so many more of them that they hardly add
        to the variance of AUROC. Of a feature that fires on a third of the tokens, the spread comes out a quarter too
        small.
        """
        value = float((self.kept(tau) & among).sum())
        if self.resampled_auroc is None:
            return Estimate(value)
        return estimate_around(value, ((self.resampled_auroc >= tau) & among).sum(1).astype(np.float64))

    @cached_property
    def resampled_auroc(self) -> NDArray[np.float64] | None:
        """AUROC in each replicate of the document bootstrap [replicate, feature]."""
        weights = document_resamples(self.firings.sum(1, dtype=np.int64))
        if weights is None:
            return None
        # A resample may leave out every document in which a feature fires: it says nothing about that one.
        with np.errstate(invalid="ignore"):
            change = (weights @ self.ranks) / (weights @ self.firings) - self.ranks.sum(0) / self.firings.sum(0)
        return np.asarray(self.auroc + np.nan_to_num(change))
