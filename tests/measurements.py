"""Measurements of which the counts are given, without model or text."""

from __future__ import annotations

from typing import Any

import numpy as np

from tl_capacity.measurement.measurement import Measurement
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.summary import FeatureSummary
from tl_capacity.text.counting import MASK_REASONS
from tl_capacity.text.documents import DOCUMENT_GROUPS


def sums_of_counts(counts: np.ndarray[Any, Any], tokens: int = 10_000) -> dict[str, np.ndarray[Any, Any]]:
    """The sums of an SAE of which latent i fired `counts[i]` times."""
    groups, features = DOCUMENT_GROUPS, len(counts)
    share = np.zeros((groups, features), dtype=np.int64) + counts // groups
    spread = np.random.default_rng(0).gamma(2.0, size=features)
    return {
        "counts": share,
        "sums": share * spread,
        "squares": share * spread**2,
        "tokens": np.full(groups, tokens // groups),
        "documents": np.full(groups, 3),
        "incidence": np.minimum(counts, 3 * groups).astype(np.int64),
        "masked": np.zeros(len(MASK_REASONS), dtype=np.int64),
        "counted_norm": np.ones(1),
        "masked_norm": np.zeros(1),
        "fvu_tokens": np.zeros(groups, dtype=np.int64),
        "residual": np.zeros(groups),
        "energy": np.zeros(groups),
        "mean_sum": np.zeros((groups, 16)),
        "decoder_norm": np.ones(features),
    }


def measurement_of_counts(
    *counts: np.ndarray[Any, Any], hook: str = "blocks.{}.hook_resid_post", tokens: int = 10_000
) -> Measurement:
    """A measurement with a hook point for each array of how often each latent fired."""
    hooks = [
        HookMeasurement(
            hook.format(i), f"sae{i}", "0" * 64, "standard", 16, FeatureSummary(sums_of_counts(each, tokens))
        )
        for i, each in enumerate(counts)
    ]
    return Measurement(tuple(hooks))
