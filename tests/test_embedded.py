"""The embedded teacher, its SAEs and its texts: what the documentation says of them is measured again here, on fewer
tokens.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tl_capacity.hooks.embedded import FOLDER, LAYERS
from tl_capacity.recipes.splice import text_to_judge_on
from torch.nn import functional as F

from tl_capacity import Measurement, TokenStream, add_capacity_hooks
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.loading import load_model
from tl_capacity.text.streams import PADDING, documents

PUBLIC_DOMAIN = {"spurgeon", "henry", "web-bible", "austen"}


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_model("embedded")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    return measure(
        MeasureSettings(
            "embedded", tmp_path_factory.mktemp("embedded") / "m", tokens=40_000, fvu_every=2, progress=False
        )
    )


def test_in_a_session_it_goes_by_its_name(teacher: Any) -> None:
    """So that what is measured and what is distilled there are of one teacher, and no folder of
    this machine is kept.
    """
    assert teacher.model.name_or_path == teacher.model.config.name_or_path == "embedded"


def test_texts_are_public_domain_and_enough() -> None:
    texts = [
        json.loads(line)
        for split in ("measure", "heldout")
        for line in lzma.decompress((FOLDER / "texts" / f"{split}.jsonl.xz").read_bytes()).splitlines()
    ]
    characters, sources = sum(len(text["text"]) for text in texts), {text["source"] for text in texts}
    assert characters >= 1_500_000
    assert sources == PUBLIC_DOMAIN
    licences = (FOLDER / "LICENCES.md").read_text()
    assert all(f"`{source}`" in licences for source in sources)


def test_splits_share_no_document() -> None:
    measured, heldout = set(documents("embedded")), set(documents("embedded:heldout"))
    assert measured
    assert heldout
    assert not measured & heldout


@pytest.mark.parametrize(
    ("given", "measured", "judged_on"),
    [
        ("", "embedded", "embedded:heldout"),
        ("", "embedded:measure", "embedded:heldout"),
        ("", "embedded:heldout", "embedded:heldout"),
        ("", "some/texts", "some/texts"),
        ("mine.jsonl", "embedded", "mine.jsonl"),
    ],
)
def test_the_text_to_judge_on(given: str, measured: str, judged_on: str) -> None:
    assert text_to_judge_on(given, measured) == judged_on


def test_weights_are_small_float16_safetensors() -> None:
    weights = list((FOLDER / "model").glob("*.safetensors"))
    assert len(weights) == 1
    assert weights[0].stat().st_size <= 5_000_000
    assert not [p for p in FOLDER.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_architecture_is_pythias(teacher: Any) -> None:
    config = teacher.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (
        "gpt_neox",
        6,
        128,
        4,
    )
    assert config.vocab_size == 4096
    assert teacher.tokenizer.bos_token_id == 0


@pytest.mark.slow
def test_heldout_loss_is_the_recorded_one(teacher: Any) -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    losses: list[float] = []
    with torch.no_grad():
        for number, batch in enumerate(TokenStream("embedded:heldout", teacher.tokenizer, batch_rows=16)):
            ids = torch.from_numpy(np.where(batch.tokens == PADDING, 0, batch.tokens))
            logits = teacher.model(ids, use_cache=False).logits[:, :-1]
            counted = torch.from_numpy(batch.tokens[:, 1:] != PADDING)
            losses += F.cross_entropy(logits[counted], ids[:, 1:][counted], reduction="none").tolist()
            if number == 11:
                break
    # Rows here begin with a document, those of the record are cut from documents laid end to end, and these are a
    # sample: hence the tolerance.
    assert np.mean(losses) == pytest.approx(record["heldout_loss_nats_per_token"], abs=0.15)
    assert record["record"][-1]["heldout_loss"] < record["record"][0]["heldout_loss"] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_saes_are_sparse_and_explain_the_stream(measured: Measurement, layer: int) -> None:
    summary = measured[f"blocks.{layer}.hook_resid_post"].summary
    assert summary.d_sae >= 2048
    assert 10 <= summary.l0.value <= 40
    assert summary.explained_variance is not None
    assert summary.explained_variance.value >= 0.8
    recorded = json.loads((FOLDER / "saes" / f"layer{layer}" / "training.json").read_text())
    assert recorded["heldout"]["explained_variance"]["value"] == pytest.approx(
        summary.explained_variance.value, abs=0.06
    )


@pytest.mark.slow
def test_measuring_by_name_equals_measuring_a_bridge(measured: Measurement, teacher: Any) -> None:
    saes = {f"blocks.{layer}.hook_resid_post": load_sae(str(FOLDER / "saes" / f"layer{layer}"))[1] for layer in LAYERS}
    wrapped = load_model("embedded").bridge
    stream = TokenStream("embedded", teacher.tokenizer, measured.provenance.settings["context"])
    with add_capacity_hooks(wrapped, saes, mask_token_ids=measured.provenance.settings["masked_token_ids"]) as capacity:
        capacity.run(stream, max_tokens=4_000, progress=False)
        bridged = capacity.measurement()
    with add_capacity_hooks(
        teacher.model, saes, mask_token_ids=measured.provenance.settings["masked_token_ids"]
    ) as capacity:
        capacity.run(stream, max_tokens=4_000, progress=False)
        direct = capacity.measurement()
    for mine, theirs in zip(bridged, direct, strict=True):
        # The two forward passes differ in rounding, which turns a latent on or off at its threshold now and then.
        ours, others = mine.summary.arrays["counts"].sum(0), theirs.summary.arrays["counts"].sum(0)
        assert np.abs(ours - others).sum() <= 1e-3 * others.sum()
        assert mine.summary.critical_width.value == pytest.approx(theirs.summary.critical_width.value, rel=1e-3)


def test_records_name_command_seed_and_cost() -> None:
    for path in [FOLDER / "training.json", *(FOLDER / "saes" / f"layer{layer}" / "training.json" for layer in LAYERS)]:
        record = json.loads(Path(path).read_text())
        assert record["seconds"] > 0
        assert "versions" in record
