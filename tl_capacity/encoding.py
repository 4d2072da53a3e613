"""Encoding: which latents are active on a chunk of activations, and their values, with as little as possible made that is mostly zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_capacity.interfaces import SparseAutoencoder

Entries = tuple[Tensor, Tensor, Tensor]
"""`(token, feature, value)` of each active latent, in the order of the tokens."""

CHUNK_LATENTS = 1024 * 24_576
"""Latents that are dense at once: 100 MB in float32. At 1,024 tokens of a wide SAE its matrix product is as fast as with all at once, with fewer it is not."""

CHECKED_TOKENS = 32
"""Tokens on which an encoder's short cut is compared with the SAE's own `encode` before it is used."""


class Encoder:
    """The active latents of one SAE, a chunk of tokens at a time.

    SAELens' `encode` makes a new block of latents at each step: product, bias, activation, mask. For the architectures in `ACTIVATIONS` the product and the
    bias go into one block that is kept, and the activation is a comparison on it. Any other SAE, one with hooks on its latents, and one whose `encode` gave
    something else on the first tokens is asked for its own `encode`.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae: Any = sae
        self.chunk = max(64, CHUNK_LATENTS // int(sae.W_dec.shape[0]))
        self._activation = ACTIVATIONS.get(type(sae).__name__)
        self._checked = False
        self._block: Tensor | None = None

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Entries:
        """The active latents of at most `chunk` tokens [token, d_in]."""
        if not self._checked and len(inputs):
            self._checked = True
            if self._activation is not None and not self._agrees(self._activation, inputs[:CHECKED_TOKENS]):
                self._activation = None
        if self._activation is None or _has_hooks(self.sae):
            return active_entries(self.sae.encode(inputs))
        return self._activation(self.sae, self._preactivations(inputs))

    def _preactivations(self, inputs: Tensor) -> Tensor:
        x, weight, bias = self.sae.process_sae_in(inputs), self.sae.W_enc, self.sae.b_enc
        if self._block is None:
            self._block = torch.empty(self.chunk, weight.shape[1], dtype=weight.dtype, device=weight.device)
        block = self._block[: len(x)]
        return torch.addmm(bias, x, weight, out=block)

    def _agrees(self, activation: Callable[[Any, Tensor], Entries], inputs: Tensor) -> bool:
        own = self.sae.encode(inputs)
        if own.is_sparse or own.dtype != self.sae.W_enc.dtype or not bool(own.isfinite().all()):
            return False
        tokens, features, values = activation(self.sae, self._preactivations(inputs))
        mine = torch.zeros_like(own)
        mine[tokens, features] = values
        # Two orders of summation may decide otherwise about a latent on the edge, so a few may differ.
        different = ~torch.isclose(mine, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))
        return int(different.sum()) <= 1e-3 * len(values)


def _relu(sae: Any, preactivations: Tensor) -> Entries:
    return _above(preactivations, 0.0)


def _jumprelu(sae: Any, preactivations: Tensor) -> Entries:
    return _above(preactivations, sae.threshold.clamp(min=0))


def _topk(sae: Any, preactivations: Tensor) -> Entries:
    if sae.cfg.rescale_acts_by_decoder_norm:
        preactivations.mul_(sae.W_dec.norm(dim=-1))
    values, features = preactivations.topk(sae.cfg.k, dim=-1, sorted=False)
    token, place = torch.nonzero(~(values <= 0), as_tuple=True)
    return token, features[token, place], values[token, place]


ACTIVATIONS: dict[str, Callable[[Any, Tensor], Entries]] = {"StandardSAE": _relu, "JumpReLUSAE": _jumprelu, "TopKSAE": _topk}
"""How the active latents are found among the preactivations, by SAELens' class."""


def _above(preactivations: Tensor, threshold: Tensor | float) -> Entries:
    # Not "greater than", so that NaN counts as active and is reported, rather than passing for zero.
    return _entries(preactivations, (preactivations <= threshold).logical_not_())


@torch.no_grad()
def decoder_vectors_add_up(sae: Any, inputs: Tensor) -> bool | None:
    """Whether `decode` adds up decoder vectors, seen on a few tokens [token, d_in], so that no architecture need be known; None without an active latent."""
    few = inputs[:CHECKED_TOKENS]
    latents = sae.encode(few).to_dense()
    if not bool(latents.any()):
        return None
    decoder, bias = sae.W_dec.detach().flatten(1), getattr(sae, "b_dec", None)
    written, summed = sae.decode(latents).flatten(1), latents.to(decoder) @ decoder
    summed = summed if bias is None else summed + bias.detach().flatten()
    return written.shape == summed.shape and torch.allclose(summed, written, rtol=1e-3, atol=1e-4 * float(written.abs().max()))


def active_entries(latents: Tensor) -> Entries:
    """The non-zero latents of [token, feature]; negative ones are active too."""
    latents = latents.to_dense().contiguous()
    return _entries(latents, latents != 0)


def _entries(latents: Tensor, active: Tensor) -> Entries:
    """The entries of contiguous [token, feature] where `active` is set.

    `torch.nonzero` on the CPU costs per element whether zero or not, and few latents are active. So eight at a time are tested first, as one int64.
    """
    width = latents.shape[-1]
    if latents.device.type != "cpu" or width % 8:
        tokens, features = torch.nonzero(active, as_tuple=True)
        return tokens, features, latents[tokens, features]
    octets = torch.nonzero(active.view(torch.int64).view(-1)).view(-1)
    octet, lane = torch.nonzero(active.view(-1, 8)[octets], as_tuple=True)
    place = octets[octet] * 8 + lane
    tokens = torch.div(place, width, rounding_mode="floor")
    return tokens, place - tokens * width, latents.view(-1)[place]


def _has_hooks(sae: Any) -> bool:
    return any(getattr(sae, name)._forward_hooks for name in ("hook_sae_acts_pre", "hook_sae_acts_post") if hasattr(sae, name))
