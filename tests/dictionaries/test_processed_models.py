"""SAEs that were trained on a model whose weights TransformerLens had processed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli
from place import device, placed
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tl_capacity import Measurement, TokenStream, add_capacity_hooks
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.measure.ablation import ablation_kl
from tl_capacity.models.forward import activation_at
from tl_capacity.models.hook_points import hook_names
from tl_capacity.predict.caveats import measurement_warnings
from tl_capacity.probing.activations import collect

WIDTH, VOCABULARY, POSITIONS = 32, 100, 32
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
CENTRED = {"center_writing_weights": True}
HOOK = "blocks.1.hook_resid_pre"
FORMS = ("Hugging Face", "TransformerBridge", "HookedTransformer")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A GPT-2 whose every weight matters, and whose residual stream has a mean over d_model."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=POSITIONS, **SIZES)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.transformer.wte.weight.add_(3 + torch.randn(VOCABULARY, 1))
    return placed(model)


@pytest.fixture(scope="module")
def processed(gpt2: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`processed(**options)`: what TransformerLens itself makes of the model with these options and no others."""
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    gpt2.config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"architectures": ["GPT2LMHeadModel"], "n_ctx": POSITIONS})
    )
    made: dict[str, Any] = {}

    def make(dtype: torch.dtype = torch.float32, **options: bool) -> Any:
        key = str((dtype, options))
        if key not in made:
            model = copy.deepcopy(gpt2).to("cpu", dtype)  # TransformerLens folds weights on the CPU
            with pytest.warns(DeprecationWarning, match="from_pretrained is deprecated"):
                lens = HookedTransformer.from_pretrained_no_processing(
                    "gpt2", hf_model=model, tokenizer=tokenizer, device="cpu", dtype=dtype, **options
                )
            made[key] = placed(lens)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)  # so that TransformerLens finds the name as a folder, and asks no hub
        yield make


@pytest.fixture(scope="module")
def form(gpt2: Any, processed: Callable[..., Any], tokenizer: Any) -> Callable[[str], Any]:
    """The model without processing, in one of its forms."""
    bridge = TransformerBridge.boot_transformers(
        "local/x", hf_model=copy.deepcopy(gpt2), tokenizer=tokenizer, device=device()
    ).eval()
    forms = {"Hugging Face": gpt2, "TransformerBridge": bridge, "HookedTransformer": processed()}
    return forms.__getitem__


@pytest.fixture
def trained_on(make_sae: Callable[..., Any]) -> Callable[..., Any]:
    """`trained_on(kwargs, hook)`: an SAE that says so of its model."""

    def make(kwargs: dict[str, Any], hook: str = HOOK, **more: Any) -> Any:
        sae = make_sae("standard", hook, **more)
        sae.cfg.metadata.model_from_pretrained_kwargs = kwargs
        sae.cfg.metadata.model_class_name = "HookedTransformer"
        return sae

    return make


def without_the_mean(sae: Any) -> Any:
    """An SAE that reconstructs an activation but for its mean, as one of a centred model does."""
    keep = torch.eye(WIDTH) - 1 / WIDTH
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([keep, -keep], dim=1))
        sae.W_dec.copy_(torch.cat([keep, -keep]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


TOKENS = placed(torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0)))


@pytest.mark.fidelity(
    source="SAELens",
    says="model_from_pretrained_kwargs: center_writing_weights",
    obeyed="activations are read without their mean over d_model, as those of the centred model",
)
@pytest.mark.parametrize("name", FORMS)
def test_activations_are_those_of_the_centred_model(
    name: str, form: Callable[[str], Any], processed: Callable[..., Any], trained_on: Callable[..., Any]
) -> None:
    model, centred = form(name), processed(**CENTRED)
    _, cache = centred.run_with_cache(TOKENS)
    _, plain = processed().run_with_cache(TOKENS)
    differ = 0
    for hook in sorted(set(hook_names(model)) & set(cache)):
        reading = reading_of(model, trained_on(CENTRED, hook), hook)
        seen = activation_at(model, reading.point, TOKENS)
        assert seen is not None
        assert "metadata says" not in " ".join(reading.notes)
        if hook.endswith(("hook_normalized", "hook_attn_scores")) and name == "TransformerBridge":
            continue  # a bridge has the norm's weight there, and other numbers for minus infinity
        size = max(1.0, float(cache[hook].abs().max()))
        torch.testing.assert_close(seen, cache[hook].view_as(seen), atol=1e-5 * size, rtol=1e-5, msg=hook)
        changed = not torch.allclose(plain[hook], cache[hook], atol=1e-3)
        assert changed == (reading.processing == ("center_writing_weights",)), hook
        differ += changed
    assert differ >= 4


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_mlp_out"])
@pytest.mark.parametrize("name", FORMS)
def test_counts_are_those_on_the_centred_model(
    name: str, hook: str, form: Callable[[str], Any], processed: Callable[..., Any], trained_on: Callable[..., Any]
) -> None:
    sae = trained_on(CENTRED, hook)
    with add_capacity_hooks(form(name), sae, mask_token_ids=[]) as capacity:
        capacity.run(TOKENS, progress=False)
    latents = sae.encode(processed(**CENTRED).run_with_cache(TOKENS)[1][hook]).flatten(0, 1)
    counts = capacity.measurement().hooks[0].summary.arrays["counts"].sum(0)
    assert counts.tolist() == (latents > 0).sum(0).tolist()
    without = sae.encode(processed().run_with_cache(TOKENS)[1][hook]).flatten(0, 1)
    assert counts.tolist() != (without > 0).sum(0).tolist()
    assert capacity.measurement().provenance.settings["processing"] == {hook: ["center_writing_weights"]}


