"""Modes of PyTorch in which a user's model runs; what is counted is what the dictionary makes of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, D_MODEL, HEADS, VOCAB
from place import on_cpu, placed

import tl_capacity as tlc
from tl_capacity.measure.ablation import ablation_kl
from tl_capacity.models.forward import drops_out
from tl_capacity.probing.activations import collect

HOOK = "blocks.0.hook_resid_post"
WAYS = ["HookedTransformer", "TransformerBridge", "gpt_neox"]
MakeSAE = Callable[..., Any]
TOKENS = placed(torch.randint(1, VOCAB, (4, 11), generator=torch.Generator().manual_seed(3)))


FVU = 1e-5 if on_cpu() else 1e-4
"""How exact it is. A GPU rounds what is reconstructed from to TF32."""


def residual(model: Any) -> torch.Tensor:
    """[row, position, d] after the first block, by TransformerLens' cache or from Hugging Face's hidden states."""
    with torch.no_grad():
        if hasattr(model, "run_with_cache"):
            return model.run_with_cache(TOKENS)[1][HOOK]
        return model(TOKENS, output_hidden_states=True).hidden_states[1]


def assert_counts(capacity: Any, sae: Any, activations: torch.Tensor) -> None:
    """The sums of the dictionary's latents of these activations [row, position, d], and its FVU there."""
    inputs = activations.flatten(0, 1).float()
    with torch.no_grad():
        latents, error = sae.encode(inputs).double(), (inputs - sae(inputs)).double().square().sum()
    summary = capacity.measurement()[HOOK].summary
    assert summary.n_tokens == len(inputs)
    np.testing.assert_array_equal(summary.arrays["counts"].sum(0), (latents != 0).sum(0).numpy(force=True))
    np.testing.assert_allclose(summary.arrays["squares"].sum(0), latents.square().sum(0).numpy(force=True), rtol=1e-5)
    spread = (inputs - inputs.mean(0)).double().square().sum()
    assert summary.fvu.value == pytest.approx(float(error / spread), rel=FVU)


class TestAutocast:
    """The model computes in fewer bits there; its activations are still encoded in the dictionary's own precision."""

    @pytest.mark.parametrize("kind", WAYS)
    @pytest.mark.parametrize("by", ["call", "run", "gradients"])
    def test_the_dictionary_keeps_its_precision(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, kind: str, by: str
    ) -> None:
        model, sae = models_by_kind[kind], make_sae("standard", HOOK)
        importance = ["gradient"] if by == "gradients" else None
        with torch.autocast(TOKENS.device.type, torch.bfloat16):
            activations, coarse = residual(model), sae.encode(residual(model).float())
            with tlc.add_capacity_hooks(model, sae, fvu_every=1, mask_token_ids=[], importance=importance) as capacity:
                model(TOKENS) if by == "call" else capacity.run(TOKENS)
        assert_counts(capacity, sae, activations)
        assert not torch.allclose(coarse, sae.encode(activations.float()), rtol=1e-4), "the mode makes a difference"

    def test_a_transcoder_is_checked_in_its_own_precision(self, neox: Any, make_sae: MakeSAE) -> None:
        sae = make_sae("transcoder", HOOK, "blocks.1.hook_resid_post")
        with torch.autocast(TOKENS.device.type, torch.bfloat16), torch.no_grad():
            states = neox(TOKENS, output_hidden_states=True).hidden_states
            with tlc.add_capacity_hooks(neox, sae, fvu_every=1, mask_token_ids=[]) as capacity:
                neox(TOKENS)
        inputs, targets = (states[layer].flatten(0, 1).double() for layer in (1, 2))
        with torch.no_grad():
            error = (targets - sae(inputs.float()).double()).square().sum()
        expected = float(error / (targets - targets.mean(0)).square().sum())
        assert capacity.measurement()[HOOK].summary.fvu.value == pytest.approx(expected, rel=FVU)


