"""The command line: the main job from files on disk, published curves, and one clear sentence for every bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import HOOK, Cli, arguments
from measurements import measurement_of_counts

from tl_capacity import Measurement
from tl_capacity.cli.measuring import some_narrower

pytestmark = pytest.mark.usefixtures("few_replicates")


def test_measure_then_budget_then_floor(cli: Cli, setup: Path, tmp_path: Path) -> None:
    code, out, _ = cli(*arguments(setup, tmp_path / "m", "--sae", setup / "sae0", "--widths", "4,8"))
    assert code == 0
    assert HOOK in out
    assert "blocks.0.hook_resid_post" in out
    measurement = Measurement.load(tmp_path / "m")
    assert measurement.complete
    assert measurement.hooks[0].summary.n_tokens >= 3000
    assert measurement.provenance.model == str(setup / "model")
    code, out, _ = cli("floor", tmp_path / "m", "--widths", "4,8,400", "--json", "--hook", HOOK)
    assert code == 0
    floors = json.loads(out)
    assert [f["width"] for f in floors] == [4, 8, 400]
    summary = measurement[HOOK].summary
    alive = int(summary.n_alive.value)
    for f in floors:
        assert f["features_kept"] == min(int(f["width"] * summary.capacity.value), alive)
        assert f["features_kept"] + f["features_lost"] == alive
        importance = np.sort(measurement[HOOK].importance())[::-1]
        assert f["predicted_floor"] == pytest.approx(importance[f["features_kept"] :].sum(), rel=1e-9)
        assert f["predicted_low"] <= f["predicted_floor"] <= f["predicted_high"]
    assert floors[2]["predicted_floor"] == 0
    code, out, _ = cli("plan", tmp_path / "m", "--keep", "0.9", "--json", "--hook", HOOK)
    assert code == 0
    for notes in (floors[0]["notes"], json.loads(out)["notes"]):
        assert any(note.startswith(f"{HOOK}: ") for note in notes)
        assert not [note for note in notes if "blocks.0" in note], "notes are on the hook point that was asked for"
    code, out, _ = cli("budget", tmp_path / "m", "--json")
    row = json.loads(out)[0]
    assert row["d*"]["value"] == pytest.approx(summary.l0.value * np.log(alive / summary.l0.value), rel=1e-9)


def test_the_next_command_names_widths_narrower_than_the_model() -> None:
    measurement = measurement_of_counts(np.full(64, 640))
    assert measurement.hooks[0].width == 16
    assert some_narrower(measurement) == "4,8,12"


@pytest.mark.parametrize(
    ("sae", "more", "message"),
    [
        ("scaled", [], f"the SAE at {HOOK} has other weights than the one measured before"),
        ("sae0", [], "the earlier run measured"),
        ("sae", ["--importance", "gradient"], "the earlier run measured"),
        ("sae", ["--dtype", "float64"], "the measurement was made with dtype 'float32', and this run has 'float64'"),
        ("sae", ["--context", 16], "the measurement was made with settings"),
        ("sae", ["--shard", "1/2"], "the measurement was made with shards (0,), and this run has (1,)"),
        (
            "sae",
            ["--alive-threshold", 1e-3],
            "the measurement was made with an alive threshold of 1e-05, and this run has 0.001",
        ),
    ],
)
def test_a_finished_measurement_is_not_taken_for_another(
    cli: Cli, setup: Path, tmp_path_factory: pytest.TempPathFactory, sae: str, more: list[object], message: str
) -> None:
    out = tmp_path_factory.getbasetemp() / "finished"
    if not out.exists():
        assert cli(*arguments(setup, out))[0] == 0
    before = (out / "measurement.json").read_bytes()
    code, _, err = cli(*arguments(setup, out, "--resume", *more, sae=sae))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert (out / "measurement.json").read_bytes() == before


def test_a_measurement_that_was_killed_after_its_last_write_is_tidied(cli: Cli, setup: Path, tmp_path: Path) -> None:
    """The record is in place, and the checkpoint before it has not gone yet."""
    out = tmp_path / "out"
    assert cli(*arguments(setup, out))[0] == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "measurement.previous.json").write_bytes(whole["measurement.json"])
    (out / "statistics-0123456789abcdef.safetensors").write_bytes(b"of an earlier checkpoint")
    assert cli(*arguments(setup, out, "--resume"))[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_finished_measurement_with_fewer_tokens_says_so(
    cli: Cli, setup: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cli(*arguments(setup, tmp_path / "m"))[0] == 0
    assert cli(*arguments(setup, tmp_path / "m", "--resume"))[0] == 0
    assert not caplog.records
    assert cli(*arguments(setup, tmp_path / "m", "--resume", tokens=9_000))[0] == 0
    assert "fewer than the 9,000 asked for now" in caplog.text


def test_an_sae_of_another_model_is_warned_of(
    cli: Cli, setup: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((setup / "sae" / "cfg.json").read_text())
    for name, warned in (("other/gpt2", True), (f"user/{setup.name}-model", False)):
        shutil.copytree(setup / "sae", tmp_path / name)
        content["metadata"]["model_name"] = name
        (tmp_path / name / "cfg.json").write_text(json.dumps(content))
        caplog.clear()
        assert cli(*arguments(setup, tmp_path / f"of-{warned}", sae=str(tmp_path / name)))[0] == 0
        assert ("was trained on 'other/gpt2'" in caplog.text) == warned


def test_floor_of_the_published_curve(cli: Cli, published_curve: Path) -> None:
    code, out, _ = cli("floor", published_curve, "--widths", "128,256,384,512,768,1024", "--json")
    assert code == 0
    printed = {128: "0.07949", 256: "0.04004", 384: "0.02166", 512: "0.01109", 768: "0.00159", 1024: "0.0000686"}
    kept = {128: 3446, 256: 6892, 384: 10338, 512: 13784, 768: 20676, 1024: 27568}
    for f in json.loads(out):
        digits = len(printed[f["width"]].split(".")[1])
        assert f"{f['predicted_floor']:.{digits}f}" == printed[f["width"]]
        assert f["features_kept"] == kept[f["width"]]


def test_a_floor_above_a_thousand_has_separators(cli: Cli, tmp_path: Path) -> None:
    """As counts have. In JSON it stays a number."""
    (tmp_path / "curve.json").write_text(
        json.dumps({"sorted_importance": [100.0] * 2048, "alpha": 0.9, "d_model": 800})
    )
    asked = ("floor", tmp_path / "curve.json", "--widths", "400", "--law", "proportional")
    (floor,) = json.loads(cli(*asked, "--json")[1])
    assert floor["predicted_floor"] == 100.0 * floor["features_lost"] > 100_000
    assert f"{floor['predicted_floor']:,.0f}" in cli(*asked)[1]


@pytest.mark.slow
def test_shards_merge_to_the_whole(cli: Cli, setup: Path, tmp_path: Path) -> None:
    everything = 10**6
    cli(*arguments(setup, tmp_path / "whole", tokens=everything))
    for i in range(3):
        assert cli(*arguments(setup, tmp_path / f"part{i}", "--shard", f"{i}/3", tokens=everything))[0] == 0
    code, _, err = cli("merge", *(tmp_path / f"part{i}" for i in (2, 0, 1)), "--out", tmp_path / "joined")
    assert (code, err) == (0, "")
    whole, joined = (
        Measurement.load(tmp_path / "whole").hooks[0].summary,
        Measurement.load(tmp_path / "joined").hooks[0].summary,
    )
    np.testing.assert_array_equal(whole.arrays["counts"], joined.arrays["counts"])
    np.testing.assert_allclose(
        whole.arrays["squares"], joined.arrays["squares"], rtol=1e-6
    )  # float32 activations depend on the batch they are in
    code, _, err = cli("merge", tmp_path / "part0", tmp_path / "part0", "--out", tmp_path / "twice")
    assert code == 2
    assert "twice" in err


BAD_INPUT = [
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--tokens", "0"], "--tokens 0"),
    (["--sae", "SETUP/wide", "--source", "SETUP/text.jsonl"], "d_in is 48"),
    (
        ["--sae", "blocks.9.hook_resid_post=SETUP/sae", "--source", "SETUP/text.jsonl"],
        "did you mean blocks.[012].hook_resid_post",
    ),
    (["--sae", "SETUP/nothing", "--source", "SETUP/text.jsonl"], "nothing"),
    (["--source", "SETUP/text.jsonl"], "no SAE was given"),
    (["--sae", "SETUP/sae"], "no text to measure"),
    (["--sae", "SETUP/sae", "--source", "SETUP/missing.txt"], "there is no file"),
    (["--sae", "SETUP/sae", "--source", "SETUP/empty.txt"], "is empty"),
    (["--sae", "SETUP/sae", "--source", "SETUP/binary.txt"], "binary|cannot be read"),
    (["--sae", "SETUP/sae", "--source", "SETUP/table.csv"], "no token source knows"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--shard", "4/4"], "shard 4 of 4"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--shard", "x"], "INDEX/OF"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--context", "4096"], "longer than the model's 32"),
    (
        ["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--importance", "second_momen"],
        "did you mean 'second_moment'",
    ),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--widths", "8,x"], "--widths"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--alive-threshold", "2"], "alive_threshold"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--max-fvu", "1e-9"], "wrong hook or wrong model"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--max-fvu", "nan"], "refuses nothing"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--fvu-every", "0"], "--fvu-every 0 is not possible"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--skip-first-positions", "-1"], "give at least 0"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--checkpoint-seconds", "nan"], "give at least 0"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--batch-rows", "1" * 30], "--batch-rows has 30 digits"),
    (["--sae", "SETUP/sae", "--source", "SETUP/text.jsonl", "--widths", "8" * 400], "a width of 400 digits"),
    (
        ["--sae", "ln_final.hook_normalised=SETUP/sae", "--source", "SETUP/text.jsonl"],
        "'ln_final.hook_normalised' is not a hook point.*ln_final.hook_normalized",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_writes_nothing(
    cli: Cli, setup: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (setup / "empty.txt").write_text("")
    (setup / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (setup / "table.csv").write_text("text\nhello\n")
    given = [option.replace("SETUP", str(setup)) for option in options]
    code, out, err = cli("measure", "--model", setup / "model", "--out", tmp_path / "out", *given)
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in err
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "measurement.json").exists()


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        (["floor", "TMP/curve.json", "--widths", "0"], "width below 1"),
        (["floor", "TMP/curve.json", "--widths", ""], "no width"),
        (
            ["floor", "TMP/curve.json", "--widths", "8", "--law", "compresed_sensing"],
            "did you mean 'compressed_sensing'",
        ),
        (["floor", "TMP/none.json", "--widths", "8"], "cannot be read"),
        (["floor", "TMP", "--widths", "8"], "no measurement"),
        (["floor", "TMP/bad.json", "--widths", "8"], "not an importance curve"),
        (
            ["floor", "TMP/negative.json", "--widths", "8"],
            "curve (importance = -2 is outside its domain",
        ),
        (["floor", "TMP/dense.json", "--widths", "8"], "curve (alpha = 1.5 is outside its domain"),
        (["floor", "TMP/short.json", "--widths", "8"], "truncated or altered"),
        (["budget", "TMP"], "no measurement"),
        (["run", "no-such-recipe"], "no recipe named"),
        (["--plugin", "TMP/none.py", "plugins"], "no plugin file"),
    ],
)
def test_other_commands_refuse_in_one_sentence(cli: Cli, tmp_path: Path, arguments_: list[str], message: str) -> None:
    (tmp_path / "curve.json").write_text('{"sorted_importance": [1.0, 0.5], "alpha": 0.9}')
    (tmp_path / "bad.json").write_text('{"sorted_importance": ["x"], "alpha": 0.9}')
    (tmp_path / "negative.json").write_text('{"sorted_importance": [1.0, -2.0], "alpha": 0.9}')
    (tmp_path / "dense.json").write_text('{"sorted_importance": [1.0], "alpha": 1.5}')
    (tmp_path / "short.json").write_text('{"sorted_importance": [1.0], "alpha": 0.9, "F_alive": 2}')
    code, _, err = cli(*(a.replace("TMP", str(tmp_path)) for a in arguments_))
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_command_is_a_usage_error(cli: Cli) -> None:
    code, _, err = cli("frobnicate")
    assert code == 2
    assert "No such command" in err


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, tl_capacity.cli as c\ntry:\n c.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'sae_lens', 'transformer_lens'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_import_does_not_import_saelens_or_reach_for_the_network() -> None:
    code = (
        "import socket, sys\ndef refuse(*a, **k): raise AssertionError('network at import')\nsocket.socket.connect ="
        " refuse\nimport tl_capacity\nfrom tl_capacity import add_capacity_hooks\nassert 'sae_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hooks_lists_names(cli: Cli, setup: Path) -> None:
    code, out, _ = cli("hooks", "--model", setup / "model", "--matching", "resid_post")
    assert code == 0
    assert HOOK in out.split()


def test_a_measurement_is_read_and_predicted_from_without_torch() -> None:
    code = (
        "import sys; import tl_capacity.measurement, tl_capacity.predict.budget, tl_capacity.predict.curve\n"
        "import tl_capacity.distillation.decomposition, tl_capacity.plan\n"
        "assert not {'torch', 'transformers', 'plotly', 'sae_lens', 'transformer_lens'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
