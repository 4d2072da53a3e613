"""Every recipe on a model with fewer positions, layers and dimensions than the embedded teacher, of which no option
tells.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tl_capacity.recipes.pythia_floor import PRESETS, PythiaFloorConfig
from tl_capacity.recipes.pythia_floor import main as pythia_floor
from tl_capacity.recipes.sae_config import TrainSAEConfig

import tl_capacity as tlc
from tl_capacity import recipe
from tl_capacity.distillation import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.models.defaults import longest_row, middle_hook
from tl_capacity.models.loading import load_config

POSITIONS, WIDTH, LAYERS = 24, 24, 2
WIDTHS = (3, 4, 6, 9, 12, 18, 24)
"""An eighth of 24, and on to all of it; 4.5 is rounded to an even number."""


@pytest.fixture(scope="module")
def small(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 24 positions, two layers and width 24, an SAE that names its hook point, and longer texts."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=100,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_inner=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sae = StandardSAE(
        StandardSAEConfig(d_in=WIDTH, d_sae=48, metadata=SAEMetadata(hook_name="blocks.0.hook_resid_post"))
    )
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q  # a pair ±w for each direction reconstructs every activation
    sae.W_enc.data = torch.cat([basis, -basis], dim=1)
    sae.W_dec.data = sae.W_enc.data.T.contiguous()
    sae.save_model(folder / "sae")
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in draw.integers(1, 100, size=60)) for _ in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"text": text, "label": str(n % 2), "document": str(n)} for n, text in enumerate(texts)]
    (folder / "concept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(name: str, *options: object) -> Any:
    """A recipe, with these options."""
    return recipe.run(importlib.import_module(f"tl_capacity.recipes.{name}").main, list(map(str, options)))


@pytest.mark.usefixtures("unchecked")
def test_students(small: Path, tmp_path: Path) -> None:
    made = run("distill", "--teacher", small / "model", "--source", small / "text.jsonl", "--tokens", 400,
               "--evaluations", 1, "--heldout-tokens", 100, "--out", tmp_path / "students")  # fmt: skip
    assert [student.width for student in made] == list(WIDTHS)
    assert made.settings == DistillationRun.load(tmp_path / "students").settings


@pytest.mark.usefixtures("unchecked")
def test_the_papers_experiment(small: Path, tmp_path: Path) -> None:
    teacher = load_config(str(small / "model"))
    for preset in PRESETS:
        fitted = PythiaFloorConfig(preset=preset).fitted(teacher)
        assert (fitted.context, fitted.widths) == (POSITIONS, WIDTHS)
    with pytest.raises(CapacityError, match=rf"--context 25 is longer than the model's {POSITIONS} positions"):
        run("pythia_floor", "--teacher", small / "model", "--context", 25, "--out", tmp_path)
    assert callable(pythia_floor)
    embedded = PythiaFloorConfig(preset="full").fitted(load_config("embedded"))
    assert (embedded.context, embedded.widths) == (256, (16, 24, 32, 48, 64, 96, 128)), "as it was for this one"


@pytest.mark.usefixtures("unchecked")
def test_an_sae(small: Path, tmp_path: Path) -> None:
    run("train_sae", "--model", small / "model", "--source", small / "text.jsonl", "--tokens", 256,
        "--batch-tokens", 64, "--heldout-tokens", 50, "--d-sae", 32,
        "--k", 4, "--checkpoints", 0, "--out", tmp_path / "sae")  # fmt: skip
    settings = json.loads((tmp_path / "sae" / "training.json").read_text())["settings"]
    assert (settings["hook"], settings["context"]) == ("blocks.1.hook_resid_post", POSITIONS)
    embedded = TrainSAEConfig().fitted(load_config("embedded"))
    assert (embedded.hook, embedded.context) == ("blocks.3.hook_resid_post", 256)


@pytest.mark.usefixtures("unchecked")
def test_probes(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", small / "model", "--concepts", small / "concept.jsonl", "--no-baselines", "--out", tmp_path]
    run("probe", *options)
    settings = json.loads((tmp_path / "probes.json").read_text())["settings"]
    assert settings["hook"] == "blocks.1.hook_resid_post"
    assert run("probe", *options) is None
    assert "already holds" in capsys.readouterr().out


@pytest.mark.usefixtures("unchecked")
def test_importances_are_checked_at_the_saes_own_hook_point(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("check_importance", "--model", small / "model", "--sae", small / "sae", "--source", small / "text.jsonl",
        "--rows", 6, "--latents", 12, "--importance", "second_moment", "--out", tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "check_importance.json").read_text())
    assert found["settings"]["hook"] == "blocks.0.hook_resid_post"
    assert found["tokens"] == 6 * (POSITIONS - 1)


def test_a_width_that_is_given_twice_counts_once(small: Path) -> None:
    from tl_capacity.cli.shared import widths_in
    from tl_capacity.predict.curve import Curve

    assert widths_in("16,8,16") == (16, 8)
    curve = Curve("layer 1", np.arange(1.0, 9.0), 0.9)
    assert [floor.width for floor in curve.floors([2, 4, 2])] == [2, 4]
    fitted = PythiaFloorConfig(widths=(8, 8, 12)).fitted(load_config(str(small / "model")))
    assert fitted.widths == (8, 12)


def test_a_model_of_text_and_images_is_one_sentence(tokenizer: Any) -> None:
    """Its configuration holds that of its text; it has no width of its own."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from tl_capacity.distillation import distill

    text = {
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "max_position_embeddings": 20,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 4,
        "patch_size": 2,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    says = "'gemma3' is more than a text model: pass its text part alone, saved as 'gemma3_text'"
    with pytest.raises(CapacityError, match=says):
        distill(model, [8], torch.ones(20, 9, dtype=torch.int64))
    with pytest.raises(CapacityError, match=says):
        PythiaFloorConfig().fitted(model.config)
    assert (longest_row(model.config), middle_hook(model.config)) == (20, "blocks.0.hook_resid_post")


def test_a_stream_of_a_session_that_is_too_long_is_one_sentence(small: Path) -> None:
    """Learned positions ended in an IndexError inside the model."""
    loaded = tlc.load_model(str(small / "model"))
    _, sae = tlc.load_sae(str(small / "sae"))
    stream = tlc.TokenStream(str(small / "text.jsonl"), loaded.tokenizer)
    with tlc.add_capacity_hooks(loaded.model, sae) as capacity:
        with pytest.raises(
            CapacityError, match=rf"rows have 61 positions, more than the model's {POSITIONS}: .*context"
        ):
            capacity.run(stream)
        fitting = tlc.TokenStream(str(small / "text.jsonl"), loaded.tokenizer, context=POSITIONS)
        assert capacity.run(fitting, max_tokens=50).n_tokens >= 50
