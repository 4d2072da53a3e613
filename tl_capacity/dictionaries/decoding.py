"""Decoding: what a dictionary writes for its active latents, without making latents that are mostly zeros."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_capacity.dictionaries.adapter import decoder_bias, decoder_scale, decoder_vectors, with_skip
from tl_capacity.dictionaries.encoding import Entries, decoder_vectors_add_up


class Decoder:
    """What one SAE writes for some tokens.

    Attributes:
        linear: whether `decode` adds up decoder vectors; None until a latent was seen to be active.
        scale: by what each latent is multiplied before its decoder vector; None for 1.
    """

    def __init__(self, sae: Any) -> None:
        self.sae, self.scale = sae, decoder_scale(sae)
        self.linear: bool | None = None

    def settle(self, inputs: Float[Tensor, "token ..."]) -> None:
        """See on some tokens whether `decode` adds up decoder vectors, where that is not known yet."""
        if self.linear is None:
            self.linear = decoder_vectors_add_up(self.sae, inputs)

    @torch.no_grad()
    def __call__(
        self, entries: Entries, wanted: Bool[Tensor, " token"], inputs: Float[Tensor, "wanted ..."]
    ) -> Float[Tensor, "wanted width"]:
        """The reconstruction of the wanted tokens, given their inputs and the active latents of all or these."""
        if self.linear:
            return with_skip(self.sae, self._sum(entries, wanted, len(inputs)), inputs)
        return with_skip(self.sae, self.sae.decode(self.sae.encode(inputs)).flatten(1), inputs)

    def _sum(self, entries: Entries, wanted: Tensor, count: int) -> Tensor:
        decoder = decoder_vectors(self.sae)
        tokens, features, values = entries
        kept = torch.nonzero(wanted[tokens]).view(-1)
        position = (torch.cumsum(wanted, 0) - 1)[tokens[kept]]
        kept = kept[position.argsort(stable=True)]  # a bag for each token
        counts = torch.bincount(position, minlength=count)
        starts = torch.cumsum(counts, 0) - counts
        features, values = features[kept].to(decoder.device), values[kept].to(decoder.device, decoder.dtype)
        values = values if self.scale is None else values * self.scale.to(values)[features]
        summed = nn.functional.embedding_bag(
            features, decoder, starts.to(decoder.device), mode="sum", per_sample_weights=values
        )
        bias = decoder_bias(self.sae)
        return summed if bias is None else summed + bias
