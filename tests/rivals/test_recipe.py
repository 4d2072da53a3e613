"""`tl-capacity run rivals`: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import HOOK, Cli, arguments
from safetensors import safe_open

from tl_capacity.models.loading import load_model
from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.rivals import rank_bound
from tl_capacity.rivals.bound import BoundSettings
from tl_capacity.text.streams import TokenStream

BOUND = "rank_bound.checkpoint.safetensors"


@pytest.fixture(scope="module")
def measured(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tl_capacity.cli import main

    out = tmp_path_factory.mktemp("rivals") / "m"
    with pytest.raises(SystemExit, match="0"):
        main([str(word) for word in arguments(setup, out)])
    return out


def command(measured: Path, out: Path, *more: object) -> list[object]:
    return ["run", "rivals", measured, "--tokens", 900, "--fit-tokens", 900, "--iterations", 5, "--out", out, *more]


@pytest.mark.slow
def test_it_writes_what_the_predictors_say(cli: Cli, setup: Path, measured: Path, tmp_path: Path) -> None:
    code, out, err = cli(*command(measured, tmp_path / "r", "--widths", "4,8", "--every-layer"))
    assert code == 0, err
    assert "written to" in out
    assert "is not certified" in " ".join(out.split())
    forecasts = Forecasts.load(tmp_path / "r")
    everywhere = "blocks.*.hook_resid_post"
    series = {(predictor, hook) for predictor, hook, *_ in forecasts.series}
    assert series == {
        ("rank_bound", ""),
        ("truncated_start", ""),
        ("pca_splice", HOOK),
        ("pca_tail", HOOK),
        ("pca_splice", everywhere),
    }
    floors = {name: forecasts.floors(*name) for name in series}
    for width in (4, 8):
        one, all_of_them = floors["pca_splice", HOOK][width], floors["pca_splice", everywhere][width]
        assert floors["rank_bound", ""][width].value < one.value < all_of_them.value
        assert one.low < one.value < one.high
    assert {record.unit for record in forecasts} == {"nats per token", "activation²"}
    teacher = load_model(str(setup / "model"))
    stream = TokenStream(str(setup / "text.jsonl"), teacher.tokenizer, context=32)
    by_hand = rank_bound(teacher.model, stream, [4, 8], BoundSettings(5), max_tokens=900, progress=False)
    assert by_hand.floors("rank_bound") == floors["rank_bound", ""]
    assert forecasts.about["tokens"] == by_hand.about["tokens"]
    assert not list((tmp_path / "r").glob("*.checkpoint.*"))
    # A run that was killed once its forecasts were written leaves this.
    (tmp_path / "r" / "rank_bound.checkpoint.safetensors").write_bytes(b"the state")
    code, out, _ = cli(*command(measured, tmp_path / "r", "--widths", "4,8", "--every-layer"))
    assert code == 0
    assert not list((tmp_path / "r").glob("*.checkpoint.*"))
    assert "already holds a forecasts.json of these settings" in out
    code, _, err = cli(*command(measured, tmp_path / "r", "--widths", "4"))
    assert code == 2
    assert "of other settings" in err


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(cli: Cli, setup: Path, measured: Path, tmp_path: Path) -> None:
    """What stops it is a file of another run in the place where the last predictor keeps its state."""
    words, stopped, whole = ("--widths", "4,8"), tmp_path / "stopped", tmp_path / "whole"
    other = load_model(str(setup / "model")).model
    stopped.mkdir()
    rank_bound(
        other, torch.ones(2, 9, dtype=torch.int64), [3], BoundSettings(1), checkpoint=stopped / BOUND, progress=False
    )
    code, _, err = cli(*command(measured, stopped, *words))
    assert code == 2
    assert "belongs to other settings" in err
    assert not (stopped / "forecasts.json").exists()
    with safe_open(stopped / "parts.checkpoint.safetensors", "np") as file:
        kept = file.metadata()["about"]
    (stopped / BOUND).unlink()
    assert cli(*command(measured, stopped, *words))[0] == 0
    assert cli(*command(measured, whole, *words))[0] == 0
    once, again = Forecasts.load(whole), Forecasts.load(stopped)
    assert again.records == once.records
    for name in ("truncated_start", "pca_splice"):
        assert str(again.about["parts"][name]["seconds"]) in kept, "it was not computed again"
    shutil.rmtree(stopped)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--widths", "4", "--predictors", "rank_bound,guess"], "'guess' is not computed here"),
        ([], "there is no width to compute floors for"),
        (["--widths", "0"], "width 0 is not a student width"),
        (["--widths", "7"], "cannot build a student of width 7"),
        (["--widths", "4", "--hook", "blocks.7.hook_resid_post"], "blocks.7.hook_resid_post"),
        (["--widths", "4", "--tokens", "0"], "0 tokens are too few"),
        (["--widths", "4", "--tolerance", "2"], "tolerance = 2 is not a share"),
        (["--widths", "4", "--source", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_refusals(cli: Cli, measured: Path, tmp_path: Path, words: list[str], says: str) -> None:
    code, _, err = cli(*command(measured, tmp_path / "r", *words))
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "r" / "forecasts.json").exists()


@pytest.mark.slow
def test_a_hook_point_that_was_not_measured(cli: Cli, measured: Path, tmp_path: Path) -> None:
    """One that only a bridge has, which leaves the teacher of the others as it was."""
    hook = "blocks.1.mlp.hook_pre"
    words = ("--widths", "4", "--hook", hook, "--predictors", "pca_splice,truncated_start")
    code, _, err = cli(*command(measured, tmp_path / "r", *words))
    assert code == 0, err
    forecasts = Forecasts.load(tmp_path / "r")
    assert set(forecasts.floors("pca_splice", hook)) == {4}
    assert forecasts.floors("truncated_start")[4].value > 0


def test_too_few_documents_for_an_interval_is_said(cli: Cli, measured: Path, tmp_path: Path) -> None:
    words = ("--widths", "4", "--tokens", 20, "--predictors", "pca_splice")
    assert cli(*command(measured, tmp_path / "r", *words))[0] == 0
    forecasts = Forecasts.load(tmp_path / "r")
    assert forecasts.floors("pca_splice", HOOK)[4].low is None
    assert any("too few documents for an interval" in note for note in forecasts.notes)
