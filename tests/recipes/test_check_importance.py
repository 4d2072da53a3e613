"""The recipe that holds importances in nats against exact ablations, on the embedded teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tl_capacity.recipes.check_importance import main

from tl_capacity import recipe
from tl_capacity.errors import CapacityError, TokenSourceError


@pytest.mark.slow
def test_fisher_is_near_the_kl_of_ablations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.run(
        main,
        [
            "--rows",
            "8",
            "--context",
            "128",
            "--latents",
            "30",
            "--importance",
            "fisher,gradient",
            "--out",
            str(tmp_path),
        ],
    )
    assert "rank correlation" in capsys.readouterr().out
    found = json.loads((tmp_path / "check_importance.json").read_text())
    fisher, gradient = found["estimators"]
    assert found["tokens"] == 8 * 127
    assert len(found["latents"]) == 30
    assert 0.4 < fisher["median_ratio"] < 2.5
    assert fisher["rank_correlation"] > 0.6
    assert gradient["median_ratio"] > fisher["median_ratio"]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        (["--latents", "1"], CapacityError, "--latents 1 must be at least 2"),
        (
            ["--hook", "blocks.2.hook_resid_post"],
            CapacityError,
            "no SAE comes with embedded at blocks.2.hook_resid_post: pass --sae",
        ),
        (["--rows", "100000"], TokenSourceError, "rows that fill a context of 256, fewer than 100,000"),
    ],
)
def test_bad_input(options: list[str], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        recipe.run(main, options)
