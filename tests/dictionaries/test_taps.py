"""Taps beyond the residual stream, on both kinds of TransformerLens model: MLP and attention outputs, heads, neurons;
SAEs and bases, counts and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, D_MODEL, HEADS
from place import placed
from sklearn.decomposition import PCA
from torch.nn import functional as F

import tl_capacity as tlc
from tl_capacity.dictionaries.bases import BasisSpec, NeuronBasis
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import load_model
from tl_capacity.text.streams import TokenStream

MakeSAE = Callable[..., Any]
RESIDUAL, MLP_OUT, ATTENTION_OUT = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"
Z, NEURONS = "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"
LENS = ("HookedTransformer", "TransformerBridge")


def at(model: Any, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    """Activations [row, position, d] with heads joined, from the model's own cache."""
    with torch.no_grad():
        return model.run_with_cache(tokens)[1][hook].flatten(2)


def attribution(model: Any, hook: str, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """E|z·∂L/∂z| per feature, by autograd through latents that are a leaf, with the SAE's error added back."""
    kept: list[torch.Tensor] = []

    def splice(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        x = activation.flatten(2).flatten(0, 1)
        z = sae.encode(x).detach().requires_grad_()
        kept.append(z)
        return (sae.decode(z) + (x - sae.decode(z)).detach()).view_as(activation)

    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, splice)])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, kept[0])
    counted = (tokens != BOS).flatten()
    return (kept[0] * gradient)[counted].abs().double().sum(0).detach() / counted.sum()


