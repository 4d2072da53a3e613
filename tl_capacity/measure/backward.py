"""Gradients on request, with frozen parameters: one backward pass for each loss, from the model's end to every tapped
hook point, or an average along a path from a baseline to the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tl_capacity.errors import CapacityError
from tl_capacity.measure.ending import Slope


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


def gradients(slopes: Sequence[Slope], activations: Sequence[Tensor], losses: Sequence[str]) -> list[dict[str, Tensor]]:
    """The gradient of each loss, summed over positions, with respect to each activation.

    Args:
        slopes: where each loss is taken, which depends on the activations, and its slope there.
        activations: [row, position, ...] each.
        losses: their names.

    Returns:
        For each activation, its gradients by name of the loss, in nats per unit of the activation.

    Raises:
        CapacityError: where the logits do not depend on an activation.
    """
    by_activation: list[dict[str, Tensor]] = [{} for _ in activations]
    for i, (name, (end, slope)) in enumerate(zip(losses, slopes, strict=True)):
        along: Any = torch.autograd.grad(end, activations, slope, retain_graph=i + 1 < len(losses), allow_unused=True)
        for gradient, by_loss in zip(along, by_activation, strict=True):
            if gradient is None:
                raise CapacityError(
                    f"the model's logits do not depend on a tapped hook point, so its {name} gradient is undefined: "
                    "tap another hook point, or choose another importance estimator"
                )
            by_loss[name] = gradient
    return by_activation


def path_gradient(
    slope_with: Callable[[Callable[[Tensor], Tensor]], Slope], baseline: Tensor, moving: Tensor, steps: int
) -> Tensor:
    """∫₀¹ ∂L/∂x at x(α) = b + α(x − b) dα: the gradient along the straight path from a baseline b to the activations x.
    All tokens move together.

    By Gauss-Legendre quadrature, which is exact for polynomials of degree 2·steps − 1 in α. ⟨x − b, ∫∂L/∂x dα⟩, summed
    over moving tokens, is then L(x) − L(b): the completeness of integrated gradients (Sundararajan et al. 2017,
    arXiv:1703.01365).

    Args:
        slope_with: runs the model with what a function makes of the activation [row, position, ...] in its place; where
            the loss is taken then, and its slope there.
        baseline: b [width].
        moving: bool [row, position], the tokens that move; the others stay as they are.
        steps: points on the path.

    Returns:
        [row, position, ...], in nats per unit of the activation.
    """
    places, weights = np.polynomial.legendre.leggauss(steps)
    total: Any = 0
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        reached: list[Tensor] = []

        def move(activation: Tensor, alpha: float = float(place), reached: list[Tensor] = reached) -> Tensor:
            activation = activation.detach()
            origin = baseline.to(activation).view(activation.shape[2:])
            chosen = moving.to(activation.device).view(*moving.shape, *[1] * (activation.ndim - 2))
            reached.append(torch.where(chosen, origin + alpha * (activation - origin), activation).requires_grad_())
            return reached[-1]

        end, slope = slope_with(move)
        total = total + weight * torch.autograd.grad(end, reached[-1], slope)[0].float()
    return torch.as_tensor(total)
