"""Capacity hooks against dense computations written here and against SAELens: the same counts, and the model left
exactly as it was.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from conftest import BOS, D_MODEL, HEADS, HOOKED, HUGGING_FACE, KINDS, LAYERS, SAES, TRANSCODERS, VOCAB, all_hooks
from datasets import Dataset
from place import on_cpu, placed
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

import tl_capacity as tlc
from tl_capacity.dictionaries import encoding
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.results import estimate
from tl_capacity.text.documents import document_groups
from tl_capacity.text.streams import PADDING, TokenBatch

MakeSAE = Callable[..., Any]
MakeModel = Callable[..., Any]

HOOK = "blocks.1.hook_resid_post"
TRANSCODED = {
    "HookedTransformer": ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
    "TransformerBridge": ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"),
}
BRIDGE_NAMES = {
    f"blocks.{layer}.hook_resid_{side}": f"blocks.{layer}.hook_{end}"
    for layer in range(LAYERS)
    for side, end in (("pre", "in"), ("post", "out"))
}
TRANSCODED["gpt_neox"] = ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")


@torch.no_grad()
def activations(model: Any, tokens: torch.Tensor, hook: str) -> torch.Tensor:
    """[row, position, d] at a hook, by TransformerLens' cache or from Hugging Face's hidden states."""
    if hasattr(model, "run_with_cache"):
        cache = model.run_with_cache(tokens)[1]
        return cache[hook if hook in cache else BRIDGE_NAMES[hook]]  # an SAE bridge knows no aliases
    layer, side = int(hook.split(".")[1]), hook.rsplit("_", 1)[1]
    index = layer + (side in ("post", "out"))
    assert index < LAYERS, "the last of Hugging Face's hidden states is normalised"
    return model(tokens, output_hidden_states=True).hidden_states[index]


@torch.no_grad()
def dense_latents(sae: Any, inputs: torch.Tensor) -> torch.Tensor:
    """[token, feature] in float64."""
    latents = sae.encode(inputs)
    return (latents.to_dense() if latents.is_sparse else latents).double()


@torch.no_grad()
def dense_fvu(sae: Any, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    targets, reconstruction = targets.double(), sae(inputs).double()
    return float((targets - reconstruction).square().sum() / (targets - targets.mean(0)).square().sum())


def counted_positions(tokens: torch.Tensor, masked: tuple[int, ...] = (BOS,), skip: int = 0) -> torch.Tensor:
    counted = torch.ones_like(tokens, dtype=torch.bool)
    for token in masked:
        counted &= tokens != token
    counted[:, :skip] = False
    return counted


def assert_counts_dense(summary: Any, latents: torch.Tensor, rows: torch.Tensor) -> None:
    """Counts exactly and moments to rounding, for each document group and in all; `rows` is the
    document of each token.
    """
    groups = torch.from_numpy(document_groups(rows.numpy(force=True)))
    for group in range(64):
        own = latents[groups == group]
        np.testing.assert_array_equal(summary.arrays["counts"][group], (own != 0).sum(0).numpy(force=True))
        np.testing.assert_allclose(summary.arrays["sums"][group], own.sum(0).numpy(force=True), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            summary.arrays["squares"][group], own.square().sum(0).numpy(force=True), rtol=1e-5, atol=1e-5
        )
        assert summary.arrays["tokens"][group] == len(own)
    seen = torch.stack([(latents[rows == row] != 0).any(0) for row in rows.unique()])
    np.testing.assert_array_equal(summary.arrays["incidence"], seen.sum(0).numpy(force=True))
    assert summary.n_tokens == len(latents)
    assert summary.n_documents == len(rows.unique())
    assert summary.l0.value == pytest.approx(float((latents != 0).sum()) / len(latents), rel=1e-12)
    np.testing.assert_allclose(summary.firing_rates, (latents != 0).double().mean(0).numpy(force=True), rtol=1e-12)


class TestAgainstDense:
    """Every architecture on every way to a model."""

    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
    @pytest.mark.parametrize("architecture", SAES)
    def test_counts_moments_and_fvu(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
    ) -> None:
        model, sae = models_by_kind[kind], make_sae(architecture, HOOK)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1, mask_token_ids=[BOS]) as capacity:
            summary = capacity.run(tokens.split(5)).measurement()[HOOK].summary
        counted = counted_positions(tokens)
        inputs = activations(model, tokens, HOOK)[counted]
        assert_counts_dense(summary, dense_latents(sae, inputs), counted.nonzero()[:, 0])
        assert summary.arrays["fvu_tokens"].sum() == len(inputs)
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs, inputs), rel=1e-4)
        assert summary.explained_variance.value == pytest.approx(1 - summary.fvu.value, rel=1e-12)

    @pytest.mark.fidelity(
        source="SAELens",
        says="`hook_name_out`",
        obeyed="features of a transcoder are counted at its input, and its FVU is checked at its output",
    )
    @pytest.mark.parametrize("kind", TRANSCODED)
    @pytest.mark.parametrize("architecture", TRANSCODERS)
    def test_transcoders_are_checked_at_their_output(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
    ) -> None:
        model, (hook, hook_out) = models_by_kind[kind], TRANSCODED[kind]
        sae = make_sae(architecture, hook, hook_out)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1, mask_token_ids=[BOS]) as capacity:
            summary = capacity.run(tokens.split(5)).measurement()[hook].summary
        counted = counted_positions(tokens)
        inputs, targets = activations(model, tokens, hook)[counted], activations(model, tokens, hook_out)[counted]
        assert_counts_dense(summary, dense_latents(sae, inputs), counted.nonzero()[:, 0])
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs, targets), rel=1e-4)

    @pytest.mark.parametrize("architecture", ["standard", "topk", "layer_norm", "matching_pursuit"])
    def test_sampled_reconstruction(self, hooked: Any, make_sae: MakeSAE, architecture: str) -> None:
        tokens = placed(torch.from_numpy(np.random.default_rng(2).integers(0, VOCAB, size=(48, 12))))
        sae = make_sae(architecture, HOOK)
        with tlc.add_capacity_hooks(hooked, sae, fvu_every=8) as capacity:
            summary = capacity.run(tokens.split(7)).measurement()[HOOK].summary
        rows = np.arange(48)
        chosen = placed(torch.from_numpy((document_groups(rows + 2**40, 8) == 0) | (rows == 0)))
        assert 0 < chosen.sum() < 16
        counted = counted_positions(tokens) & chosen[:, None]
        inputs = activations(hooked, tokens, HOOK)[counted]
        assert summary.arrays["fvu_tokens"].sum() == len(inputs)
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs, inputs), rel=1e-4)

    @pytest.mark.parametrize("architecture", [*SAES, *TRANSCODERS])
    def test_small_chunks_change_nothing(
        self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor, architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hook, hook_out = TRANSCODED["HookedTransformer"] if architecture in TRANSCODERS else (HOOK, None)
        sae = make_sae(architecture, hook, hook_out)
        found = []
        in_blocks = {
            name: replace(activation, features_at_once=24) for name, activation in encoding.ACTIVATIONS.items()
        }
        for sizes in (
            {},
            {"DENSE_LATENTS": 1},
            {"DENSE_LATENTS": 24 * 9, "ACTIVATIONS": in_blocks, "FEWEST_TOKENS": 3},
        ):
            for name, size in sizes.items():
                monkeypatch.setattr(encoding, name, size)
            with tlc.add_capacity_hooks(hooked, sae, fvu_every=2) as capacity:
                found.append(capacity.run(tokens[:6].split(3)).measurement()[hook].summary)
        whole, *chunked = found
        for summary in chunked:
            np.testing.assert_array_equal(whole.arrays["counts"], summary.arrays["counts"])
            np.testing.assert_array_equal(whole.arrays["incidence"], summary.arrays["incidence"])
            squares = whole.arrays["squares"]
            np.testing.assert_allclose(squares, summary.arrays["squares"], rtol=1e-5, atol=1e-6 * squares.max())
            assert whole.fvu.value == pytest.approx(summary.fvu.value, rel=1e-5)

    def test_latents_that_never_fire_leave_the_bias(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        sae = make_sae("standard", HOOK)
        with torch.no_grad():
            sae.b_enc.fill_(-1e6)
        with tlc.add_capacity_hooks(hooked, sae, fvu_every=1) as capacity:
            summary = capacity.run(tokens).measurement()[HOOK].summary
        inputs = activations(hooked, tokens, HOOK)[counted_positions(tokens)]
        assert (summary.l0.value, summary.n_alive.value) == (0, 0)
        assert not np.isfinite(summary.alpha.value)
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs, inputs), rel=1e-4)

    @pytest.mark.parametrize("reshape", ["hook_z", "none"])
    def test_attention_heads(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor, reshape: str) -> None:
        hook = "blocks.1.attn.hook_z"
        sae = make_sae("standard", hook, reshape_activations=reshape)
        with tlc.add_capacity_hooks(hooked, sae, fvu_every=1) as capacity:
            summary = capacity.run(tokens.split(8)).measurement()[hook].summary
        counted = counted_positions(tokens)
        z = activations(hooked, tokens, hook)[counted]
        assert z.shape[1:] == (HEADS, D_MODEL // HEADS)
        flat = make_sae("standard", hook)
        assert_counts_dense(summary, dense_latents(flat, z.flatten(1)), counted.nonzero()[:, 0])
        assert summary.fvu.value == pytest.approx(dense_fvu(flat, z.flatten(1), z.flatten(1)), rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("architecture", ["standard", "skip_transcoder"])
    def test_other_dtypes_of_the_model(
        self, make_model: MakeModel, make_sae: MakeSAE, tokens: torch.Tensor, dtype: torch.dtype, architecture: str
    ) -> None:
        model, sae = make_model("gpt_neox").to(dtype), make_sae(architecture, HOOK)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            summary = capacity.run(tokens).measurement()[HOOK].summary
        counted = counted_positions(tokens)
        inputs = activations(model, tokens, HOOK)[counted].float()
        assert_counts_dense(summary, dense_latents(sae, inputs), counted.nonzero()[:, 0])
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs, inputs), rel=1e-4)

    def test_a_first_document_without_active_latents(self, hooked: Any, make_sae: MakeSAE) -> None:
        """Rescaling SAEs decode to zero there, as a plain sum over latents would; what follows must not be taken for
        such a sum.
        """
        sae = make_sae("constant_norm_rescale", HOOK)
        tokens = placed(torch.tensor([[5] * 8, [9] * 8, [14] * 8]))
        inputs = activations(hooked, tokens, HOOK)
        with torch.no_grad():
            sae.b_dec.zero_()
            sae.b_enc.zero_()
            quiet = inputs[0].mean(0)
            sae.W_enc.copy_(sae.W_enc - quiet[:, None] * ((quiet @ sae.W_enc + 40) / quiet.square().sum()))
            assert (
                int((dense_latents(sae, inputs[0]) != 0).sum()) == 0 < int((dense_latents(sae, inputs[1]) != 0).sum())
            )
        with tlc.add_capacity_hooks(hooked, sae, fvu_every=1) as capacity:
            summary = capacity.run(tokens.split(1)).measurement()[HOOK].summary
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs.flatten(0, 1), inputs.flatten(0, 1)), rel=1e-4)


class TestAgainstSAELens:
    """SAELens' own evaluation of the same tokens."""

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
    @pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "abstopk"])
    def test_density_l0_and_explained_variance(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
    ) -> None:
        model, sae = models_by_kind[kind], make_sae(architecture, HOOK)
        rows = Dataset.from_dict({"input_ids": tokens.tolist()})
        store = ActivationsStore.from_sae(
            model,
            sae,
            rows,
            context_size=tokens.shape[1],
            streaming=False,
            store_batch_size_prompts=8,
            total_tokens=len(tokens),
        )
        config = EvalConfig(
            batch_size_prompts=8,
            n_eval_sparsity_variance_batches=3,
            compute_featurewise_density_statistics=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        theirs, by_feature = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=[BOS])
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            summary = capacity.run(tokens.split(8)).measurement()[HOOK].summary
        np.testing.assert_allclose(summary.firing_rates, by_feature["feature_density"], rtol=1e-6)
        assert summary.l0.value == pytest.approx(theirs["sparsity"]["l0"], rel=1e-6)
        assert summary.explained_variance.value == pytest.approx(
            theirs["reconstruction_quality"]["explained_variance"], rel=1e-4
        )
        assert summary.reconstruction_error is not None
        assert summary.reconstruction_error.value == pytest.approx(theirs["reconstruction_quality"]["mse"], rel=1e-4)

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
    @pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
    def test_density_and_l0_of_a_transcoder(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, architecture: str
    ) -> None:
        """What is counted, of a dictionary that reads one hook point and writes another."""
        hook = "blocks.1.ln2.hook_normalized"
        model, sae = models_by_kind["HookedTransformer"], make_sae(architecture, hook, "blocks.1.hook_mlp_out")
        rows = Dataset.from_dict({"input_ids": tokens.tolist()})
        store = ActivationsStore.from_sae(
            model,
            sae,
            rows,
            context_size=tokens.shape[1],
            streaming=False,
            store_batch_size_prompts=8,
            total_tokens=len(tokens),
        )
        config = EvalConfig(
            batch_size_prompts=8,
            n_eval_sparsity_variance_batches=3,
            compute_featurewise_density_statistics=True,
            compute_sparsity_metrics=True,
        )
        theirs, by_feature = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=[BOS])
        with tlc.add_capacity_hooks(model, sae) as capacity:
            summary = capacity.run(tokens.split(8)).measurement()[hook].summary
        assert 0 < summary.l0.value < sae.cfg.d_sae
        np.testing.assert_allclose(summary.firing_rates, by_feature["feature_density"], rtol=1e-6)
        assert summary.l0.value == pytest.approx(theirs["sparsity"]["l0"], rel=1e-6)


