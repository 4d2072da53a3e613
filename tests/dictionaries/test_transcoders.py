"""Transcoders as circuit-tracer stores them, laid out here as it writes them, against its formulas written out; and the
sentences of what is not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Cli
from conftest import BOS, D_MODEL
from safetensors.torch import save_file
from tiny_families import TOKENS
from tiny_forms import FORMS, form, sides

import tl_capacity as tlc
from tl_capacity.dictionaries.adapter import read_hook, target_hook
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import DictionaryError
from tl_capacity.measurement.measurement import Measurement

FEATURES, D = 24, 32
CONFIG = "model_kind: transcoder_set\nmodel_name: {model}\nfeature_input_hook: {reads}\nfeature_output_hook: {writes}\n"


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def weights(d: int = D) -> dict[str, torch.Tensor]:
    """`W_enc` and `W_dec` are [feature, d], as circuit-tracer has both."""
    return {
        "W_enc": random(FEATURES, d, seed=1),
        "b_enc": random(FEATURES, seed=2) - 0.5,
        "W_dec": random(FEATURES, d, seed=3),
        "b_dec": random(d, seed=4),
    }


def save(
    folder: Path, tensors: dict[str, torch.Tensor], reads: str = "mlp.hook_in", writes: str = "hook_mlp_out"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(model="google/gemma-2-2b", reads=reads, writes=writes))
    save_file(tensors, folder / "layer_1.safetensors")
    return folder / "layer_1.safetensors"


def latents(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    before = x @ w["W_enc"].T + w["b_enc"]
    return before * (before > w["threshold"]) if "threshold" in w else before.relu()


@pytest.mark.fidelity(
    source="circuit-tracer",
    says="`feature_input_hook`, `feature_output_hook`, a file for each layer, `W_skip`, `threshold`",
    obeyed="features are counted at its input, and its FVU is checked at its output",
)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "skip"])
def test_a_per_layer_transcoder(tmp_path: Path, name: str, kind: str) -> None:
    w = weights()
    more = {
        "relu": {},
        "jumprelu": {"threshold": torch.full((FEATURES,), 0.7)},
        "skip": {"W_skip": random(D, D, seed=5)},
    }
    w |= more[kind]
    _, transcoder = load_sae(str(save(tmp_path, w)))
    assert read_hook(transcoder) == "blocks.1.mlp.hook_in"
    assert target_hook(transcoder, "blocks.1.mlp.hook_in") == "blocks.1.hook_mlp_out"
    with tlc.add_capacity_hooks(form("gemma2", name), transcoder, fvu_every=1, mask_token_ids=[0]) as capacity:
        (found,) = capacity.run(TOKENS, progress=False).measurement()
    x = sides("gemma2")["model.layers.1.mlp.input"].flatten(0, 1)
    y = sides("gemma2")["model.layers.1.post_feedforward_layernorm.output"].flatten(0, 1)
    z = latents(w, x)
    assert 0 < (z != 0).float().mean() < 1
    assert found.summary.arrays["counts"].sum(0).tolist() == (z != 0).sum(0).tolist()
    written = z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if kind == "skip" else 0)
    fvu = (y - written).square().sum() / (y - y.mean(0)).square().sum()
    assert found.summary.fvu.value == pytest.approx(float(fvu), rel=1e-3)


@pytest.mark.parametrize(
    ("reads", "hook"),
    [
        ("ln2.hook_normalized", "blocks.1.ln2.hook_normalized"),
        ("hook_resid_mid", "blocks.1.hook_resid_mid"),
        ("blocks.{layer}.hook_resid_pre", "blocks.1.hook_resid_pre"),
    ],
)
def test_where_it_reads(tmp_path: Path, reads: str, hook: str) -> None:
    assert read_hook(load_sae(str(save(tmp_path, weights(), reads)))[1]) == hook


def test_from_the_command_line(tmp_path: Path, setup: Path, cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    """The model is NeoX, which has no norm behind its MLP."""
    file = save(tmp_path / "set", weights(D_MODEL))
    out = tmp_path / "out"
    options = ["--source", setup / "text.jsonl", "--tokens", "300", "--context", "16", "--max-fvu", "inf"]
    code, _, error = cli("measure", "--model", setup / "model", "--sae", file, *options, "--out", out)
    assert code == 0, error
    assert "says that it was trained on 'google/gemma-2-2b'" in caplog.text
    (measured,) = Measurement.load(out)
    assert (measured.hook, measured.sae) == ("blocks.1.mlp.hook_in", str(file))
    assert measured.summary.n_tokens >= 300


class TestBadInput:
    def test_files(self, tmp_path: Path) -> None:
        file = save(tmp_path / "a", {name: value for name, value in weights().items() if name != "b_dec"})
        with pytest.raises(DictionaryError, match=r"lacks b_dec: download it again"):
            load_sae(str(file))
        file = save(tmp_path / "b", weights() | {"log_thresholds": torch.zeros(FEATURES)})
        with pytest.raises(DictionaryError, match=r"has log_thresholds, which are unknown: choose"):
            load_sae(str(file))
        file = save(tmp_path / "c", weights() | {"W_enc": random(FEATURES - 1, D, seed=1)})
        with pytest.raises(DictionaryError, match=r"do not fit together"):
            load_sae(str(file))
        file = save(tmp_path / "d", weights())
        with pytest.raises(DictionaryError, match=r"does not tell its layer: name it as circuit-tracer does"):
            load_sae(str(file.rename(file.with_name("first.safetensors"))))
        file = save(tmp_path / "e", weights())
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(DictionaryError, match=r"cannot be loaded \(.*\): save it again with circuit-tracer"):
            load_sae(str(file))

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (None, r"holds no config\.yaml, which says where its transcoders read and write: download it too"),
            ("feature_input_hook: [", r"cannot be loaded \(config\.yaml is not YAML"),
            ("- 1", r"config\.yaml does not hold a mapping"),
            ("feature_input_hook: mlp.hook_in", r"has no feature_output_hook"),
            ("feature_input_hook: 3\nfeature_output_hook: x", r"has no feature_input_hook"),
        ],
    )
    def test_configurations(self, tmp_path: Path, config: str | None, says: str) -> None:
        file = save(tmp_path, weights())
        (tmp_path / "config.yaml").unlink()
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        with pytest.raises(DictionaryError, match=says):
            load_sae(str(file))

    def test_a_folder_of_many(self, tmp_path: Path) -> None:
        save(tmp_path, weights())
        with pytest.raises(
            DictionaryError, match=r"holds transcoders of 1 layers: name the file of one, such as .*layer_1\.safe"
        ):
            load_sae(str(tmp_path))


@pytest.mark.fidelity(
    source="SAELens",
    says="a layer of a cross-layer transcoder",
    obeyed="refused, with a better choice: SAELens adds up decoders that write to several layers",
)
@pytest.mark.parametrize(
    "spec",
    [
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3",
        "google/gemma-scope-2-1b-pt/clt/width_262k_l0_medium/params_layer_3",
    ],
)
def test_cross_layer_transcoders_by_name(spec: str) -> None:
    with pytest.raises(DictionaryError, match=r"is of a cross-layer transcoder, .*: choose a per-layer transcoder"):
        load_sae(spec)


def test_a_layer_that_saelens_loaded(models_by_kind: dict[str, Any], make_sae: Any) -> None:
    """SAELens keeps nothing of a release but its number at Neuronpedia."""
    layer = make_sae("transcoder", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out")
    layer.cfg.metadata.neuronpedia_id = "gemma-2-2b/1-clt-hp"
    with pytest.raises(DictionaryError, match=r"the transcoder at blocks\.1\.hook_resid_pre is of a cross-layer"):
        tlc.add_capacity_hooks(models_by_kind["HookedTransformer"], layer)


@pytest.mark.fidelity(
    source="circuit-tracer",
    says="a cross-layer transcoder",
    obeyed="refused, with a better choice: no one hook point shows what its features explain",
)
def test_cross_layer_transcoders_on_disk(tmp_path: Path) -> None:
    """Its encoder's and its decoder's file of each layer."""
    w = weights()
    (tmp_path / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    encoder = {f"{name}_1": w[name] for name in ("W_enc", "b_enc", "b_dec")}
    save_file(encoder, tmp_path / "W_enc_1.safetensors")
    save_file({"W_dec_1": random(FEATURES, 3, D, seed=3)}, tmp_path / "W_dec_1.safetensors")
    for spec in (tmp_path, tmp_path / "W_enc_1.safetensors", tmp_path / "W_dec_1.safetensors"):
        with pytest.raises(DictionaryError, match=r"is of a cross-layer transcoder, .*: choose a per-layer transcoder"):
            load_sae(str(spec))


@pytest.mark.fidelity(
    source="SAELens",
    says="`hook_head_index`",
    obeyed="an SAE of one attention head reads that head alone",
)
@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
def test_an_sae_of_one_head(models_by_kind: dict[str, Any], make_sae: Any, tokens: torch.Tensor, kind: str) -> None:
    hook, head, model = "blocks.1.attn.hook_z", 2, models_by_kind[kind]
    sae = make_sae("standard", hook, d_in=8)
    sae.cfg.metadata.hook_head_index = head
    z = heads_of(model, tokens)[:, :, head][tokens != BOS]
    with torch.no_grad():
        sae.W_enc *= 2 / z.norm(dim=1).mean()
        sae.b_enc.fill_(0)
    with tlc.add_capacity_hooks(model, sae, importance=["gradient"], fvu_every=1, mask_token_ids=[BOS]) as capacity:
        (found,) = capacity.run(tokens.split(8), progress=False).measurement()
    active = sae.encode(z).detach()
    assert 0 < (active != 0).float().mean() < 1
    assert abs(found.summary.arrays["counts"].sum(0) - (active != 0).sum(0).numpy(force=True)).max() <= 1
    fvu = (z - sae.decode(active)).square().sum() / (z - z.mean(0)).square().sum()
    assert found.summary.fvu.value == pytest.approx(float(fvu.detach()), rel=1e-3)
    assert found.importance("gradient").sum() > 0
    assert found.notes == (f"{hook}: the SAE's metadata says that it reads attention head 2 alone",)
    sae.cfg.metadata.hook_head_index = 7
    with (
        tlc.add_capacity_hooks(model, sae) as capacity,
        pytest.raises(tlc.errors.HookPointError, match=r"reads head 7 of blocks\.1\.attn\.hook_z, .* has 4 heads"),
    ):
        capacity.run(tokens, progress=False)


@pytest.mark.fidelity(
    source="SAELens",
    says="`reshape_activations: hook_z`",
    obeyed="the SAE gets the heads separately, in every form of the model",
)
@pytest.mark.parametrize("kind", ["TransformerBridge", "gpt_neox"])
def test_heads_that_the_sae_joins(
    models_by_kind: dict[str, Any], make_sae: Any, tokens: torch.Tensor, kind: str
) -> None:
    model, sae = models_by_kind[kind], make_sae("standard", "blocks.1.attn.hook_z", reshape_activations="hook_z")
    flat = make_sae("standard", "blocks.1.attn.hook_z")
    with tlc.add_capacity_hooks(model, sae, fvu_every=1, mask_token_ids=[BOS]) as capacity:
        (found,) = capacity.run(tokens.split(8), progress=False).measurement()
    z = heads_of(model, tokens)[tokens != BOS].flatten(1)
    active = flat.encode(z).detach()
    assert abs(found.summary.arrays["counts"].sum(0) - (active != 0).sum(0).numpy(force=True)).max() <= 1
    fvu = (z - flat.decode(active)).square().sum() / (z - z.mean(0)).square().sum()
    assert found.summary.fvu.value == pytest.approx(float(fvu.detach()), rel=1e-3)


def heads_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[row, position, head, d_head] from TransformerLens' cache, or from a hook of torch on transformers' module."""
    with torch.no_grad():
        if hasattr(model, "run_with_cache"):
            return model.run_with_cache(tokens)[1]["blocks.1.attn.hook_z"]
        kept: list[torch.Tensor] = []
        dense = model.gpt_neox.layers[1].attention.dense
        handle = dense.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        model(tokens)
        handle.remove()
        return kept[0].unflatten(-1, (4, 8))
