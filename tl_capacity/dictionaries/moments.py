"""Moments: mean and covariance of activations, summed batch by batch, and their principal components."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_capacity.runtime.devices import exact


class Moments:
    """Mean and covariance of activations, summed in float64.

    Sums are about the first batch's mean, because Σxxᵀ − n·μμᵀ loses digits where the mean is much larger than the
    spread.

    Attributes:
        count: tokens that were added.
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._total = self._products = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Float[Tensor, "token width"]) -> None:
        """Add the activations of some tokens, which may be none."""
        if not len(x):
            return
        values = exact(x)
        if not self.count:
            self._origin = values.mean(0)
            self._total, self._products = torch.zeros_like(self._origin), values.new_zeros(x.shape[1], x.shape[1])
        centred = values - self._origin
        self.count += len(x)
        self._total, self._products = self._total + centred.sum(0), self._products + centred.T @ centred

    @property
    def finite(self) -> bool:
        """Whether every activation was finite."""
        return bool(torch.isfinite(self._products).all())

    @property
    def mean(self) -> Float64[Tensor, " width"]:
        """The mean μ."""
        return self._origin + self._total / self.count

    @property
    def covariance(self) -> Float64[Tensor, "width width"]:
        """The covariance E[(x − μ)(x − μ)ᵀ]."""
        shift = self._total / self.count
        return self._products / self.count - torch.outer(shift, shift)


def principal_components(
    covariance: Float64[Tensor, "width width"],
) -> tuple[Float64[Tensor, " component"], Float64[Tensor, "component width"]]:
    """Variances and directions of the principal components, largest variance first.

    An eigenvector's sign is arbitrary; its largest entry is made positive, so that the same activations always give the
    same components.
    """
    variances, vectors = torch.linalg.eigh(covariance)  # eigh sorts by rising variance
    components = vectors.T.flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return variances.flip(0).clamp(min=0), components * largest.sign()
