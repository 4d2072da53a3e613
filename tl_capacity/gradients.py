"""Gradients on request: one backward pass for each loss, from a model's logits to every tapped hook point, through frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_capacity.errors import CapacityError

PREDICTED = -100
"""Marks a position that predicts nothing, as PyTorch's cross-entropy does."""


def cross_entropy(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(next token) in nats, over positions that have a next token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PREDICTED, reduction="sum")


def sampled(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(y) in nats with y drawn from the model's own p: half its squared gradient is, in expectation, the KL to the clean output to second order.

    The gradient of that KL itself vanishes at the clean output; its curvature is the Fisher information E[∇ log p(y) ∇ log p(y)ᵀ], y ~ p.
    """
    probabilities = logits.detach().flatten(0, 1).softmax(-1)
    drawn = torch.multinomial(probabilities.to(generator.device), 1, generator=generator).to(targets.device).view_as(targets)
    return cross_entropy(logits, torch.where(targets == PREDICTED, PREDICTED, drawn), generator)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {"cross_entropy": cross_entropy, "sampled": sampled}
"""The losses that an importance estimator can ask gradients of."""


@contextmanager
def differentiable(model: nn.Module, embedding: nn.Module) -> Iterator[None]:
    """Record what activations depend on, from the embedding on, while no parameter asks for a gradient; afterwards the parameters ask as before."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    handle = embedding.register_forward_hook(lambda _, args, embedded: embedded.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in asking:
            parameter.requires_grad_(True)


def gradients(logits: Tensor, tokens: Tensor, valid: Tensor, activations: Sequence[Tensor], losses: Sequence[str], seed: int) -> list[dict[str, Tensor]]:
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
    following = torch.where(valid[:, 1:], tokens[:, 1:], PREDICTED)
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = [{} for _ in activations]
    for i, name in enumerate(losses):
        loss = LOSSES[name](logits[:, :-1].float(), following.to(logits.device), generator)
        several: Any = torch.autograd.grad(loss, activations, retain_graph=i + 1 < len(losses), allow_unused=True)
        for gradient, own in zip(several, found, strict=True):
            if gradient is None:
                raise CapacityError(
                    f"the model's logits do not depend on a tapped hook point, so its {name} gradient is undefined: tap another, or choose another importance"
                )
            own[name] = gradient
    return found
