"""An importance estimator: what replacing a feature by its mean costs, where the paper's sets it to zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tl_capacity.interfaces import FeatureSums, ImportanceEstimator


class MeanAblation(ImportanceEstimator):
    """E[(z − E z)²]·‖w_dec‖², the squared change of the activation if the latent is always its mean.

    Needs no sums but those that every measurement has, so it can be applied to any of them.
    """

    name = "mean_ablation"
    unit = "activation²"
    summary = "E[(z − E z)²]·‖w_dec‖²: each latent replaced by its mean"

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        variance = sums.squares / sums.tokens - (sums.sums / sums.tokens) ** 2
        return np.maximum(variance, 0) * sums.decoder_norm**2  # rounding may leave a constant latent below zero
