"""Several processes of one launch measure what one process does: counts exactly, moments to rounding; and they refuse
what does not fit together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import HOOK, Cli, alone, arguments, concept_of, launch, same, students_of
from safetensors.numpy import load_file

from tl_capacity import Measurement
from tl_capacity.measure.distributed import share
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.predict.spliced import Spliced
from tl_capacity.runtime.processes import Processes, is_first

EVERYTHING = 10**6
pytestmark = pytest.mark.cpu_only("processes of one machine, without a GPU for each")


def equal(one: Path, other: Path) -> None:
    """Counts exactly, moments to 1e-12; the number of padding places depends on which rows share a batch."""
    a, b = (Measurement.load(folder)[HOOK].summary.arrays for folder in (one, other))
    for name, array in a.items():
        if array.dtype.kind == "i":
            skip = int(name == "masked")
            np.testing.assert_array_equal(array[skip:], b[name][skip:], err_msg=name)
        else:
            np.testing.assert_allclose(array, b[name], rtol=1e-12, atol=1e-12 * np.abs(array).max(), err_msg=name)


@pytest.fixture(scope="module")
def whole(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement of everything by one process, in float64, so that rounding in the model decides nothing."""
    out = tmp_path_factory.mktemp("together") / "whole"
    alone(arguments(setup, out, "--dtype", "float64", tokens=EVERYTHING))
    return out


