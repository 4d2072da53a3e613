"""The whole experiment as one recipe, on a tiny teacher: its stages are kept, and what it writes fits together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tl_capacity.recipes.pythia_floor import IMPORTANCES, PRESETS, PythiaFloorConfig, main, probe, train

from tl_capacity import recipe
from tl_capacity.distillation import DistillationRun, observed_floors
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import load_model

pytestmark = pytest.mark.usefixtures("few_replicates")

HOOK = "blocks.1.hook_resid_post"
WIDTHS = (4, 8, 12, 16, 24)


@pytest.fixture(scope="module")
def setup(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, an SAE that fits it, and text, on disk."""
    folder = tmp_path_factory.mktemp("pythia_floor")
    make_model("gpt_neox").save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, metadata=SAEMetadata(hook_name=HOOK)))
    basis = torch.linalg.qr(torch.randn(32, 32)).Q  # a pair ±w for each direction reconstructs every activation
    sae.W_enc.data = torch.cat([basis, -basis], dim=1)
    sae.W_dec.data = sae.W_enc.data.T.contiguous()
    sae.b_enc.data.fill_(-0.01)
    sae.save_model(folder / "sae")
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.zipf(1.3, size=40) % 98 + 1) for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def options(setup: Path, out: Path, *more: str) -> list[str]:
    files = [
        "--teacher",
        str(setup / "teacher"),
        "--sae",
        str(setup / "sae"),
        "--source",
        str(setup / "text.jsonl"),
        "--out",
        str(out),
    ]
    sizes = [
        "--widths",
        ",".join(map(str, WIDTHS)),
        "--measure-tokens",
        "800",
        "--tokens",
        "1500",
        "--heldout-tokens",
        "200",
        "--evaluations",
        "10",
    ]
    return [*files, *sizes, "--batch-rows", "4", "--context", "16", *more]


