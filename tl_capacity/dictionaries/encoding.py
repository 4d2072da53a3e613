"""Encoding: which latents are active on a chunk of activations, and their values. As few zeros as possible are
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_capacity.dictionaries.adapter import dead_latents, decoder_bias, decoder_scale, decoder_vectors
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.runtime.devices import is_accelerator
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.runtime.threads import cores_for, side_by_side

Result = TypeVar("Result")

Entries = tuple[Tensor, Tensor, Tensor]
"""`(token, feature, value)` of each active latent. Entries of one feature are in the order of the tokens."""
Products = Iterator[tuple[slice, Tensor]]
"""The features of each block, and their products with the inputs, x·W_enc [token, feature], without the bias. The next
block overwrites the products.
"""
Find = Callable[[Any, Products], Iterator[Entries]]
"""A function from an SAE and its products to the active latents, one block of features after the other."""

ENCODED_TOKENS = 2048
"""Tokens encoded at once, if memory allows. With fewer, a matrix product is slower: with 256 by a quarter."""
DENSE_LATENTS = 768 * 24_576
"""Most latents that are dense at once: 75 MB in float32."""
FEATURE_BLOCK = 512
"""Features that each core computes at once if each latent is judged by itself: 4 MB at 2,048 tokens. More would take
memory and save no time.
"""
ROW_BLOCK = 24_576
"""The same if the latents of a token are compared with each other."""
DENSE_FEATURES = 16_384
"""The same on an accelerator, which would wait for its next order if blocks were smaller."""
DENSE_AT_ONCE = 2**28
"""Most latents that are dense at once on an accelerator: 1 GiB in float32."""
FEWEST_TOKENS = 64
"""Fewest tokens given to an SAE's own `encode`, which makes all latents at once."""

CHECKED_TOKENS = 16
"""Tokens on which an encoder's short cut is compared with the SAE's own `encode` before it is used."""

LANES = 32
"""Features of one token in a group. To find the largest k, the largest of each group is looked at first."""
FEW = 1 / 3
"""Largest k as a share of the number of groups. For a larger k, all latents are sorted."""
SORTED_AT_ONCE = 256 * 24_576
"""Latents among which the largest are found together. What is gathered of them is small beside the block, and is still
in the cache when needed.
"""


