"""The script behind docs/results/placement.md: it chooses by its rule, writes what the price lists say, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import write_placement

from tl_capacity import Measurement
from tl_capacity.placement import Placement
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, kept_features


@pytest.mark.slow
def test_the_experiment_runs_on_tiny_settings_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    given = ["--source", "embedded", "--results", str(tmp_path / "results"), "--widths", "16", "--seeds", "0"]
    sizes = {"features": 5, "tokens": 1_000, "measure-tokens": 4_000, "choose-tokens": 24_000, "judge-tokens": 24_000}
    sizes |= {"splice-tokens": 250, "heldout-tokens": 250, "evaluations": 1}
    few = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    command = [str(tmp_path), *given, "--weights", "1", *few]
    write_placement.main(command)
    rows = json.loads((tmp_path / "results" / "placement.json").read_text())
    assert [(row["set"], row["weight"]) for row in rows] == [("lost", 0), ("lost", 1), ("random", 0), ("random", 1)]
    for row in rows:
        placement = Placement.load(tmp_path / f"{row['set']}-16-priced")
        [price] = [price for price in placement if price.weight == row["weight"]]
        assert row["kl"] == price.kl.to_json()
        assert row["features"] == len(placement.features) == 5
    hook = Measurement.load(tmp_path / "measurement")[write_placement.HOOK]
    kept = kept_features(
        plugins().capacity_laws.default, 16, context_at(hook, hook.importance(None), hook.summary.alpha.value)
    )
    lost = json.loads((tmp_path / "lost-16.json").read_text())["features"]
    assert not set(lost) & set(hook.ranked(None)[:kept].tolist())
    page = (tmp_path / "results" / "placement.md").read_text()
    assert "| 16 | lost and given up | 1 |" in page
    assert "Width 16, random: plain students keep" in page
    before = (tmp_path / "results" / "placement.json").read_bytes()
    write_placement.main(command)
    assert (tmp_path / "results" / "placement.json").read_bytes() == before
