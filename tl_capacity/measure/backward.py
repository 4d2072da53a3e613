"""Gradients on request, with frozen parameters: one backward pass for each loss, from the logits to every tapped hook
point, or an average along a path from a baseline to the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import PathGradient

PREDICTED = -100
"""Marks a position that predicts nothing, as PyTorch's cross-entropy does."""


def cross_entropy(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(next token) in nats, over positions that have a next token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PREDICTED, reduction="sum")


def sampled(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(y) in nats, with y drawn from the model's own p. In expectation, half its squared gradient is the KL to
    the clean output to second order.

    The gradient of that KL itself vanishes at the clean output; its curvature is the Fisher information E[∇ log p(y) ∇
    log p(y)ᵀ], y ~ p.
    """
    probabilities = logits.detach().flatten(0, 1).softmax(-1)
    drawn = (
        torch.multinomial(probabilities.to(generator.device), 1, generator=generator)
        .to(targets.device)
        .view_as(targets)
    )
    return cross_entropy(logits, torch.where(targets == PREDICTED, PREDICTED, drawn), generator)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "cross_entropy": cross_entropy,
    "sampled": sampled,
}
"""The losses whose gradients an importance estimator can ask for."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block, computations are recorded for gradients, but no parameter asks for one. Afterwards the
    parameters ask as before.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def differentiable(model: nn.Module, embedding: nn.Module) -> Iterator[None]:
    """Record how activations follow from the embedding, with frozen parameters."""
    handle = embedding.register_forward_hook(lambda _, args, embedded: embedded.requires_grad_())
    try:
        with frozen(model):
            yield
    finally:
        handle.remove()


def gradients(
    logits: Tensor, tokens: Tensor, valid: Tensor, activations: Sequence[Tensor], losses: Sequence[str], seed: int
) -> list[dict[str, Tensor]]:
    """The gradient of each loss, summed over positions, with respect to each activation.

    Args:
        logits: [row, position, vocabulary], that depend on the activations.
        tokens: int64 [row, position].
        valid: bool [row, position], where `tokens` is no padding.
        activations: [row, position, ...] each.
        losses: names from `LOSSES`.
        seed: for the losses that draw.

    Returns:
        For each activation, its gradients by name of the loss, in nats per unit of the activation.

    Raises:
        CapacityError: where the logits do not depend on an activation.
    """
    by_activation: list[dict[str, Tensor]] = [{} for _ in activations]
    generator = torch.Generator().manual_seed(seed)
    for i, name in enumerate(losses):
        loss = _loss(name, logits, tokens, valid, generator)
        along: Any = torch.autograd.grad(loss, activations, retain_graph=i + 1 < len(losses), allow_unused=True)
        for gradient, by_loss in zip(along, by_activation, strict=True):
            if gradient is None:
                raise CapacityError(
                    f"the model's logits do not depend on a tapped hook point, so its {name} gradient is undefined: "
                    "tap another hook point, or choose another importance estimator"
                )
            by_loss[name] = gradient
    return by_activation


def path_gradient(
    logits_with: Callable[[Callable[[Tensor], Tensor]], Tensor],
    baseline: Tensor,
    moving: Tensor,
    tokens: Tensor,
    valid: Tensor,
    along: PathGradient,
    seed: int,
) -> Tensor:
    """∫₀¹ ∂L/∂x at x(α) = b + α(x − b) dα: the gradient along the straight path from a baseline b to the activations x.
    All tokens move together.

    By Gauss-Legendre quadrature, which is exact for polynomials of degree 2·steps − 1 in α. ⟨x − b, ∫∂L/∂x dα⟩, summed
    over moving tokens, is then L(x) − L(b): the completeness of integrated gradients (Sundararajan et al. 2017,
    arXiv:1703.01365).

    Args:
        logits_with: runs the model with what a function makes of the activation [row, position, ...] in its place, and
            returns the logits.
        baseline: b [width].
        moving: bool [row, position], the tokens that move; the others stay as they are.
        tokens, valid, seed: as in `gradients`.
        along: the loss, and the number of points on the path.

    Returns:
        [row, position, ...], in nats per unit of the activation.
    """
    places, weights = np.polynomial.legendre.leggauss(along.steps)
    total: Any = 0
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        reached: list[Tensor] = []

        def move(activation: Tensor, alpha: float = float(place), reached: list[Tensor] = reached) -> Tensor:
            activation = activation.detach()
            origin = baseline.to(activation).view(activation.shape[2:])
            chosen = moving.to(activation.device).view(*moving.shape, *[1] * (activation.ndim - 2))
            reached.append(torch.where(chosen, origin + alpha * (activation - origin), activation).requires_grad_())
            return reached[-1]

        loss = _loss(along.loss, logits_with(move), tokens, valid, torch.Generator().manual_seed(seed))
        total = total + weight * torch.autograd.grad(loss, reached[-1])[0].float()
    return torch.as_tensor(total)


def _loss(name: str, logits: Tensor, tokens: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    following = torch.where(valid[:, 1:].to(tokens.device), tokens[:, 1:], PREDICTED)
    return LOSSES[name](logits[:, :-1].float(), following.to(logits.device), generator)