def test_two_processes_measure_what_one_does(setup: Path, whole: Path, tmp_path: Path) -> None:
    command = arguments(setup, tmp_path / "both", "--dtype", "float64", tokens=EVERYTHING)
    assert launch([command, command]) == [0, 0]
    equal(whole, tmp_path / "both")
    both, one = Measurement.load(tmp_path / "both").provenance, Measurement.load(whole).provenance
    assert (both.shards, both.shard_count, both.cursor, both.settings) == (
        one.shards,
        one.shard_count,
        one.cursor,
        one.settings,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["both"]  # the processes' own folders are gone
    before = (tmp_path / "both" / "measurement.json").read_bytes()
    assert set(launch([command, command])) == {2}  # there is a measurement already
    assert launch([[*command, "--resume"]] * 2) == [0, 0]
    assert (tmp_path / "both" / "measurement.json").read_bytes() == before


@pytest.mark.slow
def test_a_process_that_dies(setup: Path, tmp_path: Path) -> None:
    """The launcher ends the other one too; what both had saved stays, and the same launch goes on from it, to the same
    last bit as one that nobody killed.
    """
    command = arguments(
        setup, tmp_path / "both", "--dtype", "float64", "--checkpoint-seconds", 0, "--resume", tokens=EVERYTHING
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tl_capacity",
        *map(str, command),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    folders = [tmp_path / f"both.process-{index}-of-2" for index in range(2)]
    with subprocess.Popen(torchrun, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        while not all((folder / "measurement.json").exists() for folder in folders) and launcher.poll() is None:
            time.sleep(0.001)
        victim = next(child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == "1")
        victim.kill()
        assert launcher.wait(120) != 0
    assert not (tmp_path / "both").exists()
    assert all(Measurement.load(folder).hooks[0].summary.n_tokens > 0 for folder in folders)
    assert not Measurement.load(folders[1]).complete
    assert subprocess.run(torchrun, env=environment, capture_output=True).returncode == 0
    undisturbed = arguments(setup, tmp_path / "undisturbed", "--dtype", "float64", tokens=EVERYTHING)
    assert launch([undisturbed, undisturbed]) == [0, 0]
    same(tmp_path / "both", tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "undisturbed"]


@pytest.mark.slow
def test_two_processes_recover_what_one_does(setup: Path, whole: Path, tmp_path: Path) -> None:
    """Batches are the same, so that activations are, to the last bit; sums are added in another order."""
    command = ["run", "recover", whole, students_of(setup), "--tokens", 12_000, "--tau", 0.8, "--out"]
    alone([*command, tmp_path / "one"])
    assert launch([[*command, tmp_path / "two"]] * 2) == [0, 0]
    one, two = (json.loads((tmp_path / name / "recoverability.json").read_text()) for name in ("one", "two"))
    assert [row["width"] for row in two] == [8, 16]
    assert one[0]["kept_teacher"] > one[0]["kept"] > 0
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            if name not in ("intervals", "readouts"):
                assert value == b[name], name
        for name, interval in a["intervals"].items():
            assert interval == pytest.approx(b["intervals"][name], abs=2), name
    figures = [load_file(tmp_path / name / f"features-{HOOK}.safetensors") for name in ("one", "two")]
    assert figures[0].keys() == figures[1].keys()
    for name, array in figures[0].items():
        if array.dtype.kind in "ib":
            np.testing.assert_array_equal(array, figures[1][name], err_msg=name)
        else:  # scores are float32, and one on the edge of a bin may fall to the other side
            np.testing.assert_allclose(array, figures[1][name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_splice_what_one_does(setup: Path, whole: Path, tmp_path: Path) -> None:
    """Batches are the same; sums are added in another order. The text is that of one process, up to `--tokens`."""
    command = ["run", "splice", whole, "--widths", "8,16", "--kept", "0,20", "--tokens", 2_000, "--out"]
    alone([*command, tmp_path / "one"])
    assert launch([[*command, tmp_path / "two"]] * 2) == [0, 0]
    one, two = (Spliced.load(tmp_path / name) for name in ("one", "two"))
    assert one.about["tokens"] == two.about["tokens"] >= 2_000
    for mine, theirs in zip(one, two, strict=True):
        assert mine.kept == theirs.kept
        assert len(mine.kept) > 3
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_allclose(mine.kl, theirs.kl, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_two_processes_probe_what_one_does(setup: Path, tmp_path: Path) -> None:
    """A model is probed in one process or the other, and to the same last bit."""
    command = [
        "run",
        "probe",
        "--model",
        setup / "model",
        "--model",
        students_of(setup),
        "--hook",
        HOOK,
        "--concepts",
        concept_of(setup),
        "--sae",
        setup / "sae",
    ]
    alone([*command, "--out", tmp_path / "one"])
    assert launch([[*command, "--out", tmp_path / "two"]] * 2) == [0, 0]
    one, two = (json.loads((tmp_path / name / "probes.json").read_text()) for name in ("one", "two"))
    assert [row["width"] for row in one["probes"]] == [32] * 3 + [8] * 3 + [16] * 3
    assert (one["probes"], one["sparse"], one["concepts"]) == (two["probes"], two["sparse"], two["concepts"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_processes_that_do_not_fit_together(setup: Path, tmp_path: Path) -> None:
    commands = [
        arguments(setup, tmp_path / "both", "--skip-first-positions", skip, tokens=EVERYTHING) for skip in (0, 1)
    ]
    assert launch(commands) == [2, 2]
    assert not (tmp_path / "both").exists()


def test_the_shares_are_all_documents_once(tmp_path: Path) -> None:
    settings = MeasureSettings(model="x", out=tmp_path / "m", tokens=100, shard=(1, 2))
    shares = [share(settings, Processes(process, 3)) for process in range(3)]
    documents = [n for s in shares for n in range(60) if n % s.shard[1] == s.shard[0]]
    assert sorted(documents) == [n for n in range(60) if n % 2 == 1]
    assert [s.tokens for s in shares] == [34, 34, 34]
    assert len({s.out for s in shares}) == 3
    assert [s.progress for s in shares] == [True, False, False]


def test_alone_it_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_first()
    monkeypatch.setenv("RANK", "1")
    assert not is_first()


@pytest.fixture(scope="module")
def shards(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], list[Measurement]]:
    """Four shards, measured apart."""
    from tl_capacity.measure.job import measure

    folder, parts = tmp_path_factory.mktemp("shards"), []
    for index in range(4):
        settings = MeasureSettings(
            model=str(setup / "model"),
            saes=(str(setup / "sae"),),
            source=str(setup / "text.jsonl"),
            tokens=EVERYTHING,
            dtype="float64",
            shard=(index, 4),
            out=folder / str(index),
            progress=False,
        )
        parts.append(measure(settings))
    return lambda: list(parts)


@pytest.mark.slow
def test_shards_merge_in_any_order(shards: Callable[[], list[Measurement]], whole: Path, tmp_path: Path) -> None:
    for number, order in enumerate(permutations(range(4))):
        joined = Measurement.merge([shards()[i] for i in order])
        joined.save(tmp_path / str(number))
        equal(whole, tmp_path / str(number))
    pairs = [Measurement.merge(shards()[::2]), Measurement.merge(shards()[1::2])]
    Measurement.merge(pairs).save(tmp_path / "in_pairs")
    equal(whole, tmp_path / "in_pairs")


def test_a_shard_is_merged_once(shards: Callable[[], list[Measurement]], tmp_path: Path, cli: Cli) -> None:
    for index in (0, 2):
        shards()[index].save(tmp_path / str(index))
    code, _, err = cli("merge", tmp_path / "0", tmp_path / "2", tmp_path / "0", "--out", tmp_path / "joined")
    assert code == 2
    assert "shard 0 of 4 is given twice" in err
    assert not (tmp_path / "joined").exists()
    assert cli("merge", tmp_path / "0", tmp_path / "2", "--out", tmp_path / "joined")[0] == 0
    code, _, err = cli("merge", tmp_path / "joined", tmp_path / "2", "--out", tmp_path / "again")
    assert code == 2
    assert "shard 2 of 4 is given twice" in err
