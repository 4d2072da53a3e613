"""SIGKILL at random moments of everything that takes long: what is on disk is whole at every moment, and the same
command goes on to the same last bit.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from commands import CHILDREN, HOOK, Cli, arguments, concept_of, run_in_a_child, same, students_of
from safetensors.numpy import load_file

from tl_capacity import Measurement
from tl_capacity.distillation import checkpoint
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.placement import Placement
from tl_capacity.storage.files import previous
from tl_capacity.toy.result import SweepResult

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """Something that takes long.

    Attributes:
        command: what to run to write a folder, and to go on after it was killed.
        whole: raises where what lies on disk after a kill is half of anything.
        same: raises where two finished folders differ.
        moments: pairs of moments at which it is killed.
    """

    command: Callable[[Path, Path], list[object]]
    whole: Callable[[Path], object]
    same: Callable[[Path, Path], None]
    moments: int = 20


def measure(setup: Path, out: Path) -> list[object]:
    return arguments(setup, out, "--resume", "--checkpoint-seconds", 0, tokens=12_000)


def distil(setup: Path, out: Path) -> list[object]:
    text = [
        "--teacher",
        setup / "model",
        "--source",
        setup / "text.jsonl",
        "--context",
        32,
        "--heldout-tokens",
        300,
        "--tokens",
        6_000,
    ]
    return [
        "run",
        "distill",
        *text,
        "--widths",
        "8,16",
        "--evaluations",
        4,
        "--out",
        out,
        "--resume",
        "--checkpoint-seconds",
        0,
    ]


def toy(setup: Path, out: Path) -> list[object]:
    models = ["--features", "6", "--alphas", "0.7,0.9", "--teacher-widths", "2,3", "--seeds", 1]
    return ["run", "toy-sweep", *models, "--steps", 1_500, "--out", out]


def probe(setup: Path, out: Path) -> list[object]:
    models = ["--model", setup / "model", "--model", students_of(setup)]
    return [
        "run",
        "probe",
        *models,
        "--hook",
        HOOK,
        "--concepts",
        concept_of(setup),
        "--sae",
        setup / "sae",
        "--threads",
        1,
        "--out",
        out,
    ]


def measured_once(setup: Path) -> Path:
    """A measurement that jobs read."""
    measured = setup / "measurement-to-recover"
    if not measured.exists():
        run_for(arguments(setup, measured))
    return measured


def place(setup: Path, out: Path) -> list[object]:
    """Students of two weights, their readouts and their prices."""
    features, heldout = setup / "features-to-keep.json", setup / "heldout-to-judge.jsonl"
    features.write_text(json.dumps({"hook": HOOK, "features": [3, 8, 21, 40]}))
    lines = (setup / "text.jsonl").read_text().splitlines(keepends=True)
    heldout.write_text("".join(lines[-60:]))
    students = ["--widths", 8, "--weights", 2, "--start", "random", "--tokens", 2_000, "--evaluations", 4, "--repeat"]
    text = ["--source", setup / "text.jsonl", "--heldout", heldout, "--heldout-tokens", 200, "--context", 32]
    judged = ["--judge-tokens", 5_000, "--tau", 0.7, "--keep", features]
    often = ["--checkpoint-seconds", 0, "--threads", 1]
    return ["run", "placement", measured_once(setup), *students, *text, *judged, *often, "--out", out]


def recover(setup: Path, out: Path) -> list[object]:
    measured = measured_once(setup)
    return [
        "run",
        "recover",
        measured,
        students_of(setup),
        "--tokens",
        12_000,
        "--tau",
        0.8,
        "--threads",
        1,
        "--out",
        out,
    ]


def whole_measurement(out: Path) -> None:
    if (out / "measurement.json").exists():
        Measurement.load(out)


def whole_distillation(out: Path) -> None:
    checkpoint.read(out)
    if (out / "distillation.json").exists():
        DistillationRun.load(out)


def whole_placement(out: Path) -> None:
    whole_checkpoint(out)
    for distillation in out.glob("weight-*"):
        whole_distillation(distillation)
    if (out / "placement.json").exists():
        Placement.load(out)


def whole_sweep(out: Path) -> None:
    state = out.with_name(f"{out.name}.checkpoint.safetensors")
    if state.exists():
        load_file(state)
    if out.exists():
        SweepResult.load(out)


def whole_checkpoint(out: Path) -> None:
    for state in out.glob("*.checkpoint.safetensors"):
        load_file(state)
    for record in out.glob("*.json"):
        json.loads(record.read_bytes())


def same_distillation(one: Path, other: Path) -> None:
    a, b = ({**DistillationRun.load(folder).to_json(), "seconds": 0} for folder in (one, other))
    assert a == b
    for weights in sorted(one.glob("students/*/model.safetensors")):
        assert weights.read_bytes() == (other / weights.relative_to(one)).read_bytes()


def same_placement(one: Path, other: Path) -> None:
    for distillation in ("weight-0", "weight-2"):
        same_distillation(one / distillation, other / distillation)
    for name in ("placement.json", f"features-{HOOK}.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def same_sweep(one: Path, other: Path) -> None:
    assert (one / "students.safetensors").read_bytes() == (other / "students.safetensors").read_bytes()


def same_probes(one: Path, other: Path) -> None:
    a, b = ({**json.loads((folder / "probes.json").read_bytes()), "seconds": 0} for folder in (one, other))
    assert a == b
    assert (one / "probes.csv").read_bytes() == (other / "probes.csv").read_bytes()


def same_recovery(one: Path, other: Path) -> None:
    assert (one / "recoverability.json").read_bytes() == (other / "recoverability.json").read_bytes()
    a, b = (load_file(folder / f"features-{HOOK}.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=name)


JOBS = {
    "measure": Job(measure, whole_measurement, same),
    "distil": Job(distil, whole_distillation, same_distillation),
    "probe": Job(probe, whole_checkpoint, same_probes),
    "recover": Job(recover, whole_checkpoint, same_recovery),
    "toy": Job(toy, whole_sweep, same_sweep),
    # It is distil and recover, whose moments are many, and what joins them.
    "placement": Job(place, whole_placement, same_placement, moments=3),
}


def run_for(command: list[object], seconds: float | None = None) -> float:
    """Run a command in a child, and kill it after some seconds; returns how long it took."""
    child = CHILDREN.Process(target=run_in_a_child, args=([str(a) for a in command],))
    started = time.monotonic()
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)  # it may have ended meanwhile
    else:
        assert child.exitcode == 0
    return time.monotonic() - started


@pytest.fixture(scope="module")
def undisturbed(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """`undisturbed(job)`: what a run leaves that nobody kills, and how long it takes at least; the first time is longer
    than later ones.
    """
    done: dict[str, tuple[Path, float]] = {}

    def run(name: str) -> tuple[Path, float]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            seconds = [run_for(JOBS[name].command(setup, folder / which)) for which in ("whole", "again", "once more")]
            done[name] = folder / "whole", min(seconds)
        return done[name]

    return run


@pytest.mark.parametrize(
    ("name", "seed"),
    [pytest.param(name, seed, id=f"{name}-moment{seed}") for name, job in JOBS.items() for seed in range(job.moments)],
)
def test_killed_at_a_random_moment(
    name: str,
    seed: int,
    setup: Path,
    undisturbed: Callable[[str], tuple[Path, float]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Killed, and gone on with, until a run reaches its end; each kill leaves whole files."""
    whole, seconds = undisturbed(name)
    job, out, draw = JOBS[name], tmp_path / "killed", random.Random(seed)
    struck = 0
    for _ in range(2):
        limit = draw.uniform(0.1, 1.0) * seconds
        struck += run_for(job.command(setup, out), limit) >= limit
        job.whole(out)
    record_property(f"kills that struck {name}", struck)
    run_for(job.command(setup, out))
    job.same(whole, out)
    assert not [path for path in tmp_path.rglob("*") if "checkpoint" in path.name or "previous" in path.name]


