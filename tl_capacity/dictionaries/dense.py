"""Dense latents on an accelerator: active latents are summed there block by block. The host never asks how many there
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_capacity.dictionaries.encoding import DENSE_AT_ONCE, DENSE_FEATURES, LANES, Encoder
from tl_capacity.dictionaries.reducing import PieceSums, Reducer
from tl_capacity.runtime.compiling import Compiled, compiling_wanted

OWN_ENCODE_BLOCKS = 8
"""Most blocks of the latents' size that an SAE's own `encode` makes on its way."""


@dataclass(frozen=True)
class BlockLatents:
    """The latents of some tokens, in pieces of equal length, for a block of features.

    Attributes:
        features: which block.
        sums: over each piece.
        checked: those of the first tokens, whose reconstruction is checked [token, feature].
    """

    features: slice
    sums: PieceSums
    checked: Tensor


@dataclass(frozen=True)
class LargestLatents:
    """The latents of each token, if it has a fixed number of them.

    Attributes:
        features: [token, k].
        values: zero where a latent is not active.
        active: which are.
    """

    features: Tensor
    values: Tensor
    active: Tensor


class DenseEncoder:
    """The latents of one SAE, summed over pieces of equal length.

    As `Encoder`, which it asks how the SAE's latents are found; nothing here waits for the device, once the first
    tokens have shown that the short cut gives what the SAE's own `encode` does.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.sae = encoder, encoder.sae
        self._reduce, self._largest_latents = Reducer(), Largest()

    def chunk(self, inputs: Tensor) -> int:
        """How many tokens to encode at once, given the first of them."""
        activation = self.encoder.short_cut(inputs)
        if activation is None:
            return max(1, DENSE_AT_ONCE // OWN_ENCODE_BLOCKS // self.encoder.d_sae)
        width = self.encoder.d_sae if activation.least is None else min(self.encoder.d_sae, DENSE_FEATURES)
        return max(1, DENSE_AT_ONCE // width)

    def parts(
        self, inputs: Tensor, padding: Tensor, length: int, checked: int
    ) -> Iterator[BlockLatents | LargestLatents]:
        """The latents of tokens [token, d_in], one block of features after the other.

        Args:
            inputs: as many pieces as there are, one after the other.
            padding: int64, the places whose latents do not count.
            length: of a piece.
            checked: how many of the first tokens are checked.
        """
        activation = self.encoder.short_cut(inputs)
        if activation is None:
            latents = self.sae.encode(inputs).to_dense()
            if len(padding):
                latents = latents.index_fill(0, padding, 0)
            yield self._block(slice(0, self.encoder.d_sae), self._reduce(latents, None, None, length, checked))
        elif activation.least is None:
            yield self._largest(inputs, padding)
        else:
            least = activation.least(self.sae)
            x = self.sae.process_sae_in(inputs)
            for start in range(0, self.encoder.d_sae, DENSE_FEATURES):
                some = slice(start, min(start + DENSE_FEATURES, self.encoder.d_sae))
                weight, bias = self.sae.W_enc[:, some], self.sae.b_enc[some]
                # The bias is added later: PyTorch takes a slower kernel for a product with one.
                products = torch.mm(x, weight, out=self._memory(x, some))
                if len(padding):
                    products.index_fill_(0, padding, -torch.inf)
                bound = least if isinstance(least, float) else least[some]
                yield self._block(some, self._reduce(products, bias, bound, length, checked))

    def _memory(self, x: Tensor, some: slice) -> Tensor:
        """Memory for some features of all tokens, which is overwritten by the next."""
        width = some.stop - some.start
        return self.encoder.scratch.take(len(x) * width, self.sae.W_enc).view(len(x), width)

    def _block(self, some: slice, reduced: tuple[Tensor, PieceSums]) -> BlockLatents:
        """Latents and sums of a block, without what writes nothing."""
        seen, sums = reduced
        dead = self.encoder.dead
        if dead is not None:
            off = dead[some]
            sums = PieceSums(*(each.masked_fill_(off, 0) for each in sums))
            seen = seen.masked_fill(off, 0)
        return BlockLatents(some, sums, seen)

    def _largest(self, inputs: Tensor, padding: Tensor) -> LargestLatents:
        x = self.sae.process_sae_in(inputs)
        products = torch.mm(x, self.sae.W_enc, out=self._memory(x, slice(0, self.encoder.d_sae)))
        scale = self.sae.W_dec.norm(dim=-1) if rescales(self.sae) else None
        k = min(self.sae.cfg.k, products.shape[1])
        values, features = self._largest_latents(LatentsOf(products, self.sae.b_enc, scale), k)
        active = torch.le(values, 0).logical_not_()  # NaN is active, and is reported
        if self.encoder.dead is not None:
            active &= ~self.encoder.dead[features]
        if len(padding):
            active.index_fill_(0, padding, False)
        return LargestLatents(features, values.masked_fill(~active, 0), active)


def in_two_steps(width: int, k: int) -> bool:
    """Whether the k largest of so many latents are looked for among the groups with the largest."""
    return width % LANES == 0 and k * LANES <= width // 2


class LatentsOf(NamedTuple):
    """Latents as they follow from the products with the encoder.

    Attributes:
        products: [token, feature].
        bias, scale: [feature], to be added and to be multiplied by; None where that is done.
    """

    products: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    def done(self) -> LatentsOf:
        """The latents themselves, in the place of the products."""
        latents = self.products if self.bias is None else self.products.add_(self.bias)
        return LatentsOf(latents if self.scale is None else latents.mul_(self.scale))


def largest_of_groups(of: LatentsOf) -> Tensor:
    """The largest latent of each group of features [token, group]. A group's members stand apart, which is how a GPU
    reads them fast.
    """
    latents = of.products if of.bias is None else of.products + of.bias
    latents = latents if of.scale is None else latents * of.scale
    largest: Tensor = latents.unflatten(1, (LANES, -1)).amax(1)
    return largest


def members_of_groups(of: LatentsOf, group: Tensor) -> Tensor:
    """The latents of all members of some groups [token, member · group]."""
    width = of.products.shape[1]
    members = torch.arange(0, width, width // LANES, device=group.device)
    features = (members[:, None] + group[:, None]).flatten(1)
    latents = of.products.gather(1, features)
    latents = latents if of.bias is None else latents + of.bias[features]
    return latents if of.scale is None else latents * of.scale[features]


class Largest:
    """The k largest latents of each token, compiled if that works and pays off.

    `torch.topk` goes over a row once for every two bits of a number. The k largest are in the k groups whose largest
    are largest, so that only those need be sorted.
    """

    def __init__(self) -> None:
        wanted = compiling_wanted()
        self._of_groups, self._members = Compiled(largest_of_groups, wanted), Compiled(members_of_groups, wanted)

    def __call__(self, of: LatentsOf, k: int) -> tuple[Tensor, Tensor]:
        """The k largest [token, k], unordered, and their features. The products are overwritten."""
        device, width = of.products.device, of.products.shape[1]
        if not in_two_steps(width, k):
            return of.done().products.topk(k, dim=-1, sorted=False)
        largest = self._of_groups(device, of)
        if largest is None:
            of = of.done()
            largest = largest_of_groups(of)
        group = largest.topk(k, dim=-1, sorted=False).indices
        latents = self._members(device, of, group)
        latents = members_of_groups(of, group) if latents is None else latents
        values, place = latents.topk(k, dim=-1, sorted=False)
        return values, group.gather(1, place % k) + place // k * (width // LANES)


def rescales(sae: Any) -> bool:
    """Whether a TopK SAE chooses its latents by what they write."""
    return bool(sae.cfg.rescale_acts_by_decoder_norm)
