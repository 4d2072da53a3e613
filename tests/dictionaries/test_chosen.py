"""The latents of chosen features from their own columns of the encoder, against SAELens' `encode` of all features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import D_MODEL, SAES
from place import placed

from tl_capacity.dictionaries.chosen import chosen_latents
from tl_capacity.dictionaries.dictionary import Dictionary
from tl_capacity.errors import DictionaryError

MakeSAE = Callable[..., Any]
TOKENS = 1_500


def activations(seed: int = 5, tokens: int = TOKENS) -> torch.Tensor:
    return placed(torch.randn(tokens, D_MODEL, generator=torch.Generator().manual_seed(seed)))


def firing(sae: Any, few: int = 9) -> list[int]:
    """Features that fire on the text, in no order."""
    often = (sae.encode(activations()).to_dense() != 0).sum(0)
    chosen = torch.nonzero((often > 5) & (often < TOKENS)).view(-1)
    return [int(feature) for feature in chosen.flip(0)[:: max(1, len(chosen) // few)][:few]]


@pytest.mark.parametrize("architecture", [name for name in SAES if name != "topk"])
def test_the_same_latents_as_encode_on_other_text(make_sae: MakeSAE, architecture: str) -> None:
    sae = make_sae(architecture)
    features = firing(sae)
    chosen = chosen_latents(sae, features, activations())
    torch.testing.assert_close(
        chosen(activations(6)), sae.encode(activations(6)).to_dense().detach()[:, features], rtol=1e-4, atol=1e-5
    )
    assert chosen.agreement == 1
    assert (chosen.columns is None) == (architecture in ("gated", "abstopk", "matching_pursuit"))


def test_what_it_says_of_the_text_is_what_encode_says(make_sae: MakeSAE) -> None:
    sae = make_sae("topk")
    features = firing(sae)
    z = sae.encode(activations()).to_dense().detach().double()
    chosen = chosen_latents(sae, features, activations())
    mine = z[:, features]
    assert chosen.tokens == TOKENS
    assert chosen.firings.tolist() == (mine != 0).sum(0).tolist()
    torch.testing.assert_close(chosen.mean, mine.sum(0) / (mine != 0).sum(0))
    torch.testing.assert_close(chosen.square, mine.square().mean(0))
    torch.testing.assert_close(chosen.rate, ((mine != 0).sum(0).double() + 1) / (TOKENS + 2))
    torch.testing.assert_close(chosen.squares, z.square().mean(0)[z.any(0)])
    assert chosen.l0 == pytest.approx(float((z != 0).sum(1).double().mean()))


@pytest.mark.parametrize("rescaled", [False, True])
def test_where_latents_compete_a_feature_fires_as_often_and_with_its_own_values(
    make_sae: MakeSAE, rescaled: bool
) -> None:
    sae = make_sae("topk", rescale_acts_by_decoder_norm=rescaled)
    features = firing(sae)
    z = sae.encode(activations()).to_dense().detach()[:, features]
    chosen = chosen_latents(sae, features, activations())
    found = chosen(activations())
    assert chosen.columns is not None
    assert (found != 0).sum(0).tolist() == (z != 0).sum(0).tolist()
    both = (found != 0) & (z != 0)
    torch.testing.assert_close(found[both], z[both], rtol=1e-4, atol=1e-5)
    assert chosen.agreement == pytest.approx(float(both.sum() / (z != 0).sum()))
    assert chosen.agreement > 0.6


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_dictionaries_of_other_trainers(architecture: str) -> None:
    draw = torch.Generator().manual_seed(1)
    weights = {
        "W_enc": torch.randn(D_MODEL, 50, generator=draw) / 6,
        "b_enc": torch.full((50,), -0.5),
        "W_dec": torch.randn(50, D_MODEL, generator=draw),
        "b_dec": torch.randn(D_MODEL, generator=draw) / 5,
        "threshold": torch.full((50,), 0.3),
        **{name: torch.randn(50, generator=draw) / 5 for name in ("b_gate", "r_mag", "b_mag")},
    }
    sae = Dictionary(architecture, weights)
    chosen = chosen_latents(sae, [40, 3, 11], activations())
    found, expected = chosen(activations(6)), sae.encode(activations(6))[:, [40, 3, 11]]
    # A product of few columns is summed in another order, and decides otherwise about a latent on the edge.
    assert int((~torch.isclose(found, expected, rtol=1e-4, atol=1e-5)).sum()) <= 1
    assert (chosen.columns is None) == (architecture == "gated")


def test_features_that_there_are_not_are_refused_and_silent_ones_left_out(make_sae: MakeSAE) -> None:
    sae = make_sae("standard")
    with pytest.raises(
        DictionaryError, match="no feature 64 in a dictionary of 64 latents: choose numbers from 0 to 63"
    ):
        chosen_latents(sae, [3, 64], activations())
    with torch.no_grad():
        sae.b_enc[[3, 9]] = -1e6
    there = [feature for feature in firing(sae) if feature not in (3, 9)]
    found = chosen_latents(sae, [3, *there, 9], activations())
    assert (found.silent, found.features.tolist()) == ((3, 9), there)
    with pytest.raises(DictionaryError, match="none of the 2 chosen features, such as 9, fires on 1,500 tokens of the"):
        chosen_latents(sae, [9, 3], activations())
