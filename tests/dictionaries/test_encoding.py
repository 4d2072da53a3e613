"""The short cuts that find active latents, against the SAE's own `encode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import D_MODEL, SAES
from hypothesis import given, settings
from hypothesis import strategies as st
from place import placed

from tl_capacity.dictionaries import encoding
from tl_capacity.dictionaries.encoding import ACTIVATIONS, CHECKED_TOKENS, Encoder
from tl_capacity.runtime.scratch import Scratch

MakeSAE = Callable[..., Any]
SHORT = [name for name, (kind, _) in SAES.items() if kind in ACTIVATIONS]


def dense(encoder: Encoder, inputs: torch.Tensor) -> torch.Tensor:
    tokens, features, values = encoder(inputs)
    latents = torch.zeros(len(inputs), encoder.sae.cfg.d_sae, dtype=values.dtype, device=values.device)
    latents[tokens, features] = values
    return latents


def inputs(rows: int = 3 * CHECKED_TOKENS) -> torch.Tensor:
    return placed(torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("d_sae", [64, 61])
def test_the_same_latents_as_encode(make_sae: MakeSAE, architecture: str, d_sae: int) -> None:
    sae = make_sae(architecture, d_sae=d_sae)
    own = sae.encode(inputs()).detach()
    assert 0 < own.count_nonzero() < own.numel()
    torch.testing.assert_close(dense(Encoder(sae), inputs()), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("block", [8, 24, 60, 1])
def test_latents_split_into_blocks(
    make_sae: MakeSAE, architecture: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of features change no latent, whether they divide the SAE, or hold fewer than TopK's k; and those of a
    feature stay in the order of the tokens.
    """
    monkeypatch.setattr(
        encoding,
        "ACTIVATIONS",
        {name: replace(activation, features_at_once=block) for name, activation in ACTIVATIONS.items()},
    )
    sae = make_sae(architecture, d_sae=61)
    encoder = Encoder(sae)
    encoder.hold(200)
    own = sae.encode(inputs()).detach()
    torch.testing.assert_close(dense(encoder, inputs()), own, rtol=1e-5, atol=1e-5)
    tokens, features, _ = encoder(inputs())
    by_feature = tokens[features.argsort(stable=True)]
    assert torch.equal(by_feature, tokens[np.lexsort((tokens.cpu(), features.cpu()))])


