"""What splicing on the command line refuses in one sentence, before it runs, and leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import Cli, arguments
from safetensors.torch import load_file, save_file


def changed(path: Path) -> None:
    """Other weights of the same shapes."""
    [file] = path.glob("*.safetensors")
    weights = load_file(file)
    moved = {name: tensor + 0.01 * torch.ones_like(tensor) for name, tensor in weights.items()}
    save_file(moved, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "says"),
    [("model", "was measured with other weights than"), ("sae", "has other weights than the one that was measured")],
)
def test_another_model_or_sae_than_was_measured(setup: Path, tmp_path: Path, cli: Cli, what: str, says: str) -> None:
    for name in ("model", "sae"):
        shutil.copytree(setup / name, tmp_path / name)
    shutil.copy(setup / "text.jsonl", tmp_path)
    assert cli(*arguments(tmp_path, tmp_path / "m", tokens=500))[0] == 0
    changed(tmp_path / what)
    code, _, err = cli("run", "splice", tmp_path / "m", "--widths", "2", "--tokens", 200, "--out", tmp_path / "s")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert not (tmp_path / "s" / "splice.json").exists()
