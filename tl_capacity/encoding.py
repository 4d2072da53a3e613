"""Encoding: which latents are active on a chunk of activations, and their values, with as little as possible made that is mostly zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tl_capacity.interfaces import SparseAutoencoder

Entries = tuple[Tensor, Tensor, Tensor]
"""`(token, feature, value)` of each active latent, in the order of the tokens."""
Products = Iterator[tuple[slice, Tensor]]
"""The features of each block, and their products with the inputs, x·W_enc [token, feature], without the bias; the next block overwrites it."""

DENSE_LATENTS = 768 * 24_576
"""Latents that are dense at once: 75 MB in float32. At 768 tokens of a wide SAE its matrix product is nearly as fast as with all at once; with 256 it takes a
fifth longer."""
BLOCK_LATENTS = 24_576
"""Latents of one token that are dense at once, where they need not all be."""
FEWEST_TOKENS = 64
"""Tokens that an SAE's own `encode`, which makes all latents at once, is given, whatever their number."""

CHECKED_TOKENS = 32
"""Tokens on which an encoder's short cut is compared with the SAE's own `encode` before it is used."""

LANES = 32
"""Features of one token that are first looked at together, by their largest product."""
LOOKED_AT = 256 * 24_576
"""Latents that are looked at together: what is gathered of them is small beside the block, and is still near when it is needed."""
FEW = 1 / 3
"""Share of such groups that may be looked at one by one; where more have an active latent, all of the block is."""


class Scratch:
    """Memory for products; encoders that work one after the other share it, so that it need not grow with their number."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, elements: int, like: Tensor) -> Tensor:
        """So many elements of a tensor's dtype and device, which whoever takes them next overwrites."""
        kept = self._kept
        if kept is None or len(kept) < elements or (kept.dtype, kept.device) != (like.dtype, like.device):
            self.release()
            kept = None  # not both at once
            self._kept = kept = torch.empty(elements, dtype=like.dtype, device=like.device)
        return kept[:elements]

    def release(self) -> None:
        """Give the memory back until it is needed again."""
        self._kept = None


class Encoder:
    """The active latents of one SAE, a chunk of tokens at a time.

    SAELens' `encode` makes a new block of latents at each step: product, bias, activation, mask. For the architectures in `ACTIVATIONS` the product goes into
    one block that is kept, some thousands of features after the others where the SAE is wide, and the activation is a comparison with the threshold less the
    bias, which is added to the active latents alone. Any other SAE, one with hooks on its latents, and one whose `encode` gave something else on the first
    tokens is asked for its own `encode`.
    """

    def __init__(self, sae: SparseAutoencoder, scratch: Scratch | None = None) -> None:
        self.sae: Any = sae
        self.d_sae = int(sae.W_dec.shape[0])
        self._activation = ACTIVATIONS.get(type(sae).__name__)
        self._checked = False
        self.scratch = scratch or Scratch()
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
            return _one_after_another([active_entries(self.sae.encode(some)) for some in torch.split(inputs, at_once)], at_once)
        return self._activation(self.sae, self._products(inputs))

    def _products(self, inputs: Tensor) -> Products:
        x, weight = self.sae.process_sae_in(inputs), self.sae.W_enc
        memory = self.scratch.take(max(self.chunk, len(x)) * self._block, weight)
        for start in range(0, self.d_sae, self._block):
            features = slice(start, min(start + self._block, self.d_sae))
            width = features.stop - start
            yield features, torch.mm(x, weight[:, features], out=memory[: len(x) * width].view(len(x), width))

    def _agrees(self, activation: Callable[[Any, Products], Entries], inputs: Tensor) -> bool:
        own = self.sae.encode(inputs)
        if own.is_sparse or own.dtype != self.sae.W_enc.dtype or not bool(own.isfinite().all()):
            return False
        tokens, features, values = activation(self.sae, self._products(inputs))
        mine = torch.zeros_like(own)
        mine[tokens, features] = values
        # Two orders of summation may decide otherwise about a latent on the edge, so a few may differ.
        different = ~torch.isclose(mine, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))
        return int(different.sum()) <= 1e-3 * len(values)


