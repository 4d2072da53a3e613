"""Where a pass with gradients ends: at the head's input if only the head makes the logits, else at the logits.

The logits of a whole batch and what autograd keeps of them are the most of such a pass. From the head's input, the
slope of each loss comes a chunk of tokens at a time, and one product with the head's weight serves all losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tl_capacity.errors import CapacityError
from tl_capacity.measure.losses import LOSSES, draw, following, next_tokens
from tl_capacity.models.head import (
    CHECKED_TOKENS,
    Head,
    before_head,
    cached_pieces,
    head_input,
    head_of,
    tokens_at_once,
)

Slope = tuple[Tensor, Tensor | None]
"""The tensor at which a loss's gradient is taken, and the loss's slope there. The slope is None if the tensor is the
loss itself.
"""


class Ending:
    """Where the passes of a session end, as the first tokens show.

    Args:
        whole: always go to the logits, as where other processes must gather the same blocks.
    """

    def __init__(self, whole: bool = False) -> None:
        self._decided = whole
        self._head: Head | None = None

    def decide(self, model: Any, ids: Int64[Tensor, "row position"], options: dict[str, Any]) -> None:
        """Find out on the first tokens, in a separate pass, whether only the head makes the logits."""
        if not self._decided:
            self._decided, self._head = True, separate_head(model, ids[:1, :CHECKED_TOKENS], options)

    def slopes(
        self,
        model: Any,
        ids: Int64[Tensor, "row position"],
        options: dict[str, Any],
        valid: Tensor,
        losses: Sequence[str],
        seed: int,
    ) -> list[Slope]:
        """Run the model. Returns where each loss, summed over positions, is taken, and its slope there.

        Args:
            model: the model, with frozen parameters.
            ids: the tokens.
            options: of the forward pass.
            valid: bool [row, position] on the CPU, where a token is no padding.
            losses: names from `LOSSES`.
            seed: for the losses that draw.
        """
        generator = torch.Generator().manual_seed(seed)
        if self._head is None:
            output = model(ids, **options)
            logits = exactly(getattr(output, "logits", output)[:, :-1])
            targets = following(ids, valid).to(logits.device)
            return [(LOSSES[name](logits, targets, generator), None) for name in losses]
        hidden = head_input(model, ids, **options)
        slopes = slopes_at_head(self._head, hidden.detach(), ids, valid, losses, generator)
        return [(hidden, slope) for slope in slopes]


def exactly(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if the model computes in it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def separate_head(model: Any, few: Int64[Tensor, "row position"], options: dict[str, Any]) -> Head | None:
    """The model's head, if it alone gives the model's logits from its input on a few tokens; else None."""
    with suppress(AttributeError, CapacityError):
        head, seen = head_of(model), list[Tensor]()
        with before_head(model, seen.append):
            output = model(few, **options)
        logits = getattr(output, "logits", output).flatten(0, 1).float()
        if len(seen) != 1 or seen[0].device != head.weight.device:
            return None  # a device map puts the weights elsewhere, or nowhere until they are needed
        if seen[0].shape[:2] == few.shape and logits.shape == (few.numel(), len(head.weight)):
            made = head.logits(seen[0].flatten(0, 1), torch.empty_like(logits))
            if torch.allclose(made, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
                return head
    return None


@torch.no_grad()
def slopes_at_head(
    head: Head,
    hidden: Float[Tensor, "row position d_model"],
    ids: Int64[Tensor, "row position"],
    valid: Tensor,
    losses: Sequence[str],
    generator: torch.Generator,
) -> list[Float[Tensor, "row position d_model"]]:
    """The slope of each loss, summed over positions, with respect to the head's input.

    With p the softmax of the logits and t the token of which −log p(t) is the loss, it is (p − eₜ) W, so that p W
    serves all losses. The entries of p that are some t's are left out of that product and added exactly: where p(t) is
    nearly 1, a product of lower precision would lose the difference.
    """
    flat, slopes = hidden.flatten(0, 1), [torch.zeros_like(hidden) for _ in losses]
    places, tokens = next_tokens(ids.to(flat.device), valid)
    draws = {name: torch.rand(len(places), generator=generator) for name in losses if name == "sampled"}
    vocabulary = len(head.weight)
    size = tokens_at_once(len(places), vocabulary, flat.device)
    buffer = flat.new_empty(size, vocabulary, dtype=torch.promote_types(head.weight.dtype, torch.float32))
    for start in range(0, len(places), size):
        some = slice(start, min(start + size, len(places)))
        place, target = places[some], tokens[some]
        p = head.logits(flat.index_select(0, place), buffer[: len(place)])
        steep = p.new_ones(len(losses), len(place))
        wanted = target.expand(len(losses), -1).clone()
        for piece in cached_pieces(len(place), vocabulary, p.device):
            capped = None if head.cap is None else 1 - (p[piece] / head.cap).square_()
            torch.softmax(p[piece], -1, out=p[piece])
            for loss, name in enumerate(losses):
                if name == "sampled":
                    wanted[loss, piece] = draw(p[piece], draws[name][some][piece].to(p.device))
            if capped is not None:
                steep[:, piece] = capped.gather(1, wanted[:, piece].T).T
                p[piece].mul_(capped)
        for slope, part in zip(slopes, _slopes(head, p, wanted, steep), strict=True):
            slope.view(-1, slope.shape[-1]).index_copy_(0, place, part.to(slope.dtype))
    return slopes


def _slopes(
    head: Head,
    p: Float[Tensor, "token vocabulary"],
    wanted: Int64[Tensor, "loss token"],
    steep: Float[Tensor, "loss token"],
) -> list[Float[Tensor, "token d_model"]]:
    """(p − s eₜ) W for each loss's tokens t, where s is the slope of the cap there. p already contains s, and is
    overwritten.
    """
    share = p.gather(1, wanted.T).T
    p.scatter_(1, wanted.T, 0.0)
    common = torch.mm(p.to(head.weight.dtype), head.weight)
    common = common.to(torch.promote_types(common.dtype, torch.float32))
    rows = [head.weight.index_select(0, token).to(common.dtype) for token in wanted]
    for loss, row in enumerate(rows):
        # A token that two losses want is one entry of p.
        repeated = (wanted[:loss] == wanted[loss]).any(0)
        common.addcmul_(row, share[loss].masked_fill(repeated, 0.0)[:, None].to(row.dtype))
    return [torch.addcmul(common, row, steep[loss][:, None].to(row.dtype), value=-1) for loss, row in enumerate(rows)]
