"""Measures of trained toy models: the floor reached, the features kept, and how features share dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.toy.training import Objective, Stack

KEPT_THRESHOLD = 0.5
"""τ: a feature counts as kept if ‖Wᵢ‖² > τ.

Kept features have ‖Wᵢ‖² near 1 and dropped ones near 0, so little depends on τ.
"""
ROWS_AT_ONCE = 2**12


@dataclass(frozen=True)
class Floors:
    """Mean loss of each model on held-out samples, with its standard error from the finite sample."""

    mean: Float[Tensor, "stream student"]
    error: Float[Tensor, "stream student"]


def floors(stack: Stack, objective: Objective, x: Float[Tensor, "feature row"], teacher: Stack | None = None) -> Floors:
    """E Σ Iᵢ (x̂ᵢ − yᵢ)² with y = x, or with y the output of each stream's teacher.

    All-zero samples are counted analytically, as in training.

    Args:
        x: samples that are not all zero, the same for all streams, which must have one feature distribution.
    """
    streams, students, _ = stack.bias.shape
    total, squares = torch.zeros(2, streams, students, dtype=torch.float64)
    for i in range(streams):
        models = stack.chunk(slice(i, i + 1))
        for rows in torch.split(x, ROWS_AT_ONCE, dim=1):
            target = rows if teacher is None else teacher.chunk(slice(i, i + 1)).output(rows[None])[0, 0]
            error = models.output(rows[None])[0].sub_(target).square_()
            loss = torch.einsum("sfr,f->sr", error, objective.importance).double()
            total[i] += loss.sum(1)
            squares[i] += loss.square().sum(1)
    rows_seen = x.shape[1]
    mean = total / rows_seen
    variance = (squares / rows_seen - mean**2).clamp(min=0) * rows_seen / (rows_seen - 1)
    zero, nonzero = objective.zero_probability.double()[:, None], 1 - objective.zero_probability.double()[:, None]
    at_zero = stack.at_zero - (0 if teacher is None else teacher.at_zero)
    analytic = (at_zero.double() ** 2) @ objective.importance.double()
    return Floors(nonzero * mean + zero * analytic, nonzero * (variance / rows_seen).sqrt())


def squared_norms(weights: Float[Tensor, "*model width feature"]) -> Float[Tensor, "*model feature"]:
    """‖Wᵢ‖² of each feature's direction."""
    return weights.double().square().sum(-2)


def kept_features(
    weights: Float[Tensor, "*model width feature"], threshold: float = KEPT_THRESHOLD
) -> Bool[Tensor, "*model feature"]:
    """Whether a model represents each feature: ‖Wᵢ‖² > τ."""
    return squared_norms(weights) > threshold


def fractional_capacity(weights: Float[Tensor, "*model width feature"]) -> Float[Tensor, "*model feature"]:
    """Cᵢ = ‖Wᵢ‖⁴ / Σⱼ (Wᵢ·Wⱼ)², the share of a dimension that a feature has to itself (Scherlis et al. 2022,
    arXiv:2210.01892).

    1 for a direction of its own, ½ in an antipodal pair, 0 for a feature without a direction; Σᵢ Cᵢ ≤ rank W ≤ d.
    """
    weights = weights.double()
    shared = (weights.transpose(-1, -2) @ weights).square()
    itself, everything = shared.diagonal(dim1=-2, dim2=-1), shared.sum(-1)
    return torch.where(everything > 0, itself / everything.where(everything > 0, 1.0), 0.0)


def overlap(kept: NDArray[np.bool_], predicted: int) -> float:
    """Jaccard index of the kept set and the `predicted` most important features; 1 if both are empty.

    Features are in order of importance.
    """
    theory = np.arange(len(kept)) < predicted
    union = int((kept | theory).sum())
    return float((kept & theory).sum() / union) if union else 1.0


def ordered_share(kept: NDArray[np.bool_]) -> float:
    """Share of the k kept features that are among the k most important; NaN if nothing is kept.

    It is 1 if importance alone decides.
    """
    return containment(kept, np.arange(len(kept)) < kept.sum())


def containment(kept: NDArray[np.bool_], of_teacher: NDArray[np.bool_]) -> float:
    """Share of a student's kept features that its teacher also keeps; NaN if the student keeps none."""
    return float((kept & of_teacher).sum() / kept.sum()) if kept.any() else float("nan")