class TestHuggingFaceAgainstTheBridge:
    """The fast path, without TransformerLens, finds what TransformerLens finds."""

    @pytest.mark.parametrize(
        "hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_in", "blocks.1.hook_resid_post", "blocks.2.hook_out"]
    )
    def test_same_counts(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, hook: str
    ) -> None:
        sae = make_sae("jumprelu", hook)
        found = []
        for kind in ("gpt_neox", "TransformerBridge", "SAETransformerBridge"):
            with tlc.add_capacity_hooks(models_by_kind[kind], sae, fvu_every=1) as capacity:
                found.append(capacity.run(tokens.split(6)).measurement()[hook].summary)
        for other in found[1:]:
            np.testing.assert_array_equal(found[0].arrays["counts"], other.arrays["counts"])
            np.testing.assert_array_equal(found[0].arrays["masked"], other.arrays["masked"])
            np.testing.assert_allclose(found[0].arrays["squares"], other.arrays["squares"], rtol=1e-4)
            assert found[0].fvu.value == pytest.approx(other.fvu.value, rel=1e-4)

    @pytest.mark.parametrize("kind", HUGGING_FACE)
    @pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"])
    def test_families(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, hook: str
    ) -> None:
        model, sae = models_by_kind[kind], make_sae("standard", hook)
        with tlc.add_capacity_hooks(model, sae) as capacity:
            summary = capacity.run(tokens).measurement()[hook].summary
        counted = counted_positions(tokens)
        assert_counts_dense(
            summary, dense_latents(sae, activations(model, tokens, hook)[counted]), counted.nonzero()[:, 0]
        )


