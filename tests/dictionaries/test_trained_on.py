"""The tensor that a dictionary was trained on: what is tapped in every form of a model equals what the trainer's own
way of naming it gives on the transformers model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from tiny_families import CONFIGS, TOKENS
from tiny_forms import BRIDGE, FORMS, HOOKED, cases, form, hugging_face, sides, tokenizer

import tl_capacity as tlc
from tl_capacity.dictionaries.adapter import read_hook, target_hook
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.models.hook_points import find_tap_point

D, FEATURES, K = 32, 24, 4
MODULES = {"gpt-neox": ("attention", "mlp"), "gpt2": ("attn", "mlp"), "opt": ("self_attn",), "mamba": ("mixer",)}
BLOCKS = {"gpt2": "h", "opt": "decoder.layers"}
"""What modules are called that `sparsify` trains on, from the base model."""
POST_NORM = ("gemma2", "gemma3", "olmo2")
EVERYWHERE = cases(CONFIGS)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def sparsify(folder: Path, **config: Any) -> Any:
    """A sparse coder as `sparsify` saves it, in a folder that has the module's name."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": K, "d_in": D, **config}))
    weights = {
        "encoder.weight": random(FEATURES, D, seed=1),
        "encoder.bias": random(FEATURES, seed=2),
        "W_dec": random(FEATURES, D, seed=3),
        "b_dec": random(D, seed=4),
    }
    if config.get("skip_connection"):
        weights["W_skip"] = random(D, D, seed=5)
    save_file(weights, folder / "sae.safetensors")
    return load_sae(str(folder))[1]


def dictionary_learning(folder: Path, submodule: str, io: str) -> Any:
    folder.mkdir(parents=True)
    trainer = {"dict_class": "AutoEncoderTopK", "k": K, "layer": 1, "submodule_name": submodule}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": io, "ctx_len": 16}}))
    weights = {
        "encoder.weight": random(FEATURES, D, seed=1),
        "encoder.bias": random(FEATURES, seed=2),
        "decoder.weight": random(D, FEATURES, seed=3),
        "b_dec": random(D, seed=4),
    }
    torch.save(weights, folder / "ae.pt")
    return load_sae(str(folder))[1]


def seen(model: Any, hook: str | None) -> torch.Tensor:
    """What a tap sees, heads joined."""
    assert hook is not None
    kept: list[torch.Tensor] = []
    remove = find_tap_point(model, hook).watch(kept.append)
    with torch.no_grad():
        model(TOKENS)
    remove()
    (activation,) = kept
    return activation.flatten(2)


def base(family: str) -> str:
    """The base model's name in the model with its head."""
    return str(hugging_face(family).base_model_prefix)