@pytest.mark.parametrize("name", ["Hugging Face", "TransformerBridge"])
def test_gradients_and_ablation_are_those_of_the_centred_model(
    name: str, form: Callable[[str], Any], processed: Callable[..., Any], trained_on: Callable[..., Any]
) -> None:
    sae, figures = trained_on(CENTRED), []
    for model in (form(name), processed(**CENTRED)):
        with add_capacity_hooks(model, sae, importance=["gradient"], mask_token_ids=[]) as capacity:
            capacity.run(TOKENS, progress=False)
        nats = capacity.measurement().hooks[0].importance("gradient")
        ablated = ablation_kl(model, HOOK, sae, TOKENS, range(8))
        figures.append((torch.as_tensor(nats), ablated))
    for ours, theirs in zip(*figures, strict=True):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-8)


def test_what_a_probe_reads_is_centred_too(
    gpt2: Any, processed: Callable[..., Any], trained_on: Callable[..., Any], tokenizer: Any
) -> None:
    sae, texts = trained_on(CENTRED), ["w1 w2 w3", "w7 w8"]
    ours, theirs = (
        collect(model, HOOK, texts, sae=sae, tokenizer=tokenizer, progress=False).values
        for model in (gpt2, processed(**CENTRED))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.fidelity(
    source="SAELens",
    says="model_from_pretrained_kwargs without an option, or no such keywords",
    obeyed="the measurement names a model that was processed by that option",
)
@pytest.mark.parametrize("kwargs", [{"center_writing_weights": False}, {}, None])
def test_a_processed_model_is_named_where_the_sae_wants_none(
    kwargs: Any, processed: Callable[..., Any], trained_on: Callable[..., Any]
) -> None:
    notes = {}
    for name, options in {"plain": {}, "centred": CENTRED, "folded": {"fold_ln": True}}.items():
        with add_capacity_hooks(processed(**options), trained_on(kwargs)) as capacity:
            capacity.run(TOKENS, progress=False)
        notes[name] = capacity.measurement().hooks[0].notes
        assert set(notes[name]) <= set(measurement_warnings(capacity.measurement().hooks))
    assert notes["plain"] == notes["folded"] == ()  # folded norms leave the residual stream as it is
    [note] = notes["centred"]
    assert note.startswith(
        f"{HOOK}: the SAE's metadata says that it was trained on a model without center_writing_weights"
    )


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"])
def test_folded_value_biases_are_named_both_ways(
    hook: str, processed: Callable[..., Any], trained_on: Callable[..., Any]
) -> None:
    folded = {"fold_value_biases": True}
    wanting, plain = trained_on(folded, hook), trained_on({}, hook)
    assert reading_of(processed(**folded), wanting, hook).processing == ("fold_value_biases",)
    assert not reading_of(processed(**folded), wanting, hook).notes
    assert not reading_of(processed(), plain, hook).notes
    for model, sae in ((processed(), wanting), (processed(**folded), plain)):
        [note] = reading_of(model, sae, hook).notes
        assert note.startswith(f"{hook}: the SAE's metadata says that it was trained on a model with")
        assert "fold_value_biases" in note


def test_a_model_that_is_centred_already_is_read_as_it_is(
    processed: Callable[..., Any], trained_on: Callable[..., Any]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        reading = reading_of(processed(dtype, **CENTRED), trained_on(CENTRED), HOOK)
        assert (reading.processing, reading.notes) == (("center_writing_weights",), ())
        assert not reading.point.centred
        assert reading_of(processed(dtype), trained_on(CENTRED), HOOK).point.centred


def test_the_mean_is_taken_in_full_precision(gpt2: Any, trained_on: Callable[..., Any]) -> None:
    half = copy.deepcopy(gpt2).bfloat16()
    sae = trained_on(CENTRED)
    centred = activation_at(half, reading_of(half, sae, HOOK).point, TOKENS)
    plain = activation_at(half, reading_of(half, trained_on({}), HOOK).point, TOKENS)
    assert centred is not None
    assert plain is not None
    assert centred.dtype == torch.bfloat16
    exact = plain.double() - plain.double().mean(-1, keepdim=True)
    torch.testing.assert_close(centred.double(), exact, rtol=2**-8, atol=1e-6)


def test_models_without_layer_norm_are_left_alone(trained_on: Callable[..., Any]) -> None:
    """TransformerLens centres no weights before an RMSNorm, which the mean passes."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SIZES)
    llama = LlamaForCausalLM(config).eval()
    reading = reading_of(llama, trained_on(CENTRED), HOOK)
    assert (reading.processing, reading.notes, reading.point.centred) == ((), (), False)


@pytest.fixture(scope="module")
def folder(gpt2: Any, tokenizer: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a user has it, and text."""
    place = tmp_path_factory.mktemp("user")
    gpt2.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return place


def test_the_command_line_does_not_refuse_the_right_model(
    folder: Path, cli: Cli, trained_on: Callable[..., Any], tmp_path: Path
) -> None:
    """Most of the energy is in the mean, so that the plain model would be refused as another one."""
    sae = without_the_mean(trained_on(CENTRED))
    sae.save_model(tmp_path / "sae")
    options = ("--model", folder / "model", "--source", folder / "text.jsonl", "--tokens", 500)
    code, out, err = cli("measure", *options, "--sae", tmp_path / "sae", "--out", tmp_path / "out")
    assert code == 0, out + err
    measurement = Measurement.load(tmp_path / "out")
    assert measurement.hooks[0].summary.fvu.value < 1e-6
    code, said, _ = cli("doctor", *options, "--sae", tmp_path / "sae", "--out", tmp_path / "other")
    assert code == 0
    assert "center_writing_weights" in said
    sae.cfg.metadata.model_from_pretrained_kwargs = {}
    sae.save_model(tmp_path / "plain")
    code, _, said = cli(
        "measure", *options, "--sae", tmp_path / "plain", "--tokens", 500, "--out", tmp_path / "refused"
    )
    assert code != 0
    assert "FVU" in said


@pytest.mark.fidelity(
    source="SAELens",
    says="model_from_pretrained_kwargs: fold_value_biases and other processing",
    obeyed="`measure` runs a HookedTransformer with that processing",
)
def test_processing_that_only_hooked_transformer_has(
    folder: Path,
    cli: Cli,
    trained_on: Callable[..., Any],
    processed: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    hook, folded = "blocks.1.attn.hook_z", {"fold_value_biases": True}
    sae = trained_on(folded, hook)
    sae.save_model(tmp_path / "sae")
    options = ("--model", folder / "model", "--sae", tmp_path / "sae", "--source", folder / "text.jsonl")
    code, out, err = cli("measure", *options, "--tokens", 500, "--out", tmp_path / "out", "--max-fvu", "inf")
    assert code == 0, out + err
    assert "device" not in out  # TransformerLens prints that it moves a model
    measurement = Measurement.load(tmp_path / "out")
    assert measurement.provenance.settings["processing"] == {hook: ["fold_value_biases"]}
    assert not measurement.hooks[0].notes
    stream = TokenStream(str(folder / "text.jsonl"), tokenizer, POSITIONS)
    with add_capacity_hooks(processed(**folded), {hook: sae}) as capacity:
        capacity.run(stream, 500, progress=False)
    ours, theirs = (m.hooks[0].summary.arrays["counts"] for m in (measurement, capacity.measurement()))
    np.testing.assert_array_equal(ours, theirs)


def test_a_session_says_what_it_makes_up_for(
    gpt2: Any, trained_on: Callable[..., Any], processed: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with add_capacity_hooks(gpt2, trained_on(CENTRED)):
        [made_up_for] = caplog.messages
    assert made_up_for.startswith(
        f"{HOOK}: the SAE's metadata says that it was trained on a model with center_writing_weights"
    )
    caplog.clear()
    with add_capacity_hooks(processed(**CENTRED), trained_on(CENTRED)):
        assert not caplog.messages
    with add_capacity_hooks(processed(**CENTRED), trained_on({})):
        assert "without center_writing_weights" in caplog.text


def test_other_weights_of_a_model_are_asked_for(gpt2: Any, trained_on: Callable[..., Any]) -> None:
    [note] = reading_of(gpt2, trained_on({"checkpoint_value": 3000}), HOOK).notes
    assert "checkpoint_value = 3000" in note


def test_where_a_transcoder_writes_is_looked_at_too(
    make_sae: Callable[..., Any], processed: Callable[..., Any], gpt2: Any
) -> None:
    reads, writes = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    transcoder = make_sae("transcoder", reads, writes)
    transcoder.cfg.metadata.model_from_pretrained_kwargs = CENTRED
    fvu = []
    for model in (gpt2, processed(**CENTRED)):
        with add_capacity_hooks(model, transcoder, fvu_every=1) as capacity:
            capacity.run(TOKENS, progress=False)
        [hook] = capacity.measurement()
        assert not hook.notes
        fvu.append(hook.summary.fvu.value)
    assert fvu[0] == pytest.approx(fvu[1], rel=1e-5)
    transcoder.cfg.metadata.model_from_pretrained_kwargs = {}
    with add_capacity_hooks(processed(**CENTRED), transcoder) as capacity:
        capacity.run(TOKENS, progress=False)
    [note] = capacity.measurement().hooks[0].notes
    assert note.startswith(
        f"{writes}: the SAE's metadata says that it was trained on a model without center_writing_weights"
    )