@pytest.fixture(scope="module")
def finished(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    recipe.run(main, options(setup, out))
    return out


@pytest.mark.slow
def test_what_it_writes_fits_together(finished: Path) -> None:
    measurement, run = Measurement.load(finished / "measurement"), DistillationRun.load(finished / "distillation")
    assert run.widths == WIDTHS
    assert run["control"].heldout_kl[0] == pytest.approx(0, abs=1e-6)
    (hook,) = measurement
    for importance in IMPORTANCES:
        assert (hook.importance(importance) >= 0).all()
    floors = json.loads((finished / "floors.json").read_text())
    observed = {f.width: f for f in observed_floors(run) if f.start != "teacher"}
    predicted = {f.width: f.predicted_floor.value for f in measurement.floors(WIDTHS)}
    assert [f["width"] for f in floors] == list(WIDTHS)
    for floor in floors:
        width = floor["width"]
        assert (floor["observed_floor"], floor["observed_low"], floor["observed_high"]) == (
            observed[width].last_tenth,
            observed[width].last_tenth_low,
            observed[width].last_tenth_high,
        )
        assert floor["predicted_floor"] == predicted[width]
    decomposition = json.loads((finished / "decomposition.json").read_text())
    names = {candidate["name"] for candidate in decomposition["candidates"]}
    for importance in ("gradient", "fisher"):
        assert f"{importance}, compressed_sensing at {HOOK}, C = 1" in names
    assert decomposition["winner"] in (*names, None)
    assert [row["predicted_floor"] for row in json.loads((finished / "predicted.json").read_text())] == list(
        predicted.values()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_rerun_keeps_what_is_finished(setup: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [finished / "measurement" / "measurement.json", finished / "distillation" / "distillation.json"]
    before = [path.stat().st_mtime_ns for path in kept]
    floors = (finished / "floors.json").read_text()
    found = recipe.run(main, options(setup, finished, "--importance", "fisher"))  # another prediction of what is there
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert found.unit == "nats per token"
    assert f"fisher, compressed_sensing at {HOOK} predicts nats per token; C = " in capsys.readouterr().out.replace(
        "\n", " "
    )
    recipe.run(main, options(setup, finished))
    assert (finished / "floors.json").read_text() == floors


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_measurement_can_be_given(setup: Path, finished: Path, tmp_path: Path) -> None:
    recipe.run(main, options(setup, tmp_path, "--measurement", str(finished / "measurement")))
    assert not (tmp_path / "measurement").exists()
    assert json.loads((tmp_path / "floors.json").read_text()) == json.loads((finished / "floors.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_students_are_probed_where_concepts_are_named(setup: Path, finished: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = [
        {"text": " ".join(f"w{i}" for i in random.integers(1, 40 + 50 * (row % 2), size=9)), "label": row % 2}
        for row in range(60)
    ]
    concept = tmp_path / "words.jsonl"
    concept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.run(main, options(setup, finished, "--concepts", str(concept)))
    probes = json.loads((finished / "probes" / "probes.json").read_text())
    assert {row["width"] for row in probes["probes"] if row["kind"] == "trained"} == {*WIDTHS, 32}
    assert all(width is None or width >= 1 for sparse in probes["sparse"] for width in sparse["widths"])
    again = PythiaFloorConfig(out=finished, concepts=(str(concept),))
    probe(again, Measurement.load(finished / "measurement"))  # which leaves what is there
    with pytest.raises(CapacityError, match="pass the same --concepts"):
        probe(replace(again, concepts=("question",)), Measurement.load(finished / "measurement"))


def test_what_does_not_fit_is_refused(setup: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CapacityError,
        match=(
            r"holds a run with tokens 1500, but this one has 1600: pass the same settings, or choose another"
            r" --out"
        ),
    ):
        recipe.run(main, options(setup, finished, "--tokens", "1600"))
    with pytest.raises(CapacityError, match="'fast' is not a preset: choose one of quick, demo, full"):
        recipe.run(main, options(setup, tmp_path, "--preset", "fast"))
    with pytest.raises(CapacityError, match="no text to measure"):
        recipe.run(
            main,
            [
                "--teacher",
                str(setup / "teacher"),
                "--sae",
                str(setup / "sae"),
                "--widths",
                "8",
                "--out",
                str(tmp_path / "a"),
            ],
        )
    with pytest.raises(MeasurementError, match="is not a measurement"):
        recipe.run(main, options(setup, tmp_path / "b", "--measurement", str(tmp_path)))


@pytest.mark.usefixtures("unchecked")
def test_what_the_distillation_would_refuse_is_refused_before_the_measurement(setup: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="students of width 8 start alike with every seed"):
        recipe.run(main, options(setup, tmp_path / "a", "--seeds", "0,1,2"))
    with pytest.raises(CapacityError, match="cannot build a student of width 17"):
        recipe.run(main, options(setup, tmp_path / "a", "--widths", "16,17"))
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("unchecked")
def test_damaged_files_are_refused(setup: Path, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    config = PythiaFloorConfig(out=run, concepts=("question",))
    (run / "probes").mkdir(exist_ok=True)
    for content, said in (
        ("{", "truncated or was altered"),
        ("[1]", "truncated or was altered"),
        ("{}", "does not say what was probed for"),
    ):
        (run / "probes" / "probes.json").write_text(content)
        with pytest.raises(
            CapacityError,
            match=rf"probes\.json (is )?{said}.*: delete its folder, or choose another --out",
        ):
            probe(config, Measurement.load(run / "measurement"))
    for content in ("{", "[1]"):
        (run / "settings.json").write_text(content)
        with pytest.raises(
            CapacityError,
            match=(
                r"settings\.json is truncated or was altered .*: delete its folder, or choose another"
                r" --out"
            ),
        ):
            recipe.run(main, options(setup, run))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_another_teacher_at_the_same_place_is_noticed(
    setup: Path, tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    mine = shutil.copytree(setup, tmp_path / "mine")
    run = tmp_path / "run"
    recipe.run(main, options(mine, run))
    make_model("gpt_neox", seed=5).save_pretrained(mine / "teacher")
    with pytest.raises(CapacityError, match=r"the measurement was made with revision '\w+', and this run has '\w+'"):
        recipe.run(main, options(mine, run))
    with pytest.raises(
        CapacityError,
        match=r"teacher' is now \w+, but was \w+ when it was measured: get that revision, or",
    ):
        recipe.run(main, options(mine, tmp_path / "given", "--measurement", str(run / "measurement")))
    with pytest.raises(
        CapacityError,
        match=r"holds students of another teacher than .* is now: put its weights back, or choose another --out",
    ):
        train(PythiaFloorConfig(teacher=str(mine / "teacher"), out=run), load_model(str(mine / "teacher")))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_papers_own_dictionaries(setup: Path, tmp_path: Path) -> None:
    """A file of the paper's training script takes the place of the same weights in SAELens' folder."""
    sae = SAE.load_from_disk(setup / "sae")
    state = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T.contiguous(),
        "decoder.bias": sae.b_dec,
        "b_pre": torch.zeros_like(sae.b_dec),
    }
    weights = {name: value.detach() for name, value in state.items()}
    torch.save({"model_state": weights, "config": {"d_sae": 64, "expansion": 2}}, tmp_path / "sae_layer01_final.pt")
    predicted = {}
    for name, path in (("theirs", tmp_path / "sae_layer01_final.pt"), ("saelens", setup / "sae")):
        given = [str(path) if option == str(setup / "sae") else option for option in options(setup, tmp_path / name)]
        decomposition = recipe.run(main, given)
        assert decomposition is not None
        predicted[name] = json.loads((tmp_path / name / "floors.json").read_text())
    for mine, theirs in zip(*predicted.values(), strict=True):
        assert mine["width"] == theirs["width"]
        for figure in ("predicted_floor", "observed_floor"):
            assert mine[figure] == pytest.approx(theirs[figure], rel=1e-4)


def test_presets_decide_the_same_things() -> None:
    quick, demo, full = (PRESETS[name] for name in ("quick", "demo", "full"))
    assert quick.keys() == demo.keys() == full.keys()
    assert full["tokens"] >= 20_000_000


def test_probing_a_revision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="--concepts probes the teacher's main revision, not 'step3000'"):
        main(PythiaFloorConfig(out=tmp_path, concepts=("embedded",), revision="step3000"))
