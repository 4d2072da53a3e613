"""Chosen features: the latents of some features of a dictionary, computed from their own columns of the encoder without
making the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tl_capacity.dictionaries.adapter import decoder_vectors, divides_by_decoder_norms, inputs_for
from tl_capacity.dictionaries.encoding import Encoder
from tl_capacity.errors import DictionaryError
from tl_capacity.runtime.devices import exact_device


@dataclass(frozen=True)
class Columns:
    """The encoder's columns of some features: z = p where p is above the threshold, else 0, with p = s(x W + b).

    Attributes:
        weight, bias, scale: W, b and s, which is 1 but for dictionaries that scale by the decoder's norms.
        threshold: of each feature.
    """

    weight: Float[Tensor, "d_in chosen"]
    bias: Float[Tensor, " chosen"]
    scale: Float[Tensor, " chosen"]
    threshold: Float[Tensor, " chosen"]

    def preactivations(self, sae: Any, inputs: Tensor) -> Float[Tensor, "token chosen"]:
        """p of some tokens."""
        return torch.addmm(self.bias, sae.process_sae_in(inputs), self.weight).mul_(self.scale)

    def cut(self, preactivations: Float[Tensor, "token chosen"]) -> Float[Tensor, "token chosen"]:
        """z from p."""
        return torch.where(preactivations > self.threshold, preactivations, 0.0)


@dataclass(frozen=True)
class ChosenLatents:
    """The latents of some features on any tokens, and their statistics on the text that was seen.

    Attributes:
        features: their numbers in the dictionary [chosen]; without those in `silent`, which never fired on the text.
        columns: what gives their latents; None for a dictionary that is asked for all of its latents instead, as its
            own are no function of these columns.
        agreement: of the firings on the text that was seen, the share that the columns give; below 1 where latents
            compete, as of TopK, and a threshold stands for the competition.
        tokens: that were seen.
        firings: of each chosen feature on them [chosen].
        mean, square: means of z over the tokens on which it fires, and of z² over all tokens [chosen].
        squares: mean of z² of every feature of the dictionary that fires [alive], and `l0`, how many fire on a token.
    """

    sae: Any
    features: Int64[Tensor, " chosen"]
    columns: Columns | None
    agreement: float
    tokens: int
    firings: Int64[Tensor, " chosen"]
    mean: Float64[Tensor, " chosen"]
    square: Float64[Tensor, " chosen"]
    squares: Float64[Tensor, " alive"]
    l0: float
    silent: tuple[int, ...] = ()

    @property
    def rate(self) -> Float64[Tensor, " chosen"]:
        """Firing rates, none of them 0 or 1: (firings + 1) / (tokens + 2). This is the mean of the posterior after a
        uniform prior (Laplace).
        """
        return (self.firings.double() + 1) / (self.tokens + 2)

    @torch.no_grad()
    def __call__(self, activations: Float[Tensor, "token ..."]) -> Float[Tensor, "token chosen"]:
        """z of the chosen features, in float32."""
        inputs = inputs_for(self.sae, activations).to(self.sae.W_dec.device)
        if self.columns is None:
            return latents_of(Encoder(self.sae), inputs, self.features)
        return self.columns.cut(self.columns.preactivations(self.sae, inputs)).float()


@torch.no_grad()
def chosen_latents(sae: Any, features: Sequence[int], activations: Float[Tensor, "token ..."]) -> ChosenLatents:
    """The latents of some features, computed from their own columns of the encoder, whose form is found on some text.

    Where each latent is a function of its own column, as of ReLU and JumpReLU dictionaries, these are exact. Where
    latents compete, as of TopK, a feature fires where its preactivation is above the threshold at which it fires as
    often on the text as in the dictionary. Other dictionaries are asked for all latents. Which it is shows on the text.

    Args:
        sae: the dictionary.
        features: numbers of the features.
        activations: what the dictionary reads, on some tokens.

    Raises:
        DictionaryError: where the dictionary has no such feature, or none of them ever fires on these tokens.
    """
    d_sae = len(sae.W_dec)
    if unknown := [feature for feature in features if not 0 <= feature < d_sae]:
        raise DictionaryError(
            f"there is no feature {unknown[0]:,} in a dictionary of {d_sae:,} latents: choose numbers from 0 to"
            f" {d_sae - 1:,}"
        )
    device = sae.W_dec.device
    chosen = torch.tensor(list(features), dtype=torch.int64, device=device)
    inputs = inputs_for(sae, activations).to(device)
    encoder, exact = Encoder(sae), exact_device(device)
    latents = torch.zeros(len(inputs), len(chosen), device=device)
    squares = torch.zeros(d_sae, dtype=torch.float64, device=exact)
    place, active = _places(chosen, d_sae), 0
    for tokens, numbers, values in encoder.entries(inputs):
        squares.index_add_(0, numbers.to(exact), values.to(exact).double().square())
        active += len(values)
        _put(latents, place, tokens, numbers, values)
    firings = (latents != 0).sum(0)
    fired = torch.nonzero(firings).view(-1)
    if not len(fired):
        raise DictionaryError(
            f"none of the {len(chosen):,} chosen features, such as {int(chosen[0]):,}, fires on {len(inputs):,} "
            "tokens of the text: choose others, or give text on which they fire"
        )
    silent = tuple(chosen[firings == 0].tolist())
    chosen, latents, firings = chosen[fired], latents[:, fired], firings[fired]
    columns, agreement = _columns(sae, chosen, inputs, latents)
    totals = latents.to(exact).double()
    return ChosenLatents(
        sae,
        chosen,
        columns,
        agreement,
        len(inputs),
        firings.to(exact),
        totals.sum(0) / firings.to(exact),
        totals.square().mean(0),
        squares[squares > 0] / len(inputs),
        active / len(inputs),
        silent,
    )


def latents_of(
    encoder: Encoder, inputs: Float[Tensor, "token ..."], features: Int64[Tensor, " chosen"]
) -> Float[Tensor, "token chosen"]:
    """z of some features, computed by the whole encoder."""
    latents = torch.zeros(len(inputs), len(features), device=inputs.device)
    place = _places(features, encoder.d_sae)
    for entries in encoder.entries(inputs):
        _put(latents, place, *entries)
    return latents


def _places(features: Tensor, d_sae: int) -> Int64[Tensor, " feature"]:
    """The index of each feature of a dictionary among the chosen ones; −1 for features that are not chosen."""
    place = torch.full((d_sae,), -1, dtype=torch.int64, device=features.device)
    place[features] = torch.arange(len(features), device=features.device)
    return place


def _put(latents: Tensor, place: Tensor, tokens: Tensor, features: Tensor, values: Tensor) -> None:
    """Write the entries of chosen features into [token, chosen]."""
    chosen = torch.nonzero(place[features] >= 0).view(-1)
    latents[tokens[chosen], place[features[chosen]]] = values[chosen].float()


def _columns(
    sae: Any, features: Tensor, inputs: Tensor, latents: Float[Tensor, "token chosen"]
) -> tuple[Columns | None, float]:
    """Columns that reproduce these latents, and the share of the firings that they reproduce; None if
    there are none.
    """
    weight, bias = getattr(sae, "W_enc", None), getattr(sae, "b_enc", None)
    if weight is None or bias is None or not hasattr(sae, "process_sae_in") or bool((latents < 0).any()):
        return None, 1.0
    scale = (
        decoder_vectors(sae)[features].norm(dim=1)
        if divides_by_decoder_norms(sae)
        else torch.ones(len(features), device=features.device)
    )
    threshold = getattr(sae, "threshold", None)
    cut = torch.zeros_like(scale)
    if threshold is not None:
        cut = threshold.detach().expand(len(sae.W_dec))[features].clamp(min=0).to(scale)
    columns = Columns(weight.detach()[:, features].contiguous(), bias.detach()[features], scale.to(weight), cut)
    fires, preactivations = latents != 0, columns.preactivations(sae, inputs)
    if _agree(columns.cut(preactivations), latents, torch.ones_like(fires)):
        return columns, 1.0
    if not _agree(preactivations, latents, fires):
        return None, 1.0  # a latent is something else than its own preactivation
    columns = Columns(columns.weight, columns.bias, columns.scale, _thresholds(preactivations, fires.sum(0)))
    both = (columns.cut(preactivations) != 0) & fires
    return columns, float(both.sum() / fires.sum())


def _thresholds(preactivations: Float[Tensor, "token chosen"], firings: Int64[Tensor, " chosen"]) -> Tensor:
    """The threshold for each feature that its preactivation exceeds as often as the feature fires. It lies half-way to
    the next lower preactivation, and never below 0.
    """
    ordered = preactivations.sort(dim=0, descending=True).values
    last = len(ordered) - 1
    lowest = ordered.gather(0, (firings - 1).clamp(min=0)[None])[0]
    below = ordered.gather(0, firings.clamp(max=last)[None])[0]
    return torch.where(firings > last, 0.0, (lowest + below) / 2).clamp(min=0)


def _agree(found: Tensor, expected: Tensor, where: Bool[Tensor, "token chosen"]) -> bool:
    """Whether two tensors agree at nearly all of the given places. Another order of summation may decide differently
    about a latent near its threshold.
    """
    close = torch.isclose(found.float(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    return int((~close & where).sum()) <= 1e-3 * int((expected != 0).sum())