def _relu(sae: Any, products: Products) -> Entries:
    return _by_token([_above(features, block, -sae.b_enc, sae.b_enc) for features, block in products])


def _jumprelu(sae: Any, products: Products) -> Entries:
    threshold = sae.threshold.clamp(min=0) - sae.b_enc
    return _by_token([_above(features, block, threshold, sae.b_enc) for features, block in products])


def _topk(sae: Any, products: Products) -> Entries:
    scale = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    values = features = None
    for some, block in products:
        block.add_(sae.b_enc[some])
        if scale is not None:
            block.mul_(scale[some])
        found, place = block.topk(min(sae.cfg.k, block.shape[1]), dim=-1, sorted=False)
        place = place + some.start
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


ACTIVATIONS: dict[str, Callable[[Any, Products], Entries]] = {"StandardSAE": _relu, "JumpReLUSAE": _jumprelu, "TopKSAE": _topk}
"""How the active latents are found among the products, by SAELens' class."""


def _by_token(parts: list[Entries]) -> Entries:
    """The entries of several blocks of features in the order of their tokens."""
    tokens, features, values = _joined(parts)
    if len(parts) == 1:
        return tokens, features, values
    order = tokens.argsort(stable=True)
    return tokens[order], features[order], values[order]


def _one_after_another(parts: list[Entries], tokens_each: int) -> Entries:
    """The entries of neighbouring tokens, so many in each part."""
    return _joined([(tokens + i * tokens_each, features, values) for i, (tokens, features, values) in enumerate(parts)])


def _joined(parts: list[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    tokens, features, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, features, values


def _above(some: slice, products: Tensor, threshold: Tensor, bias: Tensor) -> Entries:
    """The latents of a block whose product is not at or below its threshold; so NaN counts as active and is reported, rather than passing for zero."""
    at_once = max(1, LOOKED_AT // products.shape[1])
    tokens, features, values = _one_after_another([_over(rows, threshold[some]) for rows in torch.split(products, at_once)], at_once)
    return tokens, features + some.start, values + bias[some][features]


def _over(products: Tensor, threshold: Tensor) -> Entries:
    """The entries of [token, feature] that are not at or below a threshold [feature].

    On the CPU comparing is several times slower than taking the largest, so groups are first judged by their largest product and their least threshold.
    """
    width = products.shape[1]
    if products.device.type == "cpu" and width % LANES == 0:
        groups, thresholds = products.view(-1, LANES), threshold.view(-1, LANES)
        largest = groups.amax(-1).view(len(products), len(thresholds))
        some = torch.nonzero(torch.le(largest, thresholds.amin(-1)).logical_not_().view(-1)).view(-1)
        if len(some) <= FEW * largest.numel():
            found = groups.index_select(0, some)
            active = torch.nonzero(torch.le(found, thresholds.index_select(0, some % len(thresholds))).logical_not_().view(-1)).view(-1)
            return _at(some[active // LANES] * LANES + active % LANES, found.view(-1)[active], width)
    return _entries(products, torch.le(products, threshold).logical_not_())


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
    """The entries of contiguous [token, feature] where `active` is set."""
    place = _places(active)
    return _at(place, latents.view(-1)[place], latents.shape[-1])


def _at(place: Tensor, values: Tensor, width: int) -> Entries:
    """Entries by their flat place in [token, feature]."""
    tokens = torch.div(place, width, rounding_mode="floor")
    return tokens, place - tokens * width, values


def _places(active: Tensor) -> Tensor:
    """The flat places of contiguous flags that are set.

    `torch.nonzero` on the CPU costs per element whether zero or not, and few are set. So eight at a time are tested first, as one int64.
    """
    flags = active.view(-1)
    if flags.device.type != "cpu" or len(flags) % 8:
        return torch.nonzero(flags).view(-1)
    octets = torch.nonzero(flags.view(torch.int64)).view(-1)
    octet, lane = torch.nonzero(flags.view(-1, 8).index_select(0, octets), as_tuple=True)
    return octets[octet] * 8 + lane


def _has_hooks(sae: Any) -> bool:
    return any(getattr(sae, name)._forward_hooks for name in ("hook_sae_acts_pre", "hook_sae_acts_post") if hasattr(sae, name))
