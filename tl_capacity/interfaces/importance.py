"""The interface of an importance estimator: what it is given, and what it declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray

from tl_capacity.interfaces.dictionary import SparseAutoencoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    Tensor = Any


@dataclass(frozen=True)
class FeatureSums:
    """Sums over the counted tokens of one SAE, or over a bootstrap resample of their documents. Importance is computed
    from them.

    Attributes:
        tokens: number of counted tokens.
        counts: [feature] tokens on which the feature is active.
        sums: [feature] Σ z.
        squares: [feature] Σ z².
        decoder_norm: [feature] ‖w_dec,i‖.
        state: what the estimator itself accumulated, summed over the same documents.
    """

    tokens: float
    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    decoder_norm: NDArray[np.float64]
    state: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


GATHERED_NUMBERS = 2**18
"""Numbers of decoder vectors gathered at once: 1 MB, which is still in a core's cache when multiplied."""


@dataclass(frozen=True)
class LatentBatch:
    """The active latents of some counted tokens, as sparse entries: one for each (token, feature) with z ≠ 0. Entries
    of one feature are in the order of the tokens.

    Attributes:
        features: the feature.
        tokens: the token's place in `activations`.
        groups: the document group of the token.
        values: the latent z.
        activations: what the SAE encoded.
        documents: the number of the document each token belongs to.
        token_groups: the document group of each token.
        rows: the row of each token in the forward pass.
        positions: its position in that row.
        counted: on the CPU, the token mask of the forward pass, of which this batch may be a part; false at padding,
            special tokens and skipped positions.
        sae: the dictionary.
        gradients: for each loss that an estimator asked for, its gradient ∂L/∂x at the hook point; L is in nats, summed
            over positions.
        scale: by what `decode` multiplies each latent before its decoder vector; None for 1.
    """

    features: Int64[Tensor, " entry"]
    tokens: Int64[Tensor, " entry"]
    groups: Int64[Tensor, " entry"]
    values: Float64[Tensor, " entry"]
    activations: Float[Tensor, "token ..."]
    documents: Int64[Tensor, " token"]
    token_groups: Int64[Tensor, " token"]
    rows: Int64[Tensor, " token"]
    positions: Int64[Tensor, " token"]
    counted: Bool[Tensor, "row position"]
    sae: Any
    gradients: Mapping[str, Float[Tensor, "token width"]] = field(default_factory=dict)
    scale: Float[Tensor, " feature"] | None = None

    def latent_gradients(self, loss: str) -> Float64[Tensor, " entry"]:
        """∂L/∂z of each active latent: ⟨w_dec, ∂L/∂x⟩ times its scale, with the error of the reconstruction held fixed
        (Marks et al. 2024, arXiv:2403.19647).
        """
        import torch

        decoder = self.sae.W_dec.detach().flatten(1)
        gradient = self.gradients[loss].to(decoder)
        at_once = max(1, GATHERED_NUMBERS // decoder.shape[1])
        places = (torch.split(each.to(decoder.device), at_once) for each in (self.features, self.tokens))
        along = [
            decoder.index_select(0, features).mul_(gradient.index_select(0, tokens)).sum(-1)
            for features, tokens in zip(*places, strict=True)
        ]
        gradients = torch.cat(along).to(self.values.device).to(self.values.dtype)
        if self.scale is None:
            return gradients
        return gradients * self.scale.to(gradients.device).to(gradients.dtype)[self.features]

    def dense(self) -> Tensor:
        """Latents [token, feature] in float64. This takes the memory that the sparse form avoids."""
        import torch

        latents = torch.zeros(len(self.activations), self.sae.cfg.d_sae, dtype=torch.float64, device=self.values.device)
        latents[self.tokens, self.features] = self.values
        return latents


@dataclass(frozen=True)
class PathGradient:
    """The gradient of a loss, averaged along the straight path from the SAE's decoder bias to the activations. It takes
    `steps` passes for each hook point.

    Attributes:
        loss: `cross_entropy`, whose points on the path have one target.
        steps: points on the path.
    """

    loss: str = "cross_entropy"
    steps: int = 8

    @property
    def name(self) -> str:
        """Its name among `batch.gradients`."""
        return f"{self.loss} along a path of {self.steps}"


class ImportanceEstimator:
    """Base of an importance estimator: how much does a feature matter? Subclass it, name it, and override `compute`.
    Add `start` and `update` if the sums above are not enough.

    An estimator that needs gradients names the losses in `gradient_of`; `batch.gradients` then has them, and the model
    runs to its end and back.

    An estimator keeps nothing in itself. What it accumulates is a mapping of tensors whose first axis is the document
    group, so that shards merge by addition and the document bootstrap can resample it.
    """

    name: str
    """Short name, as passed to `--importance`."""
    unit: str
    """Unit of the importance, and of the floors predicted from it."""
    summary: str = ""
    """One line for `tl-capacity plugins`."""
    gradient_of: tuple[str | PathGradient, ...] = ()
    """The losses whose gradients `update` needs: `cross_entropy`, `sampled` (see `tl_capacity.measure.losses`), or
    `PathGradient`s.
    """
    is_default: bool = False
    """Whether this estimator is used by default. Exactly one estimator of all plugins says so."""
    compares_with_reconstruction_error: bool = False
    """Whether importances add up in the unit of the dictionary's error E‖x − x̂‖², so that floor and error can be
    compared. Then `compute` must need no state.
    """

    def start(self, sae: SparseAutoencoder, groups: int, device: torch.device) -> dict[str, Tensor]:
        """The empty state: tensors [group, ...] of zeros."""
        return {}

    def update(self, state: dict[str, Tensor], batch: LatentBatch) -> None:
        """Add the active latents of some tokens to `state`, in place."""

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        """Importance [feature] ≥ 0, as a mean per counted token."""
        raise NotImplementedError(f"the importance estimator {self.name!r} does not override compute()")
