"""Encoding: which latents are active on a chunk of activations, and their values, with as little as possible made that is mostly zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tl_capacity.interfaces import SparseAutoencoder

Entries = tuple[Tensor, Tensor, Tensor]
"""`(token, feature, value)` of each active latent, in the order of the tokens."""
Blocks = Iterator[tuple[int, Tensor]]
"""The first feature of each block of preactivations, and the block [token, feature], which the next one overwrites."""

DENSE_LATENTS = 1024 * 24_576
"""Latents that are dense at once: 100 MB in float32. At 1,024 tokens of a wide SAE its matrix product is as fast as with all at once, with fewer it is not."""
BLOCK_LATENTS = 24_576
"""Latents of one token that are dense at once, where they need not all be."""
FEWEST_TOKENS = 64
"""Tokens that an SAE's own `encode`, which makes all latents at once, is given, whatever their number."""

CHECKED_TOKENS = 32
"""Tokens on which an encoder's short cut is compared with the SAE's own `encode` before it is used."""


class Scratch:
    """Memory for preactivations; encoders that work one after the other share it, so that it need not grow with their number."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, elements: int, like: Tensor) -> Tensor:
        """So many elements of a tensor's dtype and device, which whoever takes them next overwrites."""
        kept = self._kept
        if kept is None or len(kept) < elements or (kept.dtype, kept.device) != (like.dtype, like.device):
            self._kept = kept = None  # not both at once
            self._kept = kept = torch.empty(elements, dtype=like.dtype, device=like.device)
        return kept[:elements]


class Encoder:
    """The active latents of one SAE, a chunk of tokens at a time.

    SAELens' `encode` makes a new block of latents at each step: product, bias, activation, mask. For the architectures in `ACTIVATIONS` the product and the
    bias go into one block that is kept, some thousands of features after the others where the SAE is wide, and the activation is a comparison on it. Any other
    SAE, one with hooks on its latents, and one whose `encode` gave something else on the first tokens is asked for its own `encode`.
    """

    def __init__(self, sae: SparseAutoencoder, scratch: Scratch | None = None) -> None:
        self.sae: Any = sae
        self.d_sae = int(sae.W_dec.shape[0])
        self._activation = ACTIVATIONS.get(type(sae).__name__)
        self._checked = False
        self._scratch = scratch or Scratch()
        self.hold(DENSE_LATENTS if self._activation is not None else max(DENSE_LATENTS, FEWEST_TOKENS * self.d_sae))

    def hold(self, latents: int) -> None:
        """Let so many latents be dense at once, by which `chunk`, the tokens to encode at once, is chosen; at least those of one token."""
        self.dense_latents = latents
        self._block = self.d_sae if self._activation is None else min(self.d_sae, BLOCK_LATENTS)
        self.chunk = max(1, latents // self._block)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Entries:
        """The active latents of at most `chunk` tokens [token, d_in]."""
        if not self._checked and len(inputs):
            self._checked = True
            if self._activation is not None and not self._agrees(self._activation, inputs[:CHECKED_TOKENS]):
                self._activation = None
        if self._activation is None or _has_hooks(self.sae):
            at_once = max(1, self.dense_latents // self.d_sae)
            parts = [active_entries(self.sae.encode(some)) for some in torch.split(inputs, at_once)]
            return _joined([(tokens + i * at_once, features, values) for i, (tokens, features, values) in enumerate(parts)])
        return self._activation(self.sae, self._preactivations(inputs))

    def _preactivations(self, inputs: Tensor) -> Blocks:
        x, weight, bias = self.sae.process_sae_in(inputs), self.sae.W_enc, self.sae.b_enc
        memory = self._scratch.take(max(self.chunk, len(x)) * self._block, weight)
        for start in range(0, self.d_sae, self._block):
            features = slice(start, min(start + self._block, self.d_sae))
            width = features.stop - start
            block = memory[: len(x) * width].view(len(x), width)
            yield start, torch.addmm(bias[features], x, weight[:, features], out=block)

    def _agrees(self, activation: Callable[[Any, Blocks], Entries], inputs: Tensor) -> bool:
        own = self.sae.encode(inputs)
        if own.is_sparse or own.dtype != self.sae.W_enc.dtype or not bool(own.isfinite().all()):
            return False
        tokens, features, values = activation(self.sae, self._preactivations(inputs))
        mine = torch.zeros_like(own)
        mine[tokens, features] = values
        # Two orders of summation may decide otherwise about a latent on the edge, so a few may differ.
        different = ~torch.isclose(mine, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))
        return int(different.sum()) <= 1e-3 * len(values)


def _relu(sae: Any, blocks: Blocks) -> Entries:
    return _by_token([_above(start, block, 0.0) for start, block in blocks])


def _jumprelu(sae: Any, blocks: Blocks) -> Entries:
    threshold = sae.threshold.clamp(min=0)
    return _by_token([_above(start, block, threshold[start : start + block.shape[1]]) for start, block in blocks])


def _topk(sae: Any, blocks: Blocks) -> Entries:
    scale = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    values = features = None
    for start, block in blocks:
        if scale is not None:
            block.mul_(scale[start : start + block.shape[1]])
        found, place = block.topk(min(sae.cfg.k, block.shape[1]), dim=-1, sorted=False)
        place = place + start
        if values is None or features is None:
            values, features = found, place
            continue
        found, place = torch.cat([values, found], 1), torch.cat([features, place], 1)
        values, kept = found.topk(min(sae.cfg.k, found.shape[1]), dim=-1, sorted=False)
        features = place.gather(1, kept)
    assert values is not None  # an SAE has latents
    assert features is not None
    token, place = torch.nonzero(~(values <= 0), as_tuple=True)
    return token, features[token, place], values[token, place]


ACTIVATIONS: dict[str, Callable[[Any, Blocks], Entries]] = {"StandardSAE": _relu, "JumpReLUSAE": _jumprelu, "TopKSAE": _topk}
"""How the active latents are found among the preactivations, by SAELens' class."""


def _by_token(parts: list[Entries]) -> Entries:
    """The entries of several blocks of features in the order of their tokens."""
    tokens, features, values = _joined(parts)
    if len(parts) == 1:
        return tokens, features, values
    order = tokens.argsort(stable=True)
    return tokens[order], features[order], values[order]


def _joined(parts: list[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    tokens, features, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, features, values


def _above(start: int, preactivations: Tensor, threshold: Tensor | float) -> Entries:
    # Not "greater than", so that NaN counts as active and is reported, rather than passing for zero.
    tokens, features, values = _entries(preactivations, (preactivations <= threshold).logical_not_())
    return tokens, features + start, values


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
