"""Importance estimators: three that need only the sums of every measurement, and three in nats that need backward
passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import FeatureSums, ImportanceEstimator, PathGradient, SparseAutoencoder
from tl_capacity.runtime.units import NATS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tl_capacity.interfaces import LatentBatch


class SecondMoment(ImportanceEstimator):
    """Iᵢ = E[zᵢ²] over all counted tokens: the paper's importance (arXiv:2604.04037). It changes if a latent is
    rescaled.
    """

    name = "second_moment"
    unit = "latent²"
    summary = "E[z²], the paper's importance"
    is_default = True

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        return sums.squares / sums.tokens


class DecoderWeighted(ImportanceEstimator):
    """Iᵢ = E[zᵢ²] · ‖w_dec,i‖²: the mean squared length of what the feature writes. It equals the paper's for unit-norm
    decoders.
    """

    name = "decoder_weighted"
    unit = "activation²"
    summary = "E[z²]·‖w_dec‖², invariant to rescaling a latent"
    compares_with_reconstruction_error = True

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        return sums.squares / sums.tokens * sums.decoder_norm**2


class FiringRate(ImportanceEstimator):
    """Iᵢ = P(zᵢ ≠ 0): every activation of a feature counts the same."""

    name = "firing_rate"
    unit = "active features per token"
    summary = "share of tokens on which the feature is active"

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        return sums.counts / sums.tokens


class Gradient(ImportanceEstimator):
    """Iᵢ = E|zᵢ · ∂L/∂zᵢ|, with L the next-token cross-entropy of the whole row: what each firing is worth to first
    order (attribution, arXiv:2403.19647).
    """

    name = "gradient"
    unit = NATS
    summary = "E|z·∂L/∂z|, L the next-token cross-entropy; needs a backward pass"
    gradient_of = ("cross_entropy",)

    def start(self, sae: SparseAutoencoder, groups: int, device: torch.device) -> dict[str, Tensor]:
        return _zeros(("signed", "absolute", "square"), sae, groups, device)

    def update(self, state: dict[str, Tensor], batch: LatentBatch) -> None:
        attribution = batch.values * batch.latent_gradients("cross_entropy")
        _add(state["signed"], batch, attribution)
        _add(state["absolute"], batch, attribution.abs())
        _add(state["square"], batch, attribution.square())

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        return sums.state["absolute"] / sums.tokens


class Fisher(ImportanceEstimator):
    """Iᵢ = ½ E[(zᵢ · ∂ log p(y)/∂zᵢ)²], with y drawn from the model's output p. To second order, this is the KL to the
    clean output if each firing is ablated alone.
    """

    name = "fisher"
    unit = NATS
    summary = "½E[(z·∂log p(y)/∂z)²], y ~ p: KL of an ablation to second order; needs a backward pass"
    gradient_of = ("sampled",)

    def start(self, sae: SparseAutoencoder, groups: int, device: torch.device) -> dict[str, Tensor]:
        return _zeros(("square",), sae, groups, device)

    def update(self, state: dict[str, Tensor], batch: LatentBatch) -> None:
        _add(state["square"], batch, (batch.values * batch.latent_gradients("sampled")).square())

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        return sums.state["square"] / sums.tokens / 2


class IntegratedGradients(ImportanceEstimator):
    """Iᵢ = E|zᵢ · ∫₀¹ ∂L/∂zᵢ dα| along x(α) = b_dec + α(x − b_dec), with L the next-token cross-entropy: integrated
    gradients (arXiv:1703.01365) of latents.

    On the straight path, all latents of all counted tokens and the SAE's error grow together from nothing to what they
    are, as in sparse feature circuits (arXiv:2403.19647); special tokens stay as they are. So Σᵢ zᵢ∂L/∂zᵢ and the
    error's part, kept as `signed` and `error`, add up to L(x) − L(b_dec), to the accuracy of the quadrature. At each
    hook point apart, it costs `steps` forward and backward passes, the backward ones from the loss to that hook point.

    Args:
        steps: points on the path, where a Gauss-Legendre rule places them.
    """

    name = "integrated_gradients"
    unit = NATS
    summary = (
        "E|z·∫∂L/∂z dα| along the path from b_dec, in 8 steps; needs 8 forward and backward passes for each hook point"
    )

    def __init__(self, steps: int = 8) -> None:
        if steps < 1:
            raise ValueError(f"steps = {steps} is outside its domain steps ≥ 1")
        self.along = PathGradient("cross_entropy", steps)
        self.gradient_of = (self.along,)

    def start(self, sae: SparseAutoencoder, groups: int, device: torch.device) -> dict[str, Tensor]:
        import torch

        return _zeros(("signed", "absolute"), sae, groups, device) | {
            "error": torch.zeros(groups, dtype=torch.float64, device=device)
        }

    def update(self, state: dict[str, Tensor], batch: LatentBatch) -> None:
        attribution = batch.values * batch.latent_gradients(self.along.name)
        _add(state["signed"], batch, attribution)
        _add(state["absolute"], batch, attribution.abs())
        gradient = _like(attribution, batch.gradients[self.along.name])
        bias = getattr(batch.sae, "b_dec", None)
        grown = _like(gradient, batch.activations.flatten(1)) - (
            0 if bias is None else _like(gradient, bias.detach().flatten())
        )
        state["error"].index_add_(0, batch.token_groups, (grown * gradient).sum(1))
        state["error"].index_add_(0, batch.groups, -attribution)

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        return sums.state["absolute"] / sums.tokens


def _zeros(names: tuple[str, ...], sae: SparseAutoencoder, groups: int, device: torch.device) -> dict[str, Tensor]:
    import torch

    return {name: torch.zeros(groups, sae.W_dec.shape[0], dtype=torch.float64, device=device) for name in names}


def _like(example: Tensor, values: Tensor) -> Tensor:
    """Values with the type and device of an example. They are moved first, because some devices have no float64."""
    return values.to(example.device).to(example.dtype)


def _add(total: Tensor, batch: LatentBatch, values: Tensor) -> None:
    """Add a value for each active latent to its feature, in its document group."""
    total.view(-1).index_add_(0, batch.groups * total.shape[1] + batch.features, values)


@hookimpl
def register_importance_estimators(register: Callable[[ImportanceEstimator], None]) -> None:
    for estimator in (SecondMoment, DecoderWeighted, FiringRate, Gradient, Fisher, IntegratedGradients):
        register(estimator())