class Encoder:
    """The active latents of one SAE, a chunk of tokens at a time.

    SAELens' `encode` makes a new block of latents at each step: product, bias, activation, mask. For the architectures
    in `ACTIVATIONS` the products go into one block that is kept, some thousands of features after the others, and what
    is active is found there. Any other SAE, one with hooks on its latents, and one whose `encode` gave something else
    on the first tokens is asked for its own `encode`.

    A latent whose decoder vector is zero writes nothing, so it is never active here.

    Attributes:
        sae: the SAE.
        d_sae: how many latents it has.
        dead: bool [feature], latents whose decoder vector is zero; None where there are none.
        scratch: the memory of its products.
        dense_latents: how many are dense at once.
        own_latents: how many the SAE's own `encode` makes at once.
        chunk: tokens to encode at once.
    """

    def __init__(self, sae: SparseAutoencoder, scratch: Scratch | None = None) -> None:
        self.sae: Any = sae
        self.d_sae = int(sae.W_dec.shape[0])
        self._activation = ACTIVATIONS.get(type(sae).__name__)
        self.dead = dead_latents(sae)
        self._checked = False
        self.scratch = scratch or Scratch()
        most = DENSE_AT_ONCE if is_accelerator(sae.W_dec.device) else DENSE_LATENTS
        self.hold(most if self._activation is not None else max(DENSE_LATENTS, FEWEST_TOKENS * self.d_sae))

    def hold(self, latents: int) -> None:
        """Allow so many latents to be dense at once, at least those of one token, also in the SAE's own `encode`. This
        sets `chunk`, the tokens to encode at once.
        """
        self.dense_latents = self.own_latents = latents
        self._block, device = self.d_sae, self.sae.W_dec.device
        if self._activation is not None:
            few = DENSE_FEATURES if is_accelerator(device) else 0
            cores = cores_for(device) if self._activation.apart else 1
            self._block = min(self.d_sae, max(self._activation.features_at_once * cores, few))
        self.chunk = min(ENCODED_TOKENS, max(1, latents // self._block))

    def hold_own(self, latents: int) -> None:
        """Allow the SAE's own `encode` to make so many latents at once, at least those of one token."""
        self.own_latents = latents

    @property
    def own_tokens(self) -> int:
        """Tokens to give the SAE's own `encode` at once."""
        return max(1, self.own_latents // self.d_sae)

    @property
    def kept_latents(self) -> int:
        """Latents in the block that is kept between uses; none where the SAE's own `encode` makes them."""
        return 0 if self._activation is None else self.chunk * self._block

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Entries:
        """The active latents of at most `chunk` tokens [token, d_in]."""
        return joined(self.each_part(inputs, lambda entries: entries))

    def entries(self, inputs: Tensor) -> Iterator[Entries]:
        """The active latents of any number of tokens, encoded `chunk` tokens at a time."""
        for start in range(0, len(inputs), self.chunk):
            tokens, features, values = self(inputs[start : start + self.chunk])
            yield tokens + start, features, values

    def each_part(self, inputs: Tensor, use: Callable[[Entries], Result]) -> list[Result]:
        """What `use` makes of the active latents of at most `chunk` tokens. It is given them in parts, so that all of
        them need never be in memory. Call it under `torch.no_grad`.

        Several threads may call `use` at once. The parts that they have share no feature.
        """
        inputs = inputs.to(self.sae.W_dec.device)  # the model may run elsewhere
        activation = self.short_cut(inputs)
        if activation is None:
            return [use(self._written(entries)) for entries in self._own(inputs)]
        return self._found(activation, inputs, lambda entries: use(self._written(entries)))

    def _found(self, activation: Activation, inputs: Tensor, use: Callable[[Entries], Result]) -> list[Result]:
        """As `each_part`, by a short cut, including latents whose decoder vector is zero."""
        x = self.sae.process_sae_in(inputs)
        cores = cores_for(x.device) if activation.apart else 1
        width = -(-self._block // cores)
        blocks = [slice(first, min(first + width, self.d_sae)) for first in range(0, self.d_sae, width)]
        # Of the largest chunk, so that a smaller one that comes first does not make it grow.
        memory = self.scratch.take(cores * max(self.chunk, len(x)) * width, self.sae.W_enc).view(cores, -1)
        if not activation.apart:
            return [use(part) for part in activation.find(self.sae, self._products(x, blocks, memory[0]))]

        def used(core: int, block: slice) -> Result:
            (part,) = activation.find(self.sae, self._products(x, [block], memory[core]))
            return use(part)

        return side_by_side(used, blocks, cores)

    def _own(self, inputs: Tensor) -> Iterator[Entries]:
        """The active latents by the SAE's own `encode`."""
        for start in range(0, max(1, len(inputs)), self.own_tokens):
            tokens, features, values = active_entries(self.sae.encode(inputs[start : start + self.own_tokens]))
            yield tokens + start, features, values

    def _written(self, entries: Entries) -> Entries:
        """Entries without those of latents that write nothing."""
        if self.dead is None:
            return entries
        tokens, features, values = entries
        kept = torch.nonzero(~self.dead.to(features.device)[features]).view(-1)
        return tokens[kept], features[kept], values[kept]

    def short_cut(self, inputs: Tensor) -> Activation | None:
        """How the active latents are found; None if the SAE's own `encode` must be asked. The two are compared on the
        first inputs.
        """
        if not self._checked and len(inputs):
            self._checked = True
            if self._activation is not None and not self._agrees(self._activation, inputs[:CHECKED_TOKENS]):
                self._activation = None
        return None if _has_hooks(self.sae) else self._activation

    def _products(self, x: Tensor, blocks: Sequence[slice], memory: Tensor) -> Products:
        for features in blocks:
            width = features.stop - features.start
            block = memory[: len(x) * width].view(len(x), width)
            yield features, torch.mm(x, self.sae.W_enc[:, features], out=block)

    def _agrees(self, activation: Activation, inputs: Tensor) -> bool:
        expected = _encoded(self.sae, inputs)
        if expected.is_sparse or expected.dtype != self.sae.W_enc.dtype or not bool(expected.isfinite().all()):
            return False
        tokens, features, values = joined(self._found(activation, inputs, lambda entries: entries))
        latents = torch.zeros_like(expected)
        latents[tokens, features] = values
        # Two orders of summation may decide otherwise about a latent on the edge, so a few may differ.
        different = ~torch.isclose(latents, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        return int(different.sum()) <= 1e-3 * len(values)


def _relu(sae: Any, products: Products) -> Iterator[Entries]:
    return _above(-sae.b_enc, sae.b_enc, products)


def _jumprelu(sae: Any, products: Products) -> Iterator[Entries]:
    return _above(sae.threshold.clamp(min=0) - sae.b_enc, sae.b_enc, products)


def _topk(sae: Any, products: Products) -> Iterator[Entries]:
    scale = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    values = features = None
    for some, block in products:
        block.add_(sae.b_enc[some])
        if scale is not None:
            block.mul_(scale[some])
        largest, place = _largest(block, min(sae.cfg.k, block.shape[1]))
        place = place + some.start
        if values is None or features is None:
            values, features = largest, place
            continue
        largest, place = torch.cat([values, largest], 1), torch.cat([features, place], 1)
        values, kept = largest.topk(min(sae.cfg.k, largest.shape[1]), dim=-1, sorted=False)
        features = place.gather(1, kept)
    assert values is not None  # an SAE has latents
    assert features is not None
    token, place = torch.nonzero(~(values <= 0), as_tuple=True)
    yield token, features[token, place], values[token, place]


@dataclass(frozen=True)
class Activation:
    """How the active latents of one architecture are found.

    Attributes:
        find: finds them.
        features_at_once: how many features' products it is given at once, on each core.
        least: what a latent must exceed before its activation, a number for all or [feature]; None where the latents of
            a token are compared with each other.
    """

    find: Find
    features_at_once: int
    least: Callable[[Any], Tensor | float] | None = None

    @property
    def apart(self) -> bool:
        """Whether each latent is judged by itself, so that blocks of features can be encoded in any order."""
        return self.least is not None


ACTIVATIONS = {
    "StandardSAE": Activation(_relu, FEATURE_BLOCK, lambda _: 0.0),
    "JumpReLUSAE": Activation(_jumprelu, FEATURE_BLOCK, lambda sae: sae.threshold.clamp(min=0)),
    "TopKSAE": Activation(_topk, ROW_BLOCK),
}
"""By the name of SAELens' class."""


def joined(parts: Sequence[Entries]) -> Entries:
    """The entries of several parts, at least one."""
    if len(parts) == 1:
        return parts[0]
    tokens, features, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, features, values


def _largest(latents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest latents of each token [token, k], unordered, and their features.

    On the CPU `torch.topk` is slow where k is a small share: as many groups as k have a latent that is not below the
    k-th largest of the groups' largest ones, so what is below it need not be sorted.
    """
    width = latents.shape[1]
    if latents.device.type != "cpu" or not len(latents) or width % LANES or k > FEW * (width // LANES):
        return latents.topk(k, dim=-1, sorted=False)
    parts = [_largest_by_group(rows, k) for rows in torch.split(latents, max(1, SORTED_AT_ONCE // width))]
    return torch.cat([values for values, _ in parts]), torch.cat([features for _, features in parts])


def _largest_by_group(latents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    groups = latents.view(-1, LANES)
    largest = groups.amax(-1).view(len(latents), -1)
    least = largest.topk(k, dim=-1, sorted=False).values.amin(-1)
    some = torch.nonzero(torch.lt(largest, least[:, None]).logical_not_().view(-1)).view(-1)
    token = torch.div(some, largest.shape[1], rounding_mode="floor")
    members = groups.index_select(0, some)
    candidates = torch.nonzero(torch.lt(members, least[token, None]).logical_not_().view(-1)).view(-1)
    group = candidates // LANES
    tokens, features, values = _at(
        some[group] * LANES + candidates % LANES, members.view(-1)[candidates], latents.shape[1]
    )
    # A row for each token, as long as the longest needs.
    counts = torch.bincount(tokens, minlength=len(latents))
    starts = counts.cumsum(0) - counts
    rows = latents.new_full((len(latents), int(counts.max())), -torch.inf)
    rows[tokens, torch.arange(len(tokens)) - starts[tokens]] = values
    values, place = rows.topk(k, dim=-1, sorted=False)
    return values, features[starts[:, None] + place]


def _above(threshold: Tensor, bias: Tensor, products: Products) -> Iterator[Entries]:
    """The latents whose product is not at or below its threshold. So NaN counts as active and is reported, instead of
    passing for zero.
    """
    for some, block in products:
        tokens, features, values = _entries(block, torch.le(block, threshold[some]).logical_not_())
        yield tokens, features + some.start, values + bias[some][features]


def _encoded(sae: Any, inputs: Tensor) -> Tensor:
    """A few tokens' latents from the SAE's own `encode`, one token at a time. For several tokens and all features, MKL
    would keep tens of MB.
    """
    return torch.cat([sae.encode(token) for token in torch.split(inputs, 1)])


@torch.no_grad()
def decoder_vectors_add_up(sae: Any, inputs: Tensor) -> bool | None:
    """Whether `decode` adds up decoder vectors times `decoder_scale`. This is tested on a few tokens [token, d_in], so
    no architecture needs to be known. None if no latent is active or the output is not finite.
    """
    # One token after the other: what undoes the normalisation of a token remembers the last that was encoded.
    pairs = []
    for token in torch.split(inputs[:CHECKED_TOKENS].to(sae.W_dec.device), 1):
        latent = sae.encode(token)
        pairs.append((latent.to_dense(), sae.decode(latent).flatten(1)))
    latents, written = (torch.cat(each) for each in zip(*pairs, strict=True))
    if not bool(latents.any()):
        return None
    decoder, bias, scale = decoder_vectors(sae), decoder_bias(sae), decoder_scale(sae)
    if scale is not None and not bool(scale.all()):
        return True  # by definition: SAELens' own `decode` gives NaN
    values = latents.to(decoder)
    summed = (values if scale is None else values * scale) @ decoder
    summed = summed if bias is None else summed + bias
    if written.shape != summed.shape:
        return False
    if not bool(written.isfinite().all()):
        return None
    return torch.allclose(summed, written, rtol=1e-3, atol=1e-4 * float(written.abs().max()))


def active_entries(latents: Tensor) -> Entries:
    """The non-zero latents of [token, feature]; negative ones are active too."""
    latents = latents.to_dense().contiguous()
    return _entries(latents, latents != 0)


def _entries(latents: Tensor, active: Tensor) -> Entries:
    """The entries of contiguous [token, feature] at which `active` is set."""
    place = _places(active)
    return _at(place, latents.view(-1)[place], latents.shape[-1])


def _at(place: Tensor, values: Tensor, width: int) -> Entries:
    """Entries by their flat index in [token, feature]."""
    tokens = torch.div(place, width, rounding_mode="floor")
    return tokens, place - tokens * width, values


def _places(active: Tensor) -> Tensor:
    """The flat indices of contiguous flags that are set.

    `torch.nonzero` on the CPU costs per element whether zero or not, and few are set. So eight at a time are tested
    first, as one int64.
    """
    flags = active.view(-1)
    if flags.device.type != "cpu" or len(flags) % 8:
        return torch.nonzero(flags).view(-1)
    octets = torch.nonzero(flags.view(torch.int64)).view(-1)
    inside = torch.nonzero(flags.view(torch.int64).index_select(0, octets).view(torch.bool)).view(-1)
    return octets[inside // 8] * 8 + inside % 8


def _has_hooks(sae: Any) -> bool:
    return any(
        getattr(sae, name)._forward_hooks for name in ("hook_sae_acts_pre", "hook_sae_acts_post") if hasattr(sae, name)
    )
