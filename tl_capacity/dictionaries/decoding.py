"""Decoding: what a dictionary writes for its active latents, without making latents that are mostly zeros."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from tl_capacity.dictionaries.adapter import decoder_bias, decoder_scale, decoder_vectors, with_skip
from tl_capacity.dictionaries.encoding import Entries, decoder_vectors_add_up
from tl_capacity.runtime.precision import nearly_exact_product


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
        """Find out on some tokens whether `decode` adds up decoder vectors, if that is not known yet."""
        if self.linear is None:
            self.linear = decoder_vectors_add_up(self.sae, inputs)

    @torch.no_grad()
    def __call__(
        self,
        entries: Entries,
        wanted: Bool[Tensor, " token"],
        inputs: Float[Tensor, "wanted ..."],
        at_once: int | None = None,
    ) -> Float[Tensor, "wanted width"]:
        """The reconstruction of the wanted tokens, from their inputs and the active latents of these or
        of all tokens. `at_once` is as in `directly`.
        """
        if self.linear:
            return with_skip(self.sae, self._sum(entries, wanted, len(inputs)), inputs)
        return self.directly(inputs, at_once)

    @torch.no_grad()
    def directly(self, inputs: Float[Tensor, "token ..."], at_once: int | None = None) -> Float[Tensor, "token width"]:
        """The reconstruction of some tokens by the SAE's own `encode` and `decode`.

        Args:
            inputs: of the tokens.
            at_once: how many tokens are encoded and decoded together, as all of their latents are dense; by default
                all of them.
        """
        # What undoes the normalisation of a token remembers the last that were encoded, so each part is decoded first.
        parts = [
            self.sae.decode(self.sae.encode(part)).flatten(1) for part in inputs.split(at_once or len(inputs) or 1)
        ]
        return with_skip(self.sae, torch.cat(parts), inputs)

    def adding_up(self, tokens: int) -> AddingUp:
        """An empty reconstruction of so many tokens, to be added up by a `linear` decoder."""
        return AddingUp(self, tokens)

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


class AddingUp:
    """A reconstruction that is added up from blocks of features.

    It is summed in float32 at least: what a block of features writes is rounded once in the SAE's own precision.
    """

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self._sae, self._scale = decoder.sae, decoder.scale
        self._vectors = decoder_vectors(decoder.sae)
        dtype = torch.promote_types(self._vectors.dtype, torch.float32)
        self._sum = self._vectors.new_zeros(tokens, self._vectors.shape[1], dtype=dtype)

    def add_block(self, features: slice, latents: Float[Tensor, "token feature"]) -> None:
        """Add what a block of features writes."""
        latents = latents.to(self._vectors.dtype)
        latents = latents if self._scale is None else latents * self._scale[features].to(latents)
        self._sum += nearly_exact_product(latents, self._vectors[features])

    def add_largest(self, features: Int64[Tensor, "token k"], values: Float[Tensor, "token k"]) -> None:
        """Add what the largest features of each token write, the same number for each token."""
        values = values.to(self._vectors.dtype)
        values = values if self._scale is None else values * self._scale.to(values)[features]
        self._sum += nn.functional.embedding_bag(features, self._vectors, mode="sum", per_sample_weights=values)

    def written(self, inputs: Float[Tensor, "token ..."]) -> Float[Tensor, "token width"]:
        """The whole reconstruction, with the bias and a skip connection's part of the inputs."""
        bias = decoder_bias(self._sae)
        return with_skip(self._sae, self._sum if bias is None else self._sum + bias, inputs)
