"""Variants of an activation: what a dictionary writes if only its most important latents stay, for several numbers of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from tl_capacity.dictionaries.adapter import decoder_bias, decoder_vectors, with_skip
from tl_capacity.dictionaries.encoding import Entries


class Variants:
    """x̂ = b_dec + Σ_{kept} zᵢ wᵢ + Σ_{lost} z̄ᵢ wᵢ for several numbers of kept latents, from one encoding.

    An entry belongs to the smallest number of kept latents that has it. So each entry is decoded once, whatever the
    number of variants, and a variant is the sum of those before it.
    """

    def __init__(
        self,
        sae: Any,
        order: Int64[Tensor, " feature"],
        kept: Sequence[int],
        means: Float[Tensor, " feature"],
        keep_error: bool,
    ) -> None:
        """
        Args:
            order: all latents, the most important first.
            kept: ascending numbers of latents that stay.
            means: z̄ of each latent, which takes the place of a lost one; zeros leave nothing.
            keep_error: add x − x̂ of the whole dictionary to every variant.
        """
        self.sae, self.keep_error = sae, keep_error
        self.decoder = decoder_vectors(sae)
        device = self.decoder.device
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        bounds = torch.tensor(list(kept), device=order.device)
        self.n = len(kept)
        self._first_with = torch.searchsorted(bounds, rank, right=True).to(device)
        """[feature] the first variant that keeps it; `n` where none does."""
        self._bias = decoder_bias(sae)
        lost = (rank[None] >= bounds[:, None]).to(device)
        constants = (lost * means.to(device)).to(self.decoder) @ self.decoder
        self._constants = constants if self._bias is None else constants + self._bias

    def __call__(
        self, x: Float[Tensor, "token width"], inputs: Tensor, entries: Entries
    ) -> Float[Tensor, "variant token width"]:
        """Each variant of some tokens' activations.

        Args:
            x: the activations that are replaced.
            inputs: the activations that the dictionary reads, the same but for transcoders.
            entries: the active latents of these tokens.
        """
        n_tokens = len(x)
        tokens, features, values = entries
        bags = self._first_with[features] * n_tokens + tokens
        sort = bags.argsort(stable=True)
        starts = torch.searchsorted(bags[sort], torch.arange((self.n + 1) * n_tokens, device=bags.device))
        sums = nn.functional.embedding_bag(
            features[sort], self.decoder, starts, mode="sum", per_sample_weights=values[sort].to(self.decoder.dtype)
        ).view(self.n + 1, n_tokens, -1)
        sums = torch.cumsum(sums, 0, out=sums)
        # The skip connection of a transcoder is no feature, and stays.
        base = with_skip(self.sae, torch.zeros_like(sums[0]), inputs)
        if self.keep_error:
            whole = sums[-1] if self._bias is None else sums[-1] + self._bias
            base = x.to(whole) - whole
        return sums[:-1] + self._constants[:, None] + base

    def edited(
        self, x: Float[Tensor, "row position width"], spliced: Bool[Tensor, "row position"], variants: Tensor
    ) -> Float[Tensor, "rows position width"]:
        """The rows as they are, then those of each variant with the spliced tokens replaced."""
        rows = x.repeat(self.n + 1, 1, 1).view(self.n + 1, *x.shape)
        rows[1:, spliced] = variants.to(rows)
        return rows.flatten(0, 1)
