"""A disk that is full, and a folder that cannot be written: one sentence, a code other than zero, and nothing that was
there is changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Cli, arguments, same
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
TOKENS = 12_000
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

FULL_DISK = """
set -e
mount -t tmpfs -o size=8m tmpfs "$DISK"
cp -r "$CHECKPOINT" "$DISK/m"
(cd "$DISK/m" && sha256sum *) > "$RESULTS/before"
head -c 100000000 /dev/zero > "$DISK/filler" 2> /dev/null || true
"$@" 2> "$RESULTS/error" > /dev/null && exit 90 || echo $? > "$RESULTS/code"
(cd "$DISK/m" && find . -type f | sed 's,^./,,' | sort | xargs sha256sum) > "$RESULTS/after"
rm "$DISK/filler"
"$@" > /dev/null 2>&1
cp -r "$DISK/m" "$RESULTS/m"
"""

READ_ONLY = """
set -e
mkdir "$DISK/m"
cp "$CHECKPOINT"/* "$DISK/m"
mount --bind "$DISK" "$DISK"
mount -o remount,bind,ro "$DISK"
"$@" 2> "$RESULTS/error" > /dev/null && exit 90 || echo $? > "$RESULTS/code"
"""
GROWING_DISK = """
mount -t tmpfs -o size=8m tmpfs "$DISK"
OMP_NUM_THREADS=1 "$PYTHON" - "$@" << 'END'
import io, json, os, shutil, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tl_capacity.cli import main

disk, results, said, free, code = Path(os.environ["DISK"]), Path(os.environ["RESULTS"]), [], 4096, 2
while code:
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - int(free))))
    free, error = 1.2 * free, io.StringIO()
    with redirect_stderr(error), redirect_stdout(io.StringIO()):
        try:
            main(sys.argv[1:])
        except SystemExit as stopped:
            code = stopped.code or 0
    said.append((code, error.getvalue()))
    assert free < 8e6, said
(results / "said.json").write_text(json.dumps(said))
shutil.copytree(disk, results / "disk", ignore=shutil.ignore_patterns("filler"))
END
"""
"""Runs a command again and again, each time with a little more space, until it gets to its end; whatever it needs to
write, one of the runs fails at it. It has one thread, as tests have: products of two are rounded otherwise.
"""


@pytest.fixture
def checkpoint(setup: Path, tmp_path: Path) -> Path:
    """What a run leaves that reads its text as far as its first batches: a checkpoint."""
    from tl_capacity import TokenStream, add_capacity_hooks
    from tl_capacity.dictionaries.loading import load_sae
    from tl_capacity.measurement.folder import write_folder
    from tl_capacity.models.loading import load_model

    loaded, (name, sae) = load_model(str(setup / "model")), load_sae(str(setup / "sae"))
    with add_capacity_hooks(loaded.model, sae, mask_token_ids=[0, 1]) as capacity:
        capacity.model_name, capacity.revision, capacity.taps[0].name = loaded.name, loaded.revision, name
        capacity.run(TokenStream(str(setup / "text.jsonl"), loaded.tokenizer, context=32), 2_000, progress=False)
        measurement, extra = capacity.checkpoint()
    return write_folder(tmp_path / "checkpoint", measurement.to_json(), measurement.arrays() | extra)


def in_a_namespace(script: str, setup: Path, checkpoint: Path, folder: Path) -> Path:
    """Run a script that mounts `$DISK` and then runs the command that goes on with the checkpoint there; returns the
    folder of its results.
    """
    disk, results = folder / "disk", folder / "results"
    disk.mkdir()
    results.mkdir()
    command = [
        sys.executable,
        "-m",
        "tl_capacity",
        *map(str, arguments(setup, disk / "m", "--resume", "--checkpoint-seconds", 0, tokens=TOKENS)),
    ]
    in_namespace(script, command, {"DISK": disk, "CHECKPOINT": checkpoint, "RESULTS": results})
    assert (results / "code").read_text().strip() == "2"
    assert "Traceback" not in (results / "error").read_text()
    return results


def in_namespace(script: str, command: list[str], places: dict[str, Path]) -> None:
    if (
        shutil.which("unshare") is None
        or subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", places["DISK"]], capture_output=True).returncode
    ):
        pytest.skip("no user namespaces here, so no file system can be mounted")
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    done = subprocess.run(
        [*NAMESPACE, "bash", "-c", script, "bash", *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run_with_ever_more_space(command: list[str], folder: Path) -> tuple[list[str], Path]:
    """What the runs that failed said, and a copy of what was on the disk after the one that did not."""
    places = {"DISK": folder / "disk", "RESULTS": folder / "results"}
    for place in places.values():
        place.mkdir()
    in_namespace(GROWING_DISK, command, {**places, "PYTHON": Path(sys.executable)})
    *failed, ended = json.loads((places["RESULTS"] / "said.json").read_text())
    assert ended[0] == 0
    assert {code for code, _ in failed} == {2}
    said = [re.findall("error: (.*)", error) for _, error in failed]  # SAELens shows its progress before and after
    assert {len(sentences) for sentences in said} == {1}
    assert all(
        " cannot be written (No space left on device): free space or choose another folder; what was there" in sentence
        for [sentence] in said
    ), said
    found = places["RESULTS"] / "disk"
    assert not list(found.rglob("*writing*"))
    return [sentence for [sentence] in said], found


def test_students_on_a_disk_that_is_too_small(cli: Cli, setup: Path, tmp_path: Path) -> None:
    command = [
        "run",
        "distill",
        "--teacher",
        setup / "model",
        "--source",
        setup / "text.jsonl",
        "--widths",
        "8,16",
        "--tokens",
        600,
        "--context",
        32,
    ]
    command += ["--heldout-tokens", 200, "--evaluations", 2, "--resume"]
    said, found = run_with_ever_more_space([*map(str, command), "--out", str(tmp_path / "disk" / "d")], tmp_path)
    for part in ("checkpoint-", "/students/width"):
        assert any(part in sentence for sentence in said)
    assert cli(*command, "--out", tmp_path / "whole")[0] == 0
    assert sorted(path.name for path in (found / "d").iterdir()) == ["distillation.json", "students"]
    for weights in (tmp_path / "whole").rglob("*.safetensors"):
        other = load_file(found / "d" / weights.relative_to(tmp_path / "whole"))
        assert all(value.equal(other[name]) for name, value in load_file(weights).items())


def test_an_sae_on_a_disk_that_is_too_small(cli: Cli, setup: Path, tmp_path: Path) -> None:
    command = [
        "run",
        "train-sae",
        "--model",
        setup / "model",
        "--source",
        setup / "text.jsonl",
        "--hook",
        "blocks.1.hook_resid_post",
        "--tokens",
        4_000,
    ]
    command += [
        "--heldout-tokens",
        500,
        "--d-sae",
        64,
        "--k",
        8,
        "--batch-tokens",
        128,
        "--context",
        24,
        "--checkpoints",
        1,
    ]
    said, found = run_with_ever_more_space([*map(str, command), "--out", str(tmp_path / "disk" / "sae")], tmp_path)
    for part in ("/sae.checkpoints/2048 cannot", "/disk/sae cannot"):
        assert any(part in sentence for sentence in said), said
    assert sorted(path.name for path in (found / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "training.json",
    ]
    assert [path.name for path in found.iterdir()] == ["sae"]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    cli: Cli, setup: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """On a real file system with no space left; with space again, the run goes on from there."""
    results = in_a_namespace(FULL_DISK, setup, checkpoint, tmp_path)
    assert (
        "cannot be written (No space left on device): free space or choose another folder; what was there before is"
        " whole" in (results / "error").read_text()
    )
    assert (results / "after").read_text() == (results / "before").read_text()
    assert cli(*arguments(setup, tmp_path / "whole", tokens=TOKENS))[0] == 0
    same(tmp_path / "whole", results / "m")


def test_a_folder_that_cannot_be_written(setup: Path, checkpoint: Path, tmp_path: Path) -> None:
    """On a real file system that is mounted read-only, which stops root as well."""
    results = in_a_namespace(READ_ONLY, setup, checkpoint, tmp_path)
    assert "cannot be written (Read-only file system)" in (results / "error").read_text()
    for path in checkpoint.iterdir():
        assert (tmp_path / "disk" / "m" / path.name).read_bytes() == path.read_bytes()
