"""A launch that lost processes goes on with another number of them, and counts what one undisturbed process counts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from commands import HOOK, Cli, alone, arguments, free_port, launch
from measurements import assert_same_sums

from tl_capacity import CapacityError, Measurement
from tl_capacity.measure.distributed import measure_together, share
from tl_capacity.measure.job import attached, measure
from tl_capacity.measure.launches import gather_up, leave_out, left_behind
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.folder import write_folder
from tl_capacity.runtime.processes import Processes

EVERYTHING = 10**6
pytestmark = [
    pytest.mark.usefixtures("few_replicates"),
    pytest.mark.cpu_only("processes of one machine, without a GPU for each"),
]


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def text(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of three rows each, so that batches end amid them."""
    path = tmp_path_factory.mktemp("texts") / "text.jsonl"
    path.write_text("".join((setup / "text.jsonl").read_text().splitlines(keepends=True)[:50]))
    return path


def settings_of(setup: Path, text: Path, out: Path, tokens: int = EVERYTHING) -> MeasureSettings:
    return MeasureSettings(
        model=str(setup / "model"),
        saes=(str(setup / "sae"), str(setup / "sae0")),
        source=str(text),
        tokens=tokens,
        dtype="float64",
        out=out,
        batch_rows=4,
        resume=True,
        progress=False,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(setup: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    return measure(settings_of(setup, text, tmp_path_factory.mktemp("whole") / "whole"))


def equal(one: Measurement, other: Measurement) -> None:
    """The same hook points with the same sums."""
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.hook, mine.linear, mine.notes) == (theirs.hook, theirs.linear, theirs.notes)
    assert_same_sums(one, other)


def killed_after(batches: int, settings: MeasureSettings, index: int, count: int) -> None:
    """What a process of a launch does until it is killed; without a batch it leaves no checkpoint."""
    left = gather_up(settings, count).left
    mine = share(settings, Processes(index, count), left)
    done = 0

    def after_batch(capacity: CapacityHooks) -> None:
        nonlocal done
        done += 1
        if done == batches:
            measurement, extra = capacity.checkpoint()
            write_folder(mine.out, measurement.to_json(), measurement.arrays() | extra, keep_previous=True)
            raise KilledError

    if batches:
        with attached(mine) as (capacity, stream):
            leave_out(capacity, stream, left)
            with pytest.raises(KilledError):
                capacity.run(stream, mine.tokens, progress=False, after_batch=after_batch)


@pytest.mark.parametrize(
    "launches",
    [
        [(0, 5)],
        pytest.param([(3, 4, 0), (2, 1)], marks=pytest.mark.slow),
        pytest.param([(2,), (1, 3, 2, 0), (5,)], marks=pytest.mark.slow),
        pytest.param([(1, 1, 1, 1), (1, 1, 1), (1, 0)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_goes_on_with_another_number(
    launches: list[tuple[int, ...]], setup: Path, text: Path, whole: Measurement, tmp_path: Path
) -> None:
    """Each launch is given by the batches that its processes read; in the end one process reads the rest."""
    settings = settings_of(setup, text, tmp_path / "all")
    for batches in launches:
        for index, some in enumerate(batches):
            killed_after(some, settings, index, len(batches))
    joined = measure_together(settings)
    equal(whole, joined)
    equal(whole, Measurement.load(settings.out))
    assert joined.provenance.settings == whole.provenance.settings
    assert (joined.provenance.shards, joined.provenance.shard_count) == ((0,), 1)
    assert joined.provenance.cursor == whole.provenance.cursor
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
    assert measure_together(settings).to_json() == joined.to_json()


@pytest.mark.slow
def test_a_single_process_is_joined_by_others(setup: Path, text: Path, whole: Measurement, tmp_path: Path) -> None:
    settings = settings_of(setup, text, tmp_path / "all")
    with attached(settings) as (capacity, stream):
        capacity.run(stream, 900, progress=False)
        measurement, extra = capacity.checkpoint()
    write_folder(settings.out, measurement.to_json(), measurement.arrays() | extra)
    (settings.out / "notes.txt").write_text("mine")
    earlier = gather_up(settings, 2)
    assert earlier.left.tokens == capacity.n_tokens
    assert (settings.out / "notes.txt").read_text() == "mine"
    killed_after(2, settings, 1, 2)
    equal(whole, measure_together(settings))


@pytest.mark.slow
def test_tokens_that_were_counted_are_not_asked_for_again(setup: Path, text: Path, tmp_path: Path) -> None:
    settings = settings_of(setup, text, tmp_path / "all", tokens=1000)
    for index in range(2):
        killed_after(3, settings, index, 2)
    counted = sum(Measurement.load(folder).hooks[0].summary.n_tokens for folder in left_behind(settings.out))
    joined = measure_together(settings)
    most = settings.batch_rows * 32
    assert counted < 1000 <= joined.hooks[0].summary.n_tokens < 1000 + most
    enough = settings_of(setup, text, tmp_path / "enough", tokens=700)
    for index in range(3):
        killed_after(3, enough, index, 3)
    counted = gather_up(enough, 1).left.tokens
    assert counted > 700
    assert measure_together(enough).hooks[0].summary.n_tokens == counted


class TestBadInput:
    def test_without_resume(self, setup: Path, text: Path, tmp_path: Path, cli: Cli) -> None:
        settings = settings_of(setup, text, tmp_path / "all")
        killed_after(2, settings, 1, 2)
        code, _, error = cli(*arguments(setup, settings.out))
        assert (code, error.count("\n")) == (2, 1)
        assert "all.process-1-of-2 already holds a measurement: continue with --resume" in error

    def test_of_other_settings(self, setup: Path, text: Path, tmp_path: Path, cli: Cli) -> None:
        settings = settings_of(setup, text, tmp_path / "all")
        killed_after(2, settings, 1, 2)
        code, _, error = cli(*arguments(setup, settings.out, "--resume"))
        assert (code, error.count("\n")) == (2, 1)
        assert "the checkpoint was made with dtype 'float64', and this run has 'float32'" in error
        assert left_behind(settings.out)

    def test_of_two_launches_at_once(self, setup: Path, text: Path, tmp_path: Path) -> None:
        settings = settings_of(setup, text, tmp_path / "all")
        killed_after(2, settings, 1, 2)
        (tmp_path / "all.process-1-of-2").rename(tmp_path / "aside")
        killed_after(2, settings, 1, 3)
        (tmp_path / "aside").rename(tmp_path / "all.process-1-of-2")
        with pytest.raises(CapacityError, match="checkpoints of launches of 2 and of 3 processes"):
            measure_together(settings)

    def test_what_was_gathered_is_gone(self, setup: Path, text: Path, tmp_path: Path) -> None:
        settings = settings_of(setup, text, tmp_path / "all")
        killed_after(2, settings, 0, 2)
        killed_after(2, settings, 0, 3)
        for path in (tmp_path / "all.earlier-launches").iterdir():
            path.unlink()
        with pytest.raises(CapacityError, match="which was deleted or replaced: delete both"):
            measure_together(settings)


@pytest.mark.slow
def test_fewer_documents_than_processes(setup: Path, text: Path, tmp_path: Path) -> None:
    """A process without a document adds nothing."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(text.read_text().splitlines(keepends=True)[:2]))
    more = ("--dtype", "float64", "--source", few)
    alone(arguments(setup, tmp_path / "one", *more, tokens=EVERYTHING))
    command = arguments(setup, tmp_path / "three", *more, tokens=EVERYTHING)
    assert launch([command] * 3) == [0, 0, 0]
    equal(Measurement.load(tmp_path / "one"), Measurement.load(tmp_path / "three"))
    few.write_text(json.dumps({"text": "<s>"}) + "\n")
    assert set(launch([arguments(setup, tmp_path / "none", *more)] * 2)) == {2}


@pytest.mark.slow
def test_other_text_on_another_machine(setup: Path, text: Path, tmp_path: Path) -> None:
    """The folder of each machine has a text of the same name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.jsonl").write_text(json.dumps({"text": f"w2 w3 {name}"}) + "\n")
    command = arguments(setup, tmp_path / "out", "--source", "text.jsonl")
    assert launch([command, command], folders=[tmp_path / "a", tmp_path / "a"]) == [0, 0]
    assert launch([command, command], folders=[tmp_path / "a", tmp_path / "b"]) == [2, 2]


def torchrun(*options: object, command: list[object]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options), "-m", "tl_capacity", *map(str, command)]


@pytest.mark.slow
@pytest.mark.skipif(
    "TL_CAPACITY_ELASTIC" not in os.environ,
    reason="agents find each other within seconds only on an idle machine; set TL_CAPACITY_ELASTIC=1 there",
)
def test_elastic_torchrun_goes_on_without_a_machine(
    setup: Path, text: Path, whole: Measurement, tmp_path: Path
) -> None:
    """Two agents stand for two machines; one is killed with its worker, and the other begins anew by itself."""
    command = arguments(
        setup,
        tmp_path / "all",
        *("--sae", setup / "sae0", "--dtype", "float64", "--batch-rows", 4),
        *("--checkpoint-seconds", 0, "--resume"),
        tokens=EVERYTHING,
    )
    command[command.index("--source") + 1] = text
    options = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=many", "--rdzv-backend=c10d"]
    port = free_port()
    options += [f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost", "--monitor-interval=0.1"]
    options += ["--rdzv-conf=last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as agents:
        stays = agents.enter_context(subprocess.Popen(torchrun(*options, command=command), **quiet))
        while not is_open(port) and stays.poll() is None:  # the agents meet at the one that came first
            time.sleep(0.05)
        dies = agents.enter_context(subprocess.Popen(torchrun(*options, command=command), **quiet))
        folders = [tmp_path / f"all.process-{index}-of-2" for index in range(2)]
        while not all((folder / "measurement.json").exists() for folder in folders) and stays.poll() is None:
            time.sleep(0.001)
        worker = next(child for child in psutil.Process(dies.pid).children() if "RANK" in child.environ())
        rank = int(worker.environ()["RANK"])
        for process in (worker, psutil.Process(dies.pid)):
            process.send_signal(signal.SIGKILL)
        assert not Measurement.load(folders[rank]).complete
        assert stays.wait(120) == 0
    equal(whole, Measurement.load(tmp_path / "all"))
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
    assert HOOK in {hook.hook for hook in Measurement.load(tmp_path / "all")}


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
