"""Units as people read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Cli, arguments

from tl_capacity.plugins import plugins
from tl_capacity.runtime.units import per_token


@pytest.mark.parametrize("unit", ["latent²", "activation²", "nats per token", "active features per token"])
def test_a_unit_is_per_token_once(unit: str) -> None:
    assert per_token(unit).count("per token") == 1
    assert per_token(unit).startswith(unit)


@pytest.mark.slow
def test_no_command_says_it_twice(cli: Cli, setup: Path, tmp_path: Path) -> None:
    names = [e.name for e in plugins().importance_estimators if e.name != "integrated_gradients"]
    measured = arguments(setup, tmp_path / "m", *(o for n in names for o in ("--importance", n)), tokens=500)
    assert cli(*measured)[0] == 0
    for name in names:
        widths = ("--importance", name, "--widths", "2,4")
        for command in (
            ("floor", tmp_path / "m", *widths),
            ("plan", tmp_path / "m", "--target-loss", 0.01, *widths),
        ):
            code, out, _ = cli(*command)
            assert code == 0
            assert "per token" in " ".join(out.split())
            assert "per token per token" not in " ".join(out.split())