def test_several_saes_share_their_memory(make_sae: MakeSAE) -> None:
    """SAEs of other sizes, kinds and precisions, in turns: the memory grows to what the largest needs, and no entry is
    overwritten.
    """
    scratch = Scratch()
    saes = [
        make_sae("standard", d_sae=24),
        make_sae("jumprelu", d_sae=61),
        make_sae("topk", d_sae=40),
        make_sae("standard", d_sae=24).double(),
    ]
    encoders = [Encoder(sae, scratch) for sae in saes]
    for encoder in encoders:
        encoder.hold(61 * len(inputs()))
    for _ in range(2):
        found = [(encoder, encoder(inputs().to(encoder.sae.W_enc.dtype))) for encoder in encoders]
        for encoder, (tokens, features, values) in found:
            own = encoder.sae.encode(inputs().to(encoder.sae.W_enc.dtype)).detach()
            mine = torch.zeros_like(own)
            mine[tokens, features] = values
            torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)
    assert scratch.take(1, saes[0].W_enc).untyped_storage().nbytes() <= 4 * 61 * len(inputs())
    scratch.release()
    assert scratch.take(1, saes[0].W_enc).untyped_storage().nbytes() == 4


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(0, 5),
    groups=st.integers(1, 4),
    odd=st.integers(0, 9),
    rarity=st.sampled_from([-1.0, 0.5, 2.0]),
)
def test_what_is_above_a_threshold(data: st.DataObject, tokens: int, groups: int, odd: int, rarity: float) -> None:
    """Few or many, at the threshold, infinite or NaN: the entries of a plain comparison, in the order of the tokens."""
    width = groups * 8 + odd
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    products, threshold = (
        torch.randn(tokens, width, generator=random),
        torch.randn(width, generator=random) / 4 + rarity,
    )
    for place in data.draw(st.lists(st.integers(0, max(0, tokens * width - 1)), max_size=4)) if tokens else ():
        value = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), None]))
        products.view(-1)[place] = threshold[place % width] if value is None else value
    if data.draw(st.booleans()):
        threshold[data.draw(st.integers(0, width - 1))] = float("nan")
    (found,) = encoding._above(threshold, torch.zeros(width), iter([(slice(0, width), products)]))
    expected = torch.nonzero(~(products <= threshold), as_tuple=True)
    assert all(torch.equal(mine, own) for mine, own in zip(found[:2], expected, strict=True))
    torch.testing.assert_close(found[2], products[expected], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(0, 5),
    groups=st.integers(1, 9),
    odd=st.sampled_from([0, 0, 0, 7]),
    distinct=st.sampled_from([1, 3, 1000]),
)
def test_the_largest(data: st.DataObject, tokens: int, groups: int, odd: int, distinct: int) -> None:
    """Of few or many, with ties, infinite or NaN: the values of `torch.topk`, from places that hold them."""
    width = groups * encoding.LANES + odd
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    latents = torch.randint(-distinct, distinct + 1, (tokens, width), generator=random) / distinct
    for place in data.draw(st.lists(st.integers(0, max(0, tokens * width - 1)), max_size=4)) if tokens else ():
        latents.view(-1)[place] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    k = data.draw(st.integers(1, groups))
    with patch.object(encoding, "SORTED_AT_ONCE", data.draw(st.sampled_from([1, 2 * width, 100 * width]))):
        values, features = encoding._largest(latents, k)
    torch.testing.assert_close(
        values.sort(-1).values, latents.topk(k).values.sort(-1).values, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(latents.gather(1, features), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in features.tolist())


@pytest.mark.parametrize("architecture", SHORT)
def test_no_latents_are_encoded_again(make_sae: MakeSAE, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SAE's own `encode` sees the first few tokens, and no more."""
    sae, seen = make_sae(architecture), []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: seen.append(len(x)) or encode(x))
    encoder = Encoder(sae)
    for chunk in inputs().split(CHECKED_TOKENS):
        encoder(chunk)
    assert seen == [1] * CHECKED_TOKENS


def test_topk_that_rescales_by_the_decoder(make_sae: MakeSAE) -> None:
    sae = make_sae("topk", rescale_acts_by_decoder_norm=True)
    torch.testing.assert_close(dense(Encoder(sae), inputs()), sae.encode(inputs()).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", SHORT)
def test_hooks_on_the_latents_are_obeyed(make_sae: MakeSAE, architecture: str) -> None:
    sae = make_sae(architecture)
    encoder = Encoder(sae)
    before = dense(encoder, inputs())
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: torch.cat([torch.zeros_like(acts[:, :32]), acts[:, 32:]], dim=1))
    after = dense(encoder, inputs())
    assert before[:, :32].any()
    assert not after[:, :32].any()
    torch.testing.assert_close(after[:, 32:], before[:, 32:], rtol=1e-5, atol=1e-5)


def test_an_encode_of_ones_own_is_used(make_sae: MakeSAE) -> None:
    """A class that only looks like SAELens' (same name, another activation) is found out on the first tokens."""
    from sae_lens import StandardSAE

    other = type("StandardSAE", (StandardSAE,), {"encode": lambda self, x: 2 * StandardSAE.encode(self, x)})
    sae = make_sae("standard")
    sae.__class__ = other
    torch.testing.assert_close(dense(Encoder(sae), inputs()), sae.encode(inputs()).detach())


@pytest.mark.parametrize("architecture", SHORT)
def test_nan_is_an_active_latent(make_sae: MakeSAE, architecture: str) -> None:
    """So that it is found and reported: a comparison would let it pass for zero."""
    sae = make_sae(architecture)
    encoder = Encoder(sae)
    encoder(inputs())
    with torch.no_grad():
        sae.b_enc[3] = float("nan")
    tokens, features, values = encoder(inputs())
    assert values[features == 3].isnan().all()
    assert len(tokens[features == 3]) == len(inputs())