@pytest.fixture(scope="module")
def checkpoints(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints(job)`: what a run leaves that was killed once it had written two checkpoints."""
    left: dict[str, Path] = {}
    records = {
        "measure": "killed/measurement.json",
        "distil": "killed/checkpoint.json",
        "probe": "killed/probes.checkpoint.safetensors",
        "recover": f"killed/{HOOK}.fit.checkpoint.safetensors",
        "toy": "killed.checkpoint.safetensors",
    }

    def run(name: str) -> Path:
        if name not in left:
            folder = tmp_path_factory.mktemp(name)
            child = CHILDREN.Process(
                target=run_in_a_child, args=([str(a) for a in JOBS[name].command(setup, folder / "killed")],)
            )
            child.start()
            last, before = folder / records[name], previous(folder / records[name])
            # A kill between the two writes leaves the same record under both names, and nothing to fall back to.
            while not (before.exists() and before.read_bytes() != last.read_bytes()) and child.is_alive():
                time.sleep(0.001)
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL
            left[name] = folder
        return left[name]

    return run


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last_tensors(record: Path, field: str) -> Path:
    """The tensors that a record names."""
    return record.with_name(json.loads(record.read_bytes())[field])


DAMAGED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "measurement.json": ("measure", lambda folder: folder / "killed" / "measurement.json"),
    "statistics": ("measure", lambda folder: last_tensors(folder / "killed" / "measurement.json", "statistics")),
    "checkpoint.json": ("distil", lambda folder: folder / "killed" / "checkpoint.json"),
    "students' weights": ("distil", lambda folder: last_tensors(folder / "killed" / "checkpoint.json", "file")),
    "probes": ("probe", lambda folder: folder / "killed" / "probes.checkpoint.safetensors"),
    "sums of readouts": ("recover", lambda folder: folder / "killed" / f"{HOOK}.fit.checkpoint.safetensors"),
    "toy checkpoint": ("toy", lambda folder: folder / "killed.checkpoint.safetensors"),
}


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_last_checkpoint(
    kind: str,
    damage: Callable[[Path], None],
    setup: Path,
    checkpoints: Callable[[str], Path],
    undisturbed: Callable[[str], tuple[Path, float]],
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run goes on from the checkpoint before, says so, and ends with the same result; where that is damaged as
    well, it says so and changes nothing.
    """
    name, find = DAMAGED[kind]
    folder = tmp_path / "folder"
    shutil.copytree(checkpoints(name), folder)
    damage(find(folder))
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    code, _, _ = cli(*JOBS[name].command(setup, folder / "killed"))
    assert code == 0
    assert "the last checkpoint cannot be used, so the run continues from the one before it" in caplog.text
    JOBS[name].same(undisturbed(name)[0], folder / "killed")

    for path in both.rglob("*previous*"):
        truncate(path)
    before = {path: path.read_bytes() for path in both.rglob("*") if path.is_file()}
    code, _, err = cli(*JOBS[name].command(setup, both / "killed"))
    assert code == 2
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in both.rglob("*") if path.is_file()} == before


def test_a_finished_folder_holds_no_checkpoint(setup: Path, undisturbed: Callable[[str], tuple[Path, float]]) -> None:
    out, _ = undisturbed("measure")
    assert sorted(path.name.partition("-")[0] for path in out.iterdir()) == ["measurement.json", "statistics"]