def state(model: Any) -> dict[str, Any]:
    """Whatever attaching must leave alone."""
    return {
        "hooks": all_hooks(model),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("hooks", "requires_grad", "training", "numpy"):
        assert before[name] == after[name]
    assert torch.equal(before["random"], after["random"])
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize(
        "ending",
        [
            "normal",
            "exception in the block",
            "exception in the forward",
            "run_with_hooks",
            "removed twice",
            "never run",
        ],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_remains(
        self,
        make_model: MakeModel,
        models_by_kind: dict[str, Any],
        make_sae: MakeSAE,
        tokens: torch.Tensor,
        kind: str,
        ending: str,
    ) -> None:
        model, sae = models_by_kind[kind], make_sae("standard", HOOK)
        model.train()
        model.blocks[0].eval() if hasattr(model, "blocks") else next(model.children()).eval()
        before, logits = state(model), _logits(model, tokens)
        torch.set_rng_state(before["random"])
        if ending == "normal":
            with tlc.add_capacity_hooks(model, sae) as capacity:
                capacity.run(tokens)
        elif ending == "exception in the block":
            with pytest.raises(ZeroDivisionError), tlc.add_capacity_hooks(model, sae) as capacity:
                capacity.run(tokens, after_batch=lambda _: 1 / 0)
        elif ending == "exception in the forward":
            if not on_cpu():
                pytest.skip("after an id beyond the vocabulary a process can no longer use its GPU")
            with pytest.raises((IndexError, AssertionError)), tlc.add_capacity_hooks(model, sae):
                model(tokens + VOCAB)
        elif ending == "run_with_hooks":
            if kind in HUGGING_FACE:
                pytest.skip("a Hugging Face model has no run_with_hooks")
            seen, other = [], "blocks.0.hook_mlp_out" if kind.startswith("Hooked") else "blocks.0.mlp.hook_out"
            model.eval()
            with tlc.add_capacity_hooks(model, sae) as capacity:
                model.run_with_hooks(tokens, fwd_hooks=[(other, lambda activation, hook: seen.append(1))])
                assert capacity.n_tokens == int(counted_positions(tokens).sum())
                assert seen
            model.train()
            model.blocks[0].eval()
        elif ending == "removed twice":
            capacity = tlc.add_capacity_hooks(model, sae).run(tokens)
            capacity.remove()
            capacity.remove()
            assert capacity.measurement()[HOOK].summary.n_tokens > 0
        else:
            tlc.add_capacity_hooks(model, sae).remove()
        assert_same_state(before, state(model))
        model.eval()
        model.train()
        model.blocks[0].eval() if hasattr(model, "blocks") else next(model.children()).eval()
        torch.testing.assert_close(_logits(model, tokens), logits, rtol=0, atol=0)
        model.eval()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_failing_attach_leaves_nothing(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, kind: str
    ) -> None:
        model = models_by_kind[kind]
        before = all_hooks(model)
        with pytest.raises(HookPointError, match=r"blocks\.7\.hook_resid_post"):
            tlc.add_capacity_hooks(
                model, [make_sae("standard", HOOK), make_sae("standard", "blocks.7.hook_resid_post")]
            )
        with pytest.raises(HookPointError, match=r"blocks\.7\.hook_resid_post"):
            tlc.add_capacity_hooks(model, make_sae("transcoder", HOOK, "blocks.7.hook_resid_post"))
        assert all_hooks(model) == before

    @pytest.mark.parametrize("kind", HOOKED)
    def test_reset_hooks_does_not_stop_the_counting(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model, seen = models_by_kind[kind], []
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            model(tokens)
            once = capacity.n_tokens
            model.reset_hooks()
            model(tokens)
            assert capacity.n_tokens == 2 * once > 0
            model.add_hook(
                "blocks.1.hook_resid_post" if kind != "SAETransformerBridge" else "blocks.1.hook_out",
                lambda activation, hook: seen.append(1),
            )
        model(tokens)
        assert seen == [1], "somebody else's hook must outlive ours"
        model.reset_hooks()

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
    def test_no_leak_over_many_cycles(self, models_by_kind: dict[str, Any], make_sae: MakeSAE, kind: str) -> None:
        model, sae = models_by_kind[kind], make_sae("standard", HOOK, d_sae=8)
        before = all_hooks(model)
        for _ in range(200):
            with tlc.add_capacity_hooks(model, sae):
                pass
        assert all_hooks(model) == before

    def test_handles_are_independent(self, bridge: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        first, second = (tlc.add_capacity_hooks(bridge, make_sae("standard", HOOK, seed=seed)) for seed in (0, 1))
        bridge(tokens)
        first.remove()
        bridge(tokens)
        second.remove()
        bridge(tokens)
        assert (first.n_tokens * 2, second.n_tokens) == (second.n_tokens, 2 * int(counted_positions(tokens).sum()))
        with pytest.raises(CapacityError, match="were removed: attach new ones"):
            first.run(tokens)

    def test_gradients_flow_as_before(self, make_model: MakeModel, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        model = make_model("gpt_neox")
        wanted = torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()))
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)):
            found = torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        torch.manual_seed(5)
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


class TestSessions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_calling_the_model_is_the_same_as_run(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model, sae = models_by_kind[kind], make_sae("topk", HOOK)
        with tlc.add_capacity_hooks(model, sae) as capacity:
            for batch in tokens.split(7):
                model(batch)
            called = capacity.measurement()
        with tlc.add_capacity_hooks(model, sae) as capacity:
            ran = capacity.run(tokens.split(7)).measurement()
        assert called.provenance.cursor == ran.provenance.cursor == len(tokens)
        assert called.provenance.tokens_digest == ran.provenance.tokens_digest
        for name, array in ran[HOOK].summary.arrays.items():
            if array.dtype == np.int64:
                np.testing.assert_array_equal(called[HOOK].summary.arrays[name], array)
            else:
                np.testing.assert_allclose(called[HOOK].summary.arrays[name], array, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("positional", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_attention_mask_of_a_call(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, positional: bool
    ) -> None:
        """What it masks is padding, as in a stream of the same; the next call, without one, has none."""
        model, sae = models_by_kind[kind], make_sae("topk", HOOK)
        if positional and list(inspect.signature(model.forward).parameters)[1] != "attention_mask":
            pytest.skip("it is not the second argument")
        mask = torch.ones_like(tokens)
        mask[::2, 9:] = 0
        with tlc.add_capacity_hooks(model, sae) as capacity, torch.no_grad():
            model(tokens, mask) if positional else model(tokens, attention_mask=mask)
            model(tokens)
            called = capacity.measurement()[HOOK].summary
        with tlc.add_capacity_hooks(model, sae) as capacity:
            ran = capacity.run([{"input_ids": tokens, "attention_mask": mask}, tokens]).measurement()[HOOK].summary
        assert called.masked == ran.masked
        assert called.masked["padding"] == int((mask == 0).sum())
        for name in ("counts", "tokens", "incidence"):
            np.testing.assert_array_equal(called.arrays[name], ran.arrays[name])

    def test_a_mask_is_of_its_own_call(self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        """A call past the model's own forward has none, and a mask of attention, [row, head, position, position], says
        nothing of padding.
        """
        mask = torch.ones_like(tokens)
        mask[:, 9:] = 0
        causal = mask.new_ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril().expand(len(tokens), 1, -1, -1)
        with tlc.add_capacity_hooks(neox, make_sae("topk", HOOK)) as capacity, torch.no_grad():
            neox(tokens, attention_mask=mask)
            neox.gpt_neox(tokens)
            neox(tokens, attention_mask=causal)
        counted = counted_positions(tokens)
        assert capacity.n_tokens == int((counted & (mask == 1)).sum()) + 2 * int(counted.sum())
        assert capacity.measurement()[HOOK].summary.masked["padding"] == int((mask == 0).sum())

    def test_the_method_and_the_function_are_the_same(
        self, any_model: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        if not hasattr(any_model, "hook_dict"):
            assert not hasattr(any_model, "add_capacity_hooks")
            return
        with any_model.add_capacity_hooks(make_sae("standard", HOOK), fvu_every=3) as capacity:
            any_model(tokens)
        assert capacity.measurement().provenance.settings["fvu_every"] == 3

    @pytest.mark.parametrize("kind", ["HookedTransformer", "SAETransformerBridge", "llama"])
    def test_several_hooks_and_several_saes_in_one_forward(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model, early = models_by_kind[kind], "blocks.0.hook_resid_pre"
        saes = {HOOK: [make_sae("standard", HOOK), make_sae("topk", HOOK, d_sae=128)], early: make_sae("gated", early)}
        with tlc.add_capacity_hooks(model, saes) as capacity:
            measurement = capacity.run(tokens.split(9)).measurement()
        assert [(h.hook, h.architecture) for h in measurement] == [(HOOK, "standard"), (HOOK, "topk"), (early, "gated")]
        counted = counted_positions(tokens)
        for found, sae in zip(measurement, [*saes[HOOK], saes[early]], strict=True):
            assert_counts_dense(
                found.summary,
                dense_latents(sae, activations(model, tokens, found.hook)[counted]),
                counted.nonzero()[:, 0],
            )
        assert measurement[early].architecture == "gated"
        with pytest.raises(
            CapacityError,
            match=rf"2 SAEs were measured at '{HOOK}' \(StandardSAE with 64 latents, TopKSAE with 128 latents\)",
        ):
            measurement[HOOK]

    @pytest.mark.parametrize("kind", KINDS)
    def test_run_stops_after_the_last_tap(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model, passes = models_by_kind[kind], dict.fromkeys(range(LAYERS), 0)
        blocks = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers"}.get(kind, "blocks")

        def count(layer: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                passes[layer] += 1

            return hook

        hooks = [
            model.get_submodule(f"{blocks}.{layer}").register_forward_pre_hook(count(layer)) for layer in range(LAYERS)
        ]
        try:
            with tlc.add_capacity_hooks(
                model, [make_sae("standard", "blocks.0.hook_resid_post"), make_sae("standard", HOOK)]
            ) as capacity:
                capacity.run(tokens.split(8))
                assert passes == {0: 3, 1: 3, 2: 0}
                model(tokens)
                assert passes == {0: 4, 1: 4, 2: 1}, "a model that the user calls must run to its end"
        finally:
            for hook in hooks:
                hook.remove()

    @pytest.mark.parametrize("before", ["run", "call", "run row by row"])
    def test_a_further_stream_adds_to_what_was_counted(
        self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor, before: str
    ) -> None:
        sae = make_sae("standard", HOOK)
        with tlc.add_capacity_hooks(neox, sae, fvu_every=2) as capacity:
            for part in tokens[:8].split(1 if before == "run row by row" else 4):
                neox(part) if before == "call" else capacity.run(part)
            assert capacity.rows == 8
            first = capacity.n_tokens
            parts = capacity.run(tokens[8:].split(4), max_tokens=1).measurement()
            assert capacity.rows == 12
            assert parts[HOOK].summary.n_tokens == capacity.n_tokens > first
        with tlc.add_capacity_hooks(neox, sae, fvu_every=2) as capacity:
            whole = capacity.run(tokens[:12].split(4)).measurement()
        assert parts[HOOK].summary.n_documents == 12
        for name, array in whole[HOOK].summary.arrays.items():
            np.testing.assert_allclose(
                parts[HOOK].summary.arrays[name],
                array,
                rtol=0 if array.dtype == np.int64 else 1e-5,
                atol=0 if on_cpu() else 1e-6,  # one row alone is another product there
                err_msg=name,
            )
        if before != "run row by row":
            assert parts.provenance.tokens_digest == whole.provenance.tokens_digest

    def test_the_documents_of_another_stream_are_others(self, neox: Any, make_sae: MakeSAE, tokenizer: Any) -> None:
        stream = tlc.TokenStream(["w1 w2 w3"], tokenizer)
        with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)) as capacity:
            summary = capacity.run(stream).run(stream).measurement()[HOOK].summary
        assert summary.n_documents == 2
        assert set(summary.arrays["incidence"].tolist()) == {0, 2}

    def test_an_interrupted_run_goes_on(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        """The batch that was interrupted is left out, and said to be; every other is counted once."""
        batches, sae, forwards = tokens.split(4), make_sae("standard", HOOK), []

        def interrupt_the_third(*_: Any) -> None:
            forwards.append(1)
            if len(forwards) == 3:
                raise KeyboardInterrupt

        handle = hooked.blocks[0].register_forward_hook(interrupt_the_third)
        with tlc.add_capacity_hooks(hooked, sae) as capacity:
            with pytest.raises(KeyboardInterrupt):
                capacity.run(batches)
            capacity.run(
                [TokenBatch(b.numpy(force=True), np.arange(4 * i, 4 * i + 4)) for i, b in enumerate(batches) if i > 2]
            )
            with pytest.warns(UserWarning, match="1 of 6 forward passes did not reach"):
                counts = capacity.measurement()[HOOK].summary.arrays["counts"]
        handle.remove()
        with tlc.add_capacity_hooks(hooked, sae) as capacity:
            whole = [
                TokenBatch(b.numpy(force=True), np.arange(4 * i, 4 * i + 4)) for i, b in enumerate(batches) if i != 2
            ]
            np.testing.assert_array_equal(counts, capacity.run(whole).measurement()[HOOK].summary.arrays["counts"])

    def test_max_tokens_stops_after_the_batch_that_reaches_it(
        self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)) as capacity:
            assert capacity.run(tokens.split(4), max_tokens=100).n_tokens == int(counted_positions(tokens[:8]).sum())

    def test_a_failed_forward_does_not_spoil_the_next(
        self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        hook, hook_out = TRANSCODED["HookedTransformer"]
        sae = make_sae("skip_transcoder", hook, hook_out)

        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        with tlc.add_capacity_hooks(hooked, sae, fvu_every=1) as capacity:
            with pytest.raises(ZeroDivisionError):
                hooked.run_with_hooks(tokens[:8], fwd_hooks=[("blocks.1.mlp.hook_post", fail)])
            hooked.reset_hooks()
            hooked(tokens[8:16], stop_at_layer=1)
            hooked(tokens[16:])
            with pytest.warns(UserWarning, match="1 of 3 forward passes did not reach every tapped hook point"):
                summary = capacity.measurement()[hook].summary
            hooked(tokens[16:], stop_at_layer=1)
            with pytest.warns(UserWarning, match="2 of 4 forward passes did not reach every tapped hook point"):
                capacity.measurement()
        counted = counted_positions(tokens[16:])
        inputs, targets = (
            activations(hooked, tokens[16:], hook)[counted],
            activations(hooked, tokens[16:], hook_out)[counted],
        )
        assert summary.fvu.value == pytest.approx(dense_fvu(sae, inputs, targets), rel=1e-4)


class TestBadInput:
    """Each mistake by its kind of error and by what the sentence says."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("hook", "says"),
        [
            ("blocks.1.hook_resid_pots", r"did you mean blocks\.1\.hook_"),
            ("embedding of doom", "it has|is not a hook point"),
            ("", "no"),
        ],
    )
    def test_unknown_hook(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, kind: str, hook: str, says: str
    ) -> None:
        if kind in HUGGING_FACE and hook.startswith("blocks"):
            says = "is not a hook point that the family of"
        with pytest.raises(HookPointError, match=says):
            tlc.add_capacity_hooks(models_by_kind[kind], {hook: make_sae("standard")})

    @pytest.mark.parametrize(
        "name",
        ["blocks.1", "blocks", "blocks.1.attn", "blocks.1.attn.W_Q", "cfg", "forward", "blocks.-1.hook_resid_post"],
    )
    def test_a_name_of_something_else(self, hooked: Any, bridge: Any, make_sae: MakeSAE, name: str) -> None:
        for model in (hooked, bridge):
            with pytest.raises(HookPointError, match="is not a hook point of this model"):
                tlc.add_capacity_hooks(model, {name: make_sae("standard")})

    @pytest.mark.parametrize("kind", KINDS)
    def test_wrong_width(self, models_by_kind: dict[str, Any], make_sae: MakeSAE, kind: str) -> None:
        with pytest.raises(HookPointError, match=f"has width {D_MODEL}, but the SAE's d_in is 48"):
            tlc.add_capacity_hooks(models_by_kind[kind], make_sae("standard", HOOK, d_in=48))

    def test_wrong_width_that_only_the_forward_shows(
        self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        hook = "blocks.1.mlp.hook_post"
        with (
            tlc.add_capacity_hooks(hooked, make_sae("standard", hook)) as capacity,
            pytest.raises(HookPointError, match="has width 128, but the SAE's d_in is 32"),
        ):
            capacity.run(tokens)

    def test_no_vector_per_token(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        hook = "blocks.1.attn.hook_pattern"
        with (
            tlc.add_capacity_hooks(hooked, make_sae("standard", hook)) as capacity,
            pytest.raises(HookPointError, match="one vector per token"),
        ):
            capacity.run(tokens)

    @pytest.mark.parametrize(
        ("normalisation", "fold"),
        [
            ("expected_average_only_in", "fold_activation_norm_scaling_factor"),
            ("covariance_whitening", "fold_activation_whitening"),
        ],
    )
    def test_unfolded_normalisation(self, hooked: Any, make_sae: MakeSAE, normalisation: str, fold: str) -> None:
        with pytest.raises(DictionaryError, match=f"{normalisation}.*{fold}"):
            tlc.add_capacity_hooks(hooked, make_sae("standard", HOOK, normalize_activations=normalisation))

    @pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
    def test_training_time_batch_topk(self, hooked: Any, name: str) -> None:
        options = {"matryoshka_widths": [16, 64]} if name.startswith("Matryoshka") else {}
        sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=D_MODEL, d_sae=64, k=4, **options))
        with pytest.raises(DictionaryError, match=f"{name}.*depend on the whole batch"):
            tlc.add_capacity_hooks(hooked, {HOOK: sae})

    def test_temporal_sae(self, hooked: Any) -> None:
        sae = sae_lens.TemporalSAE(sae_lens.TemporalSAEConfig(d_in=D_MODEL, d_sae=64, n_heads=2, bottleneck_factor=2))
        with pytest.raises(DictionaryError, match="is a TemporalSAE, whose latents depend on earlier tokens"):
            tlc.add_capacity_hooks(hooked, {HOOK: sae})

    def test_an_sae_as_the_model(self, make_sae: MakeSAE) -> None:
        sae = make_sae("standard")
        with pytest.raises(HookPointError, match="StandardSAE is an SAE, not a model"):
            tlc.add_capacity_hooks(sae, sae)
        with pytest.raises(HookPointError, match="StandardSAE is an SAE, not a model"):
            sae.add_capacity_hooks(sae)

    @pytest.mark.parametrize("model", [None, "gpt2", 3, {}])
    def test_no_model(self, make_sae: MakeSAE, model: Any) -> None:
        with pytest.raises(HookPointError, match="is not a model"):
            tlc.add_capacity_hooks(model, make_sae("standard"))

    def test_a_family_that_nobody_registered(self, neox: Any, make_sae: MakeSAE) -> None:
        with pytest.raises(HookPointError, match="no model family covers"):
            tlc.add_capacity_hooks(torch.nn.Linear(2, 2), make_sae("standard"))

    @pytest.mark.parametrize("saes", [[], (), {}, {HOOK: []}])
    def test_zero_saes(self, hooked: Any, saes: Any) -> None:
        with pytest.raises(DictionaryError, match="no SAE was given"):
            tlc.add_capacity_hooks(hooked, saes)

    @pytest.mark.parametrize("sae", [torch.nn.Linear(2, 2), None])
    def test_no_sae(self, hooked: Any, unchecked: None, sae: Any) -> None:
        for saes in ({HOOK: sae}, [sae], {HOOK: [sae]}):
            with pytest.raises(DictionaryError, match=r"is not an SAE|does not name its hook point"):
                tlc.add_capacity_hooks(hooked, saes)

    def test_an_sae_that_names_no_hook(self, hooked: Any, make_sae: MakeSAE) -> None:
        with pytest.raises(DictionaryError, match="StandardSAE does not name its hook point: pass a mapping"):
            tlc.add_capacity_hooks(hooked, make_sae("standard", hook=None))

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"skip_first_positions": -1}, "skip_first_positions = -1"),
            ({"fvu_every": 0}, "fvu_every = 0"),
            ({"alive_threshold": -1e-9}, "is not a firing rate"),
            ({"alive_threshold": 1.0}, "is not a firing rate"),
            ({"alive_threshold": float("nan")}, "is not a firing rate"),
            ({"importance": ["second_momnet"]}, "did you mean 'second_moment'"),
        ],
    )
    def test_bad_options(self, hooked: Any, make_sae: MakeSAE, options: dict[str, Any], says: str) -> None:
        with pytest.raises(CapacityError, match=says):
            tlc.add_capacity_hooks(hooked, make_sae("standard"), **options)

    @pytest.mark.parametrize("stream", [torch.full((4, 8), BOS), [torch.full((2, 8), BOS)] * 3])
    def test_all_tokens_masked(self, neox: Any, make_sae: MakeSAE, stream: Any) -> None:
        with tlc.add_capacity_hooks(neox, make_sae("standard")) as capacity:
            with pytest.raises(CapacityError, match=r"nothing was counted: all .* tokens were masked"):
                capacity.run(stream)
            with pytest.raises(CapacityError, match="nothing was counted"):
                capacity.measurement()

    @pytest.mark.parametrize("stream", [[], iter(()), torch.zeros(0, 8, dtype=torch.long)])
    def test_empty_stream(self, neox: Any, make_sae: MakeSAE, stream: Any) -> None:
        with (
            tlc.add_capacity_hooks(neox, make_sae("standard")) as capacity,
            pytest.raises(CapacityError, match="yields no batch"),
        ):
            capacity.run(stream)

    def test_a_measurement_of_nothing(self, neox: Any, make_sae: MakeSAE) -> None:
        with (
            tlc.add_capacity_hooks(neox, make_sae("standard")) as capacity,
            pytest.raises(CapacityError, match="nothing was counted: no tokens were seen"),
        ):
            capacity.measurement()

    @pytest.mark.parametrize("strange", [VOCAB, -100])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_token_that_the_model_has_no_vector_of(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, strange: int
    ) -> None:
        others = tokens.clone()
        others[0, 3] = strange
        with (
            tlc.add_capacity_hooks(models_by_kind[kind], make_sae("standard", HOOK)) as capacity,
            pytest.raises(
                CapacityError,
                match=f"the text has token id {strange}, but the model's vocabulary has {VOCAB}: use",
            ),
        ):
            capacity.run(others)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", ["HookedTransformer", "gpt_neox"])
    def test_poisoned_weights(self, make_model: MakeModel, make_sae: MakeSAE, kind: str, value: float) -> None:
        model = make_model(kind)
        with torch.no_grad():
            (model.embed.W_E if kind == "HookedTransformer" else model.get_input_embeddings().weight)[77, 3] = value
        batches = [torch.full((2, 6), 5), torch.full((2, 6), 6), torch.full((2, 6), 77)]
        with (
            tlc.add_capacity_hooks(model, make_sae("standard")) as capacity,
            pytest.raises(CapacityError, match=rf"{HOOK} has NaN or infinite activations in batch 3"),
        ):
            capacity.run(batches)

    def test_a_poisoned_sae(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        sae = make_sae("standard")
        with torch.no_grad():
            sae.b_enc[5] = float("nan")
        with (
            tlc.add_capacity_hooks(hooked, sae) as capacity,
            pytest.raises(CapacityError, match=f"the SAE at {HOOK} gives NaN or infinite latents in batch 1"),
        ):
            capacity.run(tokens)

    def test_a_tap_that_never_fires(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        hook = "blocks.1.hook_mlp_in"
        with (
            tlc.add_capacity_hooks(hooked, make_sae("standard", hook)) as capacity,
            pytest.raises(HookPointError, match=f"{hook} did not fire in 1 forward pass"),
        ):
            capacity.run(tokens)
        with tlc.add_capacity_hooks(hooked, [make_sae("standard"), make_sae("standard", hook)]) as capacity:
            hooked(tokens)
            with pytest.raises(HookPointError, match=f"{hook} did not fire in 1 forward pass"):
                capacity.measurement()

    def test_a_hook_point_that_fires_three_times(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        hook = "blocks.1.ln1.hook_normalized"
        with (
            tlc.add_capacity_hooks(hooked, [make_sae("standard", hook), make_sae("standard")]) as capacity,
            pytest.raises(HookPointError, match=f"{hook} fired 2 times"),
        ):
            capacity.run(tokens)

    def test_a_transcoder_whose_output_comes_first(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        sae = make_sae("transcoder", HOOK, "blocks.0.hook_mlp_out")
        with (
            tlc.add_capacity_hooks(hooked, sae, fvu_every=1) as capacity,
            pytest.raises(HookPointError, match=r"blocks\.0\.hook_mlp_out"),
        ):
            capacity.run(tokens.split(8))

    @pytest.mark.parametrize("kind", ["HookedTransformer", "gpt_neox"])
    def test_embeddings_instead_of_token_ids(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model = models_by_kind[kind]
        embedded = placed(torch.randn(len(tokens), tokens.shape[1], D_MODEL))
        for calls_before in (0, 1):
            with tlc.add_capacity_hooks(model, make_sae("standard")) as capacity:
                for _ in range(calls_before):
                    model(tokens)
                with pytest.raises(CapacityError):
                    model(embedded, start_at_layer=0) if kind == "HookedTransformer" else model(inputs_embeds=embedded)
                assert capacity.n_tokens == calls_before * int(counted_positions(tokens).sum())

    def test_an_sae_that_explains_less_than_the_mean(
        self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        with tlc.add_capacity_hooks(hooked, make_sae("standard"), fvu_every=1) as capacity:
            measurement = capacity.run(tokens).measurement()
        assert measurement[HOOK].summary.fvu.value > 1
        with pytest.raises(CapacityError, match="FVU"):
            measurement.budget([8, 16])
        floors = measurement.budget([8, 16], max_fvu=None).floors
        assert [floor.width for floor in floors] == [8, 16]
        assert floors[0].features_lost.value >= floors[1].features_lost.value
        assert measurement.to_frame()["hook"].tolist() == [HOOK]

    def test_a_hook_that_was_not_measured(self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        with tlc.add_capacity_hooks(hooked, make_sae("standard")) as capacity:
            measurement = capacity.run(tokens).measurement()
        with pytest.raises(CapacityError, match=rf"'blocks.0.hook_mlp_out' was not measured: choose one of {HOOK}"):
            measurement["blocks.0.hook_mlp_out"]


class TestMasking:
    @pytest.mark.parametrize("kind", KINDS)
    def test_bos_zero_is_masked_by_default(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        with tlc.add_capacity_hooks(models_by_kind[kind], make_sae("standard")) as capacity:
            measurement = capacity.run(tokens).measurement()
        bos = int((tokens == BOS).sum())
        assert bos >= len(tokens)
        assert measurement.provenance.settings["masked_token_ids"] == [BOS]
        assert measurement[HOOK].summary.masked == {"padding": 0, "special": bos, "position": 0}
        assert measurement[HOOK].summary.n_tokens == tokens.numel() - bos

    @pytest.mark.parametrize("masked", [(), (5,), (5, 5, 17), (BOS, 7)])
    @pytest.mark.parametrize("skip", [0, 1, 4])
    @pytest.mark.parametrize("kind", ["TransformerBridge", "gpt_neox"])
    def test_masks(
        self,
        models_by_kind: dict[str, Any],
        make_sae: MakeSAE,
        tokens: torch.Tensor,
        kind: str,
        masked: tuple[int, ...],
        skip: int,
    ) -> None:
        model, sae = models_by_kind[kind], make_sae("standard")
        with tlc.add_capacity_hooks(model, sae, mask_token_ids=masked, skip_first_positions=skip) as capacity:
            summary = capacity.run(tokens.split(10)).measurement()[HOOK].summary
        counted = counted_positions(tokens, masked, skip)
        x = activations(model, tokens, HOOK)
        assert_counts_dense(summary, dense_latents(sae, x[counted]), counted.nonzero()[:, 0])
        special = ~counted_positions(tokens, masked)
        assert summary.masked == {
            "padding": 0,
            "special": int(special.sum()),
            "position": int((~counted & ~special).sum()),
        }
        norms = x.double().square().sum(-1)
        assert summary.masked_norm_share == pytest.approx(float(norms[~counted].sum() / norms.sum()), rel=1e-5)

    def test_padding_is_neither_counted_nor_in_the_masked_norm(
        self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        padded = tokens.numpy(force=True).copy()
        lengths = np.random.default_rng(3).integers(2, 20, size=len(padded))
        for row, length in enumerate(lengths):
            padded[row, length:] = PADDING
        sae = make_sae("standard")
        batches = [
            TokenBatch(rows, np.arange(start, start + len(rows)))
            for start, rows in ((0, padded[:10]), (10, padded[10:]))
        ]
        with tlc.add_capacity_hooks(neox, sae) as capacity:
            summary = capacity.run(batches).measurement()[HOOK].summary
        counted = placed(torch.from_numpy(padded != PADDING)) & counted_positions(tokens)
        x = activations(neox, tokens, HOOK)  # causal, so what stands in the padding does not matter
        assert_counts_dense(summary, dense_latents(sae, x[counted]), counted.nonzero()[:, 0])
        assert summary.masked["padding"] == int((padded == PADDING).sum())
        norms, special = x.double().square().sum(-1), placed(torch.from_numpy(padded)) == BOS
        assert summary.masked_norm_share == pytest.approx(
            float(norms[special].sum() / (norms[special].sum() + norms[counted].sum())), rel=1e-5
        )

    def test_documents_of_several_rows(self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        """A document's rows count as one document, also where a batch ends in its middle."""
        documents = np.sort(np.random.default_rng(4).integers(0, 9, size=len(tokens)))
        sae = make_sae("topk")
        found = []
        for size in (1, 5, 24):
            starts = range(0, len(tokens), size)
            batches = [TokenBatch(tokens[s : s + size].numpy(force=True), documents[s : s + size]) for s in starts]
            with tlc.add_capacity_hooks(neox, sae) as capacity:
                found.append(capacity.run(batches).measurement()[HOOK].summary)
        counted = counted_positions(tokens)
        rows = torch.from_numpy(documents)[counted.nonzero()[:, 0].cpu()]
        for summary in found:
            assert_counts_dense(summary, dense_latents(sae, activations(neox, tokens, HOOK)[counted]), rows)

    def test_the_model_s_every_special_token(self, make_model: MakeModel, make_sae: MakeSAE) -> None:
        model = make_model("llama")
        model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 0, [3, 4], 9
        with tlc.add_capacity_hooks(model, make_sae("standard")) as capacity:
            measurement = capacity.run(placed(torch.arange(16))[None]).measurement()
        assert measurement.provenance.settings["masked_token_ids"] == [0, 3, 4, 9]
        assert measurement[HOOK].summary.n_tokens == 12


def test_annotations_are_checked_while_tests_run() -> None:
    """Else the import hook came too late and checks nothing."""
    with pytest.raises(Exception, match="document_groups"):
        document_groups("not an array")


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere, and cost more than all the rest here."""
    monkeypatch.setattr(estimate, "REPLICATES", 10)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"tl_capacity\.")
        yield
