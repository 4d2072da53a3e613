"""Toy models of superposition (Elhage et al. 2022), trained by the thousand in one batch, to judge every predictor of
loss floors.
"""

from tl_capacity.toy.features import FeatureDistribution, zipf_importance
from tl_capacity.toy.judging import (
    PackingLaw,
    accuracy,
    at_every_sparsity,
    cells,
    fit_packing_law,
    packing_law,
    predictions,
)
from tl_capacity.toy.measures import (
    containment,
    fractional_capacity,
    kept_features,
    ordered_share,
    overlap,
    squared_norms,
)
from tl_capacity.toy.predictors import Case, Predictor, predictors, smooth_band_floor
from tl_capacity.toy.result import SweepResult, run
from tl_capacity.toy.sweep import SweepSettings

__all__ = [
    "Case",
    "FeatureDistribution",
    "PackingLaw",
    "Predictor",
    "SweepResult",
    "SweepSettings",
    "accuracy",
    "at_every_sparsity",
    "cells",
    "containment",
    "fit_packing_law",
    "fractional_capacity",
    "kept_features",
    "ordered_share",
    "overlap",
    "packing_law",
    "predictions",
    "predictors",
    "run",
    "smooth_band_floor",
    "squared_norms",
    "zipf_importance",
]