class Graphs:
    """A backend of `torch.compile` that counts how many graphs run."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, graph: Any, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            self.ran += 1
            return graph(*inputs)

        return run


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def compiled(model: Any, how: str, backend: Graphs) -> Any:
    """The model as it is called once it is compiled: as a whole in a wrapper, in place, or block by block."""
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    for module in [model] if how == "in place" else model.gpt_neox.layers:
        module.compile(backend=backend)
    return model


def small_model(kind: str = "gpt_neox") -> Any:
    """A model of one block, which compiles in a second."""
    torch.manual_seed(0)
    if kind == "HookedTransformer":
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(
            n_layers=1, d_model=D_MODEL, n_ctx=16, d_head=D_MODEL // HEADS, d_vocab=VOCAB, act_fn="gelu", seed=0
        )
        return HookedTransformer(config).eval()
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=64,
        max_position_embeddings=16,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    return GPTNeoXForCausalLM(config).eval()


class TestCompiled:
    @pytest.mark.slow
    def test_what_we_run_ourselves_runs_past_no_hook(self, graphs: Graphs, make_sae: MakeSAE, tokenizer: Any) -> None:
        """A graph that was made before keeps to the hooks of that time."""
        model, sae, texts = small_model(), make_sae("standard", HOOK), ["w1 w2 w3", "w4 w5"]

        def read() -> tuple[Any, ...]:
            with tlc.add_capacity_hooks(model, sae) as capacity:
                summary = capacity.run(TOKENS).measurement()[HOOK].summary
            vectors = collect(model, HOOK, texts, tokenizer=tokenizer, progress=False).values
            return summary.arrays["squares"], vectors, ablation_kl(model, HOOK, sae, TOKENS, [0, 1]).numpy(force=True)

        plain = read()
        model.compile(backend=graphs)
        with torch.no_grad():
            model(TOKENS)
        assert graphs.ran == 1
        for mine, theirs in zip(read(), plain, strict=True):
            np.testing.assert_array_equal(mine, theirs)

    @pytest.mark.slow
    def test_a_model_that_ran_compiled_before(self, graphs: Graphs, make_sae: MakeSAE) -> None:
        """Its graph was made without our hooks; while they are there it is made with them, and afterwards without."""
        model, sae = small_model(), make_sae("standard", HOOK)
        fast, eager = compiled(model, "wrapped", graphs), small_model()
        with torch.no_grad():
            logits = fast(TOKENS).logits
            assert graphs.ran == 1
            with tlc.add_capacity_hooks(model, sae, fvu_every=1, mask_token_ids=[]) as capacity:
                fast(TOKENS)
            inputs: list[torch.Tensor] = []
            # The last block's output is not among the hidden states of Hugging Face, which are normalised there.
            eager.gpt_neox.layers[0].register_forward_hook(lambda *seen: inputs.append(seen[2]))
            eager(TOKENS)
            graphs.ran = 0
            torch.testing.assert_close(fast(TOKENS).logits, logits, rtol=0, atol=0)
        assert graphs.ran == 1, "the model is as fast as before"
        assert_counts(capacity, sae, inputs[0])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("how", "attached_to"),
        [
            ("wrapped", "the model"),
            ("wrapped", "the wrapper"),
            ("in place", "the model"),
            ("blocks", "the model"),
            ("wrapped HookedTransformer", "the model"),
        ],
    )
    def test_every_way(self, graphs: Graphs, make_sae: MakeSAE, how: str, attached_to: str) -> None:
        how, _, kind = how.partition(" HookedT")
        model, sae = small_model("HookedTransformer" if kind else "gpt_neox"), make_sae("standard", HOOK)
        mask = torch.ones_like(TOKENS)
        mask[1:, 7:] = 0
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as expected, torch.no_grad():
            model(TOKENS, attention_mask=mask)
            expected.run(TOKENS)
        fast = compiled(model, how, graphs)
        with torch.no_grad():
            fast(TOKENS, attention_mask=mask)
            with tlc.add_capacity_hooks(fast if attached_to == "the wrapper" else model, sae, fvu_every=1) as capacity:
                fast(TOKENS, attention_mask=mask)
                capacity.run(TOKENS)
            fast(TOKENS, attention_mask=mask)
        mine, theirs = (handle.measurement()[HOOK].summary for handle in (capacity, expected))
        assert mine.masked == theirs.masked
        np.testing.assert_array_equal(mine.arrays["counts"].sum(0), theirs.arrays["counts"].sum(0))


class TestTrainingMode:
    def test_ablation_runs_in_evaluation_mode(self, make_model: Callable[..., Any], make_sae: MakeSAE) -> None:
        """A model with dropout costs the same KL each time, whichever mode it was left in, and stays in that mode."""
        model, sae = make_model("gpt_neox"), make_sae("standard", HOOK)
        wanted = ablation_kl(model, HOOK, sae, TOKENS, [0, 1])
        model.train()
        torch.testing.assert_close(ablation_kl(model, HOOK, sae, TOKENS, [0, 1]), wanted)
        assert model.training

    @pytest.mark.parametrize("kind", ["gpt_neox", "TransformerBridge"])
    def test_a_call_with_dropout_says_so_once(
        self, make_model: Callable[..., Any], make_sae: MakeSAE, kind: str
    ) -> None:
        model = make_model(kind).train()
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity, torch.no_grad():
            capacity.run(TOKENS)  # in evaluation mode, whatever the model's
            with pytest.warns(UserWarning, match=r"training mode.*dropout.*model\.eval\(\)"):
                model(TOKENS)
            model(TOKENS)  # warnings are errors in tests

    def test_without_dropout_nothing_is_said(self, make_model: Callable[..., Any], make_sae: MakeSAE) -> None:
        model = make_model("llama").train()
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            model(TOKENS)
        assert capacity.n_tokens == TOKENS.numel()

    @pytest.mark.parametrize("option", ["attention_dropout", "hidden_dropout"])
    def test_every_kind_of_dropout_is_seen(self, option: str) -> None:
        """Attention's is no module but a number that it passes on."""
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        without = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=9, **sizes, **without | {option: 0.5})).train()
        tokens = torch.randint(1, 9, (2, 5))
        assert not torch.equal(model(tokens).logits, model(tokens).logits)
        assert drops_out(model)
        assert not drops_out(model.eval())
        assert not drops_out(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=9, **sizes, **without)).train())
