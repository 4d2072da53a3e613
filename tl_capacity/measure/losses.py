"""The losses whose gradients an importance estimator can ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from tl_capacity.runtime.devices import uploaded

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
    predicting = targets != PREDICTED
    drawn = targets.clone()
    chances = torch.rand(int(predicting.sum()), generator=generator).to(logits.device)
    drawn[predicting] = draw(logits.detach()[predicting].softmax(-1), chances)
    return cross_entropy(logits, drawn, generator)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "cross_entropy": cross_entropy,
    "sampled": sampled,
}
"""The losses, under the names that `gradient_of` uses."""


def draw(p: Float[Tensor, "token vocabulary"], chances: Float[Tensor, " token"]) -> Int64[Tensor, " token"]:
    """A drawn word for each token, by inversion: the first word whose cumulative probability exceeds the chance, which
    is uniform in [0, 1).

    A chance has 24 bits, so a word of probability far below 2⁻²⁴ may never be drawn.
    """
    reached = p.cumsum(-1)
    words = torch.searchsorted(reached, (chances[:, None] * reached[:, -1:]).to(reached.dtype), right=True)
    return words.squeeze(1).clamp_(max=p.shape[1] - 1)


def following(ids: Int64[Tensor, "row position"], valid: Tensor) -> Int64[Tensor, "row predicting"]:
    """The next token of each position but the last; `PREDICTED` if that is padding."""
    return torch.where(valid[:, 1:].to(ids.device), ids[:, 1:], PREDICTED)


def next_tokens(
    ids: Int64[Tensor, "row position"], valid: Tensor
) -> tuple[Int64[Tensor, " token"], Int64[Tensor, " token"]]:
    """The flat places in [row, position] that have a next token, and these tokens, on the device of `ids`.

    Args:
        valid: bool [row, position] on the CPU, where a token is no padding.
    """
    row, position = torch.nonzero(valid[:, 1:].cpu(), as_tuple=True)
    places = uploaded(row * ids.shape[1] + position, ids.device)
    return places, ids.flatten().index_select(0, places + 1)
