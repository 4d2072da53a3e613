"""A user's type checker accepts the method that models are given at run time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SNIPPET = """
from typing import cast
from transformer_lens.model_bridge import TransformerBridge
import tl_capacity as tlc

def count(bridge: TransformerBridge, sae: object) -> tlc.Measurement:
    model = cast(tlc.HookedModel, bridge)
    saes = {"blocks.1.hook_resid_post": sae}
    with model.add_capacity_hooks(saes, importance=["second_moment"]) as capacity:  # type: ignore[arg-type]
        return capacity.run([]).measurement()

wrong: int = tlc.add_capacity_hooks(object(), [])
"""


@pytest.mark.slow
def test_mypy_accepts_the_protocol_and_knows_the_handle(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", str(path)],
        capture_output=True,
        text=True,
    )
    errors = [line for line in result.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, result.stdout
    assert '"CapacityHooks", variable has type "int"' in errors[0]