@pytest.mark.parametrize("hook", [MLP_OUT, ATTENTION_OUT, Z, NEURONS])
@pytest.mark.parametrize("kind", LENS)
def test_an_sae_anywhere(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, hook: str
) -> None:
    model = models_by_kind[kind]
    x = at(model, hook, tokens)[tokens != BOS]
    sae = make_sae("standard", hook, d_in=x.shape[1])
    with torch.no_grad():
        sae.W_enc *= (
            2 / x.norm(dim=1).mean()
        )  # activations differ in size from place to place; with this, some latents fire everywhere
        sae.b_enc.fill_(0)
    with tlc.add_capacity_hooks(model, sae, importance=["gradient"], fvu_every=1, mask_token_ids=[BOS]) as capacity:
        found = capacity.run(tokens.split(8)).measurement()[hook]
    z = sae.encode(x).detach()
    assert found.width == x.shape[1]
    assert 0 < (z != 0).float().mean() < 1
    assert (
        abs(found.summary.arrays["counts"].sum(0) - (z != 0).sum(0).numpy(force=True)).max() <= 1
    )  # batches of another shape round otherwise
    np.testing.assert_allclose(
        found.summary.arrays["squares"].sum(0), z.double().square().sum(0).numpy(force=True), rtol=1e-3, atol=1e-5
    )
    fvu = (x - sae.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
    assert found.summary.fvu.value == pytest.approx(float(fvu.detach()), rel=1e-3)
    expected = attribution(model, hook, sae, tokens)
    np.testing.assert_allclose(
        found.importance("gradient"),
        expected[found.summary.alive].numpy(force=True),
        rtol=5e-3,
        atol=1e-3 * float(expected.max()),
    )


@pytest.mark.parametrize("hook", [MLP_OUT, ATTENTION_OUT, Z])
def test_without_a_bridge(models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, hook: str) -> None:
    """The Hugging Face model itself gives what a bridge around the same weights gives, gradients too."""
    bridge = models_by_kind["TransformerBridge"]
    sae = make_sae("topk", hook, d_in=at(bridge, hook, tokens).shape[-1])
    found = []
    for kind in ("TransformerBridge", "gpt_neox"):
        with tlc.add_capacity_hooks(
            models_by_kind[kind], sae, importance=["gradient"], fvu_every=1, mask_token_ids=[BOS]
        ) as capacity:
            found.append(capacity.run(tokens.split(8), progress=False).measurement()[hook])
    theirs, ours = found
    assert ours.width == theirs.width
    assert abs(ours.summary.arrays["counts"].sum(0) - theirs.summary.arrays["counts"].sum(0)).max() <= 1
    assert ours.summary.fvu.value == pytest.approx(theirs.summary.fvu.value, rel=1e-3)
    scale = float(theirs.importance("gradient").max())
    np.testing.assert_allclose(ours.importance("gradient"), theirs.importance("gradient"), rtol=5e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("hook", [RESIDUAL, NEURONS, Z])
@pytest.mark.parametrize("kind", LENS)
def test_neurons_as_features(
    models_by_kind: dict[str, Any], tokens: torch.Tensor, tokenizer: Any, kind: str, hook: str
) -> None:
    model = models_by_kind[kind]
    basis = placed(BasisSpec("neurons", hook, 5).fit(model, TokenStream(tokens.numpy(force=True))))
    x = at(model, hook, tokens)[tokens != BOS].double()
    order = x.abs().argsort(dim=1, descending=True)[:, :5]
    kept = torch.zeros_like(x).scatter(1, order, x.gather(1, order))
    with tlc.add_capacity_hooks(model, basis, importance=["gradient"], fvu_every=1, mask_token_ids=[BOS]) as capacity:
        found = capacity.run(tokens.split(8)).measurement()[hook]
    assert found.summary.l0.value == pytest.approx(5)
    np.testing.assert_allclose(
        found.summary.arrays["squares"].sum(0), kept.square().sum(0).numpy(force=True), rtol=1e-3, atol=1e-4
    )
    assert found.summary.fvu.value == pytest.approx(
        float((x - kept).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-3
    )
    expected = attribution(model, hook, basis, tokens)[found.summary.alive]
    np.testing.assert_allclose(
        found.importance("gradient"), expected.numpy(force=True), rtol=5e-3, atol=1e-3 * float(expected.max())
    )


def test_heads_are_joined(models_by_kind: dict[str, Any], tokens: torch.Tensor) -> None:
    model = models_by_kind["HookedTransformer"]
    with torch.no_grad():
        assert model.run_with_cache(tokens)[1][Z].shape[2:] == (HEADS, D_MODEL // HEADS)
    assert BasisSpec("neurons", Z).fit(model, TokenStream(tokens.numpy(force=True))).cfg.d_sae == D_MODEL


def test_a_basis_without_k_has_no_sparsity(hooked: Any, tokens: torch.Tensor) -> None:
    with tlc.add_capacity_hooks(hooked, NeuronBasis(D_MODEL, RESIDUAL), fvu_every=1) as capacity:
        measurement = capacity.run(tokens.split(8)).measurement()
    summary = measurement[RESIDUAL].summary
    assert (summary.l0.value, summary.n_alive.value, summary.dense_latents.value) == (D_MODEL, D_MODEL, D_MODEL)
    assert summary.fvu.value == pytest.approx(0, abs=1e-9)
    assert summary.critical_width.show() == "undefined"
    with pytest.raises(
        CapacityError,
        match=(
            r"no sparsity is defined: count more tokens, or keep the largest coordinates of a basis, as in"
            rf" pca:{RESIDUAL},k=24"
        ),
    ):
        measurement.budget([8])


class TestByName:
    """`--sae neurons:HOOK` and `--sae pca:HOOK` through the function behind `tl-capacity measure`."""

    @pytest.fixture
    def settings(
        self, tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any, texts: list[str]
    ) -> Callable[..., MeasureSettings]:
        folder = tmp_path / "model"
        make_model("gpt_neox").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        source = tmp_path / "texts.txt"
        source.write_text("\n\n".join(texts))

        def make(name: str, *saes: str, **options: Any) -> MeasureSettings:
            return MeasureSettings(
                **{
                    "model": str(folder),
                    "out": tmp_path / name,
                    "saes": saes,
                    "source": str(source),
                    "tokens": 500,
                    "context": 16,
                    "progress": False,
                }
                | options
            )

        return make

    def test_a_basis_and_an_sae_of_one_run(
        self, settings: Callable[..., MeasureSettings], make_sae: MakeSAE, tmp_path: Path
    ) -> None:
        make_sae("topk", RESIDUAL).save_model(tmp_path / "sae")
        found = measure(
            settings(
                "out",
                f"neurons:{NEURONS},k=4",
                str(tmp_path / "sae"),
                f"pca:{RESIDUAL},k=6",
                f"pca:{RESIDUAL}",
                max_fvu=1e9,
            )
        )
        assert [(one.hook, one.sae) for one in found] == [
            (NEURONS, f"neurons:{NEURONS},k=4"),
            (RESIDUAL, str(tmp_path / "sae")),
            (RESIDUAL, f"pca:{RESIDUAL},k=6"),
            (RESIDUAL, f"pca:{RESIDUAL}"),
        ]
        assert [one.summary.l0.value for one in found] == pytest.approx([4, 6, 6, D_MODEL])
        assert Measurement.load(tmp_path / "out").hooks[2].architecture == "pca, 6 largest"

    def test_components_are_those_of_the_text(self, settings: Callable[..., MeasureSettings], tmp_path: Path) -> None:
        found = measure(settings("out", f"pca:{RESIDUAL}", tokens=10**9))[RESIDUAL].summary
        loaded = load_model(settings("x").model)
        stream = TokenStream(settings("x").source or "", loaded.tokenizer, context=16)
        counted = []
        with torch.no_grad():
            for batch in stream:
                ids = torch.from_numpy(batch.tokens)
                hidden = loaded.model(ids.clamp(min=0), output_hidden_states=True).hidden_states[2]
                counted.append(hidden[ids > 0])  # neither padding nor BOS, whose id is 0
        reference = PCA().fit(torch.cat(counted).numpy(force=True))
        variances = found.arrays["squares"].sum(0) / found.n_tokens
        np.testing.assert_allclose(
            variances, reference.explained_variance_ * (found.n_tokens - 1) / found.n_tokens, rtol=1e-3
        )

    def test_every_shard_has_the_same_basis(self, settings: Callable[..., MeasureSettings]) -> None:
        whole = measure(settings("whole", f"pca:{RESIDUAL},k=3", tokens=10**9))
        parts = [measure(settings(f"part{i}", f"pca:{RESIDUAL},k=3", tokens=10**9, shard=(i, 2))) for i in range(2)]
        assert len({part.hooks[0].sae_digest for part in [whole, *parts]}) == 1
        merged = Measurement.merge(parts)
        assert merged[RESIDUAL].summary.n_tokens == whole[RESIDUAL].summary.n_tokens

    @pytest.mark.parametrize(
        ("sae", "problem", "says"),
        [
            ("pca:blocks.9.hook_resid_post", HookPointError, "is not a hook point of this model: did you mean"),
            (
                "neurons:blocks.1.mlp.hook_most",
                HookPointError,
                r"is not a hook point of this model: did you mean blocks\.1\.mlp\.hook_post",
            ),
            (
                "neurons:blocks.1.hook_resid_post,k=33",
                DictionaryError,
                "k = 33 does not fit .* from 1 to its 32 features",
            ),
            ("pca:", DictionaryError, "names no basis: write pca:HOOK"),
        ],
    )
    def test_bad_input(
        self, settings: Callable[..., MeasureSettings], sae: str, problem: type[Exception], says: str
    ) -> None:
        asked = settings("out", sae)
        with pytest.raises(problem, match=says):
            measure(asked)
        assert not asked.out.exists()
