"""Writes tl_capacity/predict/record.json, how far predictions in nats were from students: `python docs/write_record.py
[runs]`. `python docs/write_splice.py runs` does this too.

Spliced floors and what students reached come from docs/results/splice.json. With the folder of the runs that
results/splice.md names, summed importances in nats are read from `nats`, the measurement that embedded_floor.md names,
and other predictors' floors from `rivals`, what `tl-capacity run rivals` wrote of it; without them their rows stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tl_capacity import Measurement
from tl_capacity.plan.methods import methods_of
from tl_capacity.predict.forecasts import JSON_NAME as FORECASTS_JSON
from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.predict.record import SCHEMA, Check
from tl_capacity.predict.spliced_floor import PREDICTOR
from tl_capacity.runtime.units import NATS

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tl_capacity" / "predict" / "record.json"
SPLICE = ROOT / "docs" / "results" / "splice.json"
LAWS = {"d·g(α)": "compressed_sensing", "F·d_S/d_T": "proportional"}
"""The laws under the names of results/splice.md. Its interpolation over dictionaries is not a law's."""
TEACHER, TEACHER_WIDTH = "embedded", 128


def spliced() -> Iterator[Check]:
    """Every spliced floor of a width that was observed, but for those that the dictionary's own error decides.

    The second teacher's students read too few tokens to check a floor.
    """
    for row in json.loads(SPLICE.read_text(encoding="utf-8")):
        observed = row["observed"]
        if row["teacher"] == TEACHER and row["law"] in LAWS and observed is not None and row["error"] < observed:
            yield Check(
                PREDICTOR,
                "second_moment",
                LAWS[row["law"]],
                row["teacher"],
                TEACHER_WIDTH,
                row["hook"],
                row["sae"],
                row["width"],
                round(row["predicted"], 4),
                round(observed, 4),
            )


def others(runs: Path) -> Iterator[Check]:
    """Summed importances in nats, and the rivals' floors if they exist, at the widths that were observed."""
    observed = {check.width: check.observed for check in spliced() if check.teacher == TEACHER}
    widths = np.array(sorted(observed))
    rivals = [Forecasts.load(runs / "rivals")] if (runs / "rivals" / FORECASTS_JSON).exists() else []
    for method in methods_of(Measurement.load(runs / "nats").hooks, (), None, rivals):
        for width, predicted in zip(widths, method.floors(widths), strict=True):
            if method.unit == NATS and not method.is_bound and np.isfinite(predicted):
                yield Check(
                    method.predictor,
                    method.importance,
                    method.law,
                    TEACHER,
                    TEACHER_WIDTH,
                    method.hook,
                    Path(method.sae).name,
                    int(width),
                    round(float(predicted), 4),
                    observed[int(width)],
                )


def write(runs: Path | None) -> None:
    """Replace the file. Rows of predictors that are not in the runs stay as they are."""
    checks = list(spliced())
    if runs is not None and (runs / "nats").exists():
        checks += others(runs)
    new = {check.predictor for check in checks}
    before = json.loads(RECORD.read_text(encoding="utf-8"))["checks"]
    kept = [row for row in before if row["predictor"] not in new]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    head = {
        "schema": SCHEMA,
        "written_by": "python docs/write_splice.py runs",
        "commit": commit.stdout.strip(),
        "pages": ["docs/results/splice.md", "docs/results/embedded_floor.md"],
    }
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in (*map(asdict, checks), *kept))
    start = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
    RECORD.write_text(f'{start},\n "checks": [\n{rows}\n]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