@pytest.mark.fidelity(
    source="sparsify",
    says="the folder's name: a module of the base model",
    obeyed="the module's own output is read, before any norm behind it; a transcoder reads the module's input",
)
@pytest.mark.parametrize(("family", "name"), EVERYWHERE)
def test_sparsify(tmp_path: Path, family: str, name: str) -> None:
    block, model = f"{BLOCKS.get(family, 'layers')}.1", form(family, name)
    for inside in ("", *MODULES.get(family, ("self_attn", "mlp"))):
        if family == "mamba" and inside:
            continue  # a mixer has no name in TransformerLens' blocks
        module = f"{block}.{inside}".removesuffix(".")
        expected = {side: sides(family)[f"{base(family)}.{module}.{side}"] for side in ("input", "output")}
        coder = sparsify(tmp_path / module)
        torch.testing.assert_close(seen(model, read_hook(coder)), expected["output"], rtol=1e-4, atol=1e-4)
        transcoder = sparsify(tmp_path / "transcoders" / module, transcode=True)
        reads = read_hook(transcoder)
        torch.testing.assert_close(seen(model, reads), expected["input"], rtol=1e-4, atol=1e-4)
        writes = target_hook(transcoder, str(reads))
        torch.testing.assert_close(seen(model, writes), expected["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity(
    source="dictionary_learning",
    says="`layer`, `submodule_name`, `io`",
    obeyed="the submodule's own output is read, before any norm behind it, or its input if `io` says so",
)
@pytest.mark.parametrize(("family", "name"), cases(["gpt-neox", *POST_NORM], quick=["gemma2"]))
def test_dictionary_learning(tmp_path: Path, family: str, name: str) -> None:
    attention, _ = MODULES.get(family, ("self_attn", "mlp"))
    submodules = {"resid_post_layer_1": "", "mlp_out_layer1": ".mlp", "attn_out_layer1": f".{attention}"}
    for submodule, module in submodules.items():
        path = f"{base(family)}.layers.1{module}"
        expected = {side: sides(family)[f"{path}.{side}"] for side in ("input", "output")}
        for io, reads, writes in (("out", "output", None), ("in", "input", None), ("in_and_out", "input", "output")):
            sae = dictionary_learning(tmp_path / f"{submodule}-{io}", submodule, io)
            model, hook = form(family, name), read_hook(sae)
            torch.testing.assert_close(seen(model, hook), expected[reads], rtol=1e-4, atol=1e-4)
            target = target_hook(sae, str(hook))
            assert (target is None) == (writes is None)
            if writes:
                torch.testing.assert_close(seen(model, target), expected[writes], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity(
    source="SAELens",
    says="`hook_name` with `model_class_name: AutoModelForCausalLM`",
    obeyed="the output of that module of the Hugging Face model is read, as SAELens' own proxy gives it",
)
@pytest.mark.parametrize(("family", "name"), cases(["gpt2", "gemma2", "olmo2"], quick=["olmo2"]))
def test_saelens_modules_of_transformers(family: str, name: str) -> None:
    attention, _ = MODULES.get(family, ("self_attn", "mlp"))
    block = f"{base(family)}.{BLOCKS.get(family, 'layers')}.1"
    hooks = [block, f"{block}.mlp", f"{block}.{attention}"]
    proxy = HookedProxyLM(hugging_face(family), tokenizer(), hook_names=hooks)
    with torch.no_grad():
        _, cache = proxy.run_with_cache(TOKENS)
    for hook in hooks:
        torch.testing.assert_close(seen(form(family, name), hook), cache[hook], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity(
    source="SAELens",
    says="`hook_name: …hook_mlp_in` beside `hf_hook_name: ….pre_feedforward_layernorm.output` (Gemma Scope 2)",
    obeyed="the MLP's input is tapped, behind the norm; TransformerLens' `hook_mlp_in` is before it",
)
@pytest.mark.parametrize("name", FORMS)
def test_gemma_scope_2_transcoders(make_sae: Any, name: str) -> None:
    sae = make_sae("jumprelu_transcoder", None)
    layer = "model.layers.1"
    sae.cfg.metadata = SAEMetadata(
        hook_name="blocks.1.hook_mlp_in",
        hook_name_out="blocks.1.hook_mlp_out",
        hf_hook_name=f"{layer}.pre_feedforward_layernorm.output",
        hf_hook_name_out=f"{layer}.post_feedforward_layernorm.output",
    )
    model, reads = form("gemma3", name), read_hook(sae)
    for hook, module in (
        (reads, "pre_feedforward_layernorm"),
        (target_hook(sae, str(reads)), "post_feedforward_layernorm"),
    ):
        expected = sides("gemma3")[f"{layer}.{module}.output"]
        torch.testing.assert_close(seen(model, hook), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), cases(POST_NORM, quick=["gemma2"]))
def test_latents_are_those_of_the_modules_own_output(tmp_path: Path, family: str, name: str) -> None:
    """From the folder to the counts: the tensor behind the norm gives others."""
    coder = sparsify(tmp_path / "layers.1.mlp")
    with tlc.add_capacity_hooks(form(family, name), coder, fvu_every=1, mask_token_ids=[0]) as capacity:
        (found,) = capacity.run(TOKENS, progress=False).measurement()
    counts = {}
    for module in ("mlp", "post_feedforward_layernorm"):
        x = sides(family)[f"model.layers.1.{module}.output"].flatten(0, 1)
        z = coder.encode(x)
        counts[module] = (z != 0).sum(0).tolist()
        if module == "mlp":
            fvu = (x - coder.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
            assert found.summary.fvu.value == pytest.approx(float(fvu), rel=1e-3)
    assert found.summary.arrays["counts"].sum(0).tolist() == counts["mlp"] != counts["post_feedforward_layernorm"]


@pytest.mark.parametrize(("family", "name"), cases(POST_NORM, quick=["olmo2"]))
def test_a_skip_transcoder_is_checked_against_the_modules_own_output(tmp_path: Path, family: str, name: str) -> None:
    coder = sparsify(tmp_path / "layers.1.mlp", transcode=True, skip_connection=True)
    with tlc.add_capacity_hooks(form(family, name), coder, fvu_every=1, mask_token_ids=[0]) as capacity:
        (found,) = capacity.run(TOKENS, progress=False).measurement()
    x, y = (sides(family)[f"model.layers.1.mlp.{side}"].flatten(0, 1) for side in ("input", "output"))
    z = coder.encode(x)
    assert found.summary.arrays["counts"].sum(0).tolist() == (z != 0).sum(0).tolist()
    written = coder.decode(z) + x @ coder.W_skip.T
    fvu = (y - written).square().sum() / (y - y.mean(0)).square().sum()
    assert found.summary.fvu.value == pytest.approx(float(fvu), rel=1e-3)


@pytest.mark.fidelity(
    source="any",
    says="the hook point that it was trained on",
    obeyed="it is measured there; at a hook point that carries another tensor in this model, a note says so",
)
@pytest.mark.parametrize("name", FORMS)
def test_another_tensor_is_named(tmp_path: Path, name: str) -> None:
    """What the MLP adds is what it gives, where no norm stands between."""
    coder = sparsify(tmp_path / "layers.1.mlp")
    says = "blocks.1.hook_mlp_out: the SAE's metadata says that it was trained on blocks.1.mlp.hook_out, and it reads"
    for family, differs in (("gemma2", True), ("llama", False)):
        model = form(family, name)
        assert [note.startswith(says) for note in reading_of(model, coder, "blocks.1.hook_mlp_out").notes] == (
            [True] if differs else []
        )
        assert not reading_of(model, coder, "blocks.1.mlp.hook_out").notes
        assert not reading_of(model, coder, "model.layers.1.mlp").notes
    block = sparsify(tmp_path / "layers.0")
    assert not reading_of(form("llama", name), block, "blocks.1.hook_resid_pre").notes
    (note,) = reading_of(form("llama", name), block, "blocks.1.hook_resid_post").notes
    assert note.endswith("measure it at blocks.0.hook_resid_post if this was not intended")
    (note,) = reading_of(form("llama", name), sparsify(tmp_path / "layers.7"), "blocks.1.hook_resid_post").notes
    assert "was trained on blocks.7.hook_resid_post" in note
    with tlc.add_capacity_hooks(form("gemma2", name), {"blocks.1.hook_mlp_out": coder}, mask_token_ids=[0]) as capacity:
        measured = capacity.run(TOKENS, progress=False).measurement()
    assert measured.hooks[0].notes[0].startswith(says)


@pytest.mark.fidelity(
    source="SAELens",
    says="`hook_name: ….hook_normalized`",
    obeyed="TransformerLens 3's value is read, before the norm's weight; for a layer norm a note says what else",
)
@pytest.mark.parametrize("name", [BRIDGE, HOOKED])
def test_normalized_by_another_version(make_sae: Any, name: str) -> None:
    sae = make_sae("standard", "blocks.1.ln2.hook_normalized")
    assert not reading_of(form("gemma2", name), sae, "blocks.1.ln2.hook_normalized").notes
    (note,) = reading_of(form("gpt2", name), sae, "blocks.1.ln2.hook_normalized").notes
    assert note.endswith("if the SAE was trained with version 2, measure it at blocks.1.mlp.hook_in")
