"""A disk that is full, and a folder that cannot be written: one sentence, a code other than zero, and nothing that was there is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Cli, arguments, same

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


@pytest.fixture
def checkpoint(setup: Path, tmp_path: Path) -> Path:
    """What a run leaves that reads its text as far as its first batches: a checkpoint."""
    from tl_capacity import TokenStream, add_capacity_hooks
    from tl_capacity.loading import load_model, load_sae
    from tl_capacity.measurement import write_folder

    loaded, (name, sae) = load_model(str(setup / "model")), load_sae(str(setup / "sae"))
    with add_capacity_hooks(loaded.model, sae, mask_token_ids=[0, 1]) as capacity:
        capacity.model_name, capacity.revision, capacity.taps[0].name = loaded.name, loaded.revision, name
        capacity.run(TokenStream(str(setup / "text.jsonl"), loaded.tokenizer, context=32), 2_000, progress=False)
        measurement, extra = capacity.checkpoint()
    return write_folder(tmp_path / "checkpoint", measurement.to_json(), measurement.arrays() | extra)


def in_a_namespace(script: str, setup: Path, checkpoint: Path, folder: Path) -> Path:
    """Run a script that mounts `$DISK` and then runs the command that goes on with the checkpoint there; returns the folder of its results."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no file system can be mounted")
    disk, results = folder / "disk", folder / "results"
    disk.mkdir()
    results.mkdir()
    command = [sys.executable, "-m", "tl_capacity", *map(str, arguments(setup, disk / "m", "--resume", "--checkpoint-seconds", 0, tokens=TOKENS))]
    places = {"DISK": str(disk), "CHECKPOINT": str(checkpoint), "RESULTS": str(results)}
    done = subprocess.run([*NAMESPACE, "bash", "-c", script, "bash", *command], env={**os.environ, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (results / "code").read_text().strip() == "2"
    assert "Traceback" not in (results / "error").read_text()
    return results


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(cli: Cli, setup: Path, checkpoint: Path, tmp_path: Path) -> None:
    """On a real file system with no space left; with space again, the run goes on from there."""
    results = in_a_namespace(FULL_DISK, setup, checkpoint, tmp_path)
    assert "cannot be written (No space left on device): free space or choose another folder; what was there before is whole" in (results / "error").read_text()
    assert (results / "after").read_text() == (results / "before").read_text()
    assert cli(*arguments(setup, tmp_path / "whole", tokens=TOKENS))[0] == 0
    same(tmp_path / "whole", results / "m")


def test_a_folder_that_cannot_be_written(setup: Path, checkpoint: Path, tmp_path: Path) -> None:
    """On a real file system that is mounted read-only, which stops root as well."""
    results = in_a_namespace(READ_ONLY, setup, checkpoint, tmp_path)
    assert "cannot be written (Read-only file system)" in (results / "error").read_text()
    for path in checkpoint.iterdir():
        assert (tmp_path / "disk" / "m" / path.name).read_bytes() == path.read_bytes()
