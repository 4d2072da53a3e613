"""Writes the second teacher's rows of docs/results/splice.json and the tables of docs/results/second_teacher.md:
`python docs/write_second_teacher.py runs/smollm`.

The folder holds what the commands that the page names have written: dictionaries, `measurement`, its splice in
`spliced`, `rivals`, and `students/WIDTH` where there are any yet. A prediction that stands in splice.json keeps its
number; only what was observed is added later.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from write_record import LAWS
from write_results import RESULTS, filled, table
from write_rivals import floors_table
from write_splice import BUDGET, CONSISTENT, SHARE, interpolated, kept, key, number, predicted

from tl_capacity import Measurement, Spliced
from tl_capacity.distillation.observed import observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.predict.forecasts import Forecasts

TEACHER, WIDTHS = "smollm2-135m", (144, 288, 432)
PAGE, JSON = RESULTS / "second_teacher.md", RESULTS / "splice.json"


def rows(runs: Path) -> Iterator[dict[str, Any]]:
    """A row for each dictionary, law and width."""
    measurement = Measurement.load(runs / "measurement")
    for curve in Spliced.load(runs / "spliced"):
        [hook] = [h for h in measurement if h.sae_digest == curve.sae_digest]
        summary = hook.summary
        about = {
            "teacher": TEACHER,
            "hook": hook.hook,
            "sae": Path(hook.sae).name,
            "architecture": "topk",
            "k": round(summary.l0.value),
            "d_sae": summary.d_sae,
            "alive": int(summary.n_alive.value),
            "l0": summary.l0.value,
            "g": summary.capacity.value,
            "d_star": summary.critical_width.value,
            "error": curve.error.value,
        }
        for law in LAWS:
            for width in WIDTHS:
                yield {**about, "law": law, **predicted(curve.at(kept(law, hook, width)), width)}


def reached(runs: Path) -> dict[int, list[float]]:
    """The mean of the last tenth of each student of a width."""
    losses: dict[int, list[float]] = {}
    for folder in sorted(runs.glob("students/*")):
        for floor in observed_floors(DistillationRun.load(folder)):
            losses.setdefault(floor.width, []).append(floor.last_tenth)
    return losses


def write(runs: Path) -> None:
    """Replace this teacher's rows and tables; predictions that are there stay as they were committed."""
    every = json.loads(JSON.read_text(encoding="utf-8"))
    before = {key(row): row for row in every if row["teacher"] == TEACHER}
    teacher_width = Measurement.load(runs / "measurement").hooks[0].teacher_width
    found = list(rows(runs))
    found += interpolated(found, TEACHER, teacher_width)
    seen = reached(runs)
    for row in found:
        values, earlier = seen.get(row["width"], []), before.get(key(row), {})
        row |= {name: earlier[name] for name in ("predicted", "low", "high") if name in earlier}
        row["observed"] = float(np.mean(values)) if values else None
        row["observed_seeds"] = values
        row["committed_before"] = earlier.get("committed_before", not values)
    others = [row for row in every if row["teacher"] != TEACHER]
    JSON.write_text(json.dumps(others + found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for name, law in (("budget", BUDGET), ("proportional", SHARE), ("consistent", CONSISTENT)):
        text = filled(text, name, law_table([row for row in found if row["law"] == law], seen), Path(__file__).name)
    if (runs / "rivals").exists():
        text = filled(text, "rivals", floors_table(Forecasts.load(runs / "rivals"), seen), Path(__file__).name)
    PAGE.write_text(text, encoding="utf-8")


def law_table(found: list[dict[str, Any]], seen: dict[int, list[float]]) -> str:
    """A row for each dictionary, below what was observed."""
    observed = [number(float(np.mean(seen[width])) if width in seen else None) for width in WIDTHS]
    lines = [["**observed**", "", "", "", *observed, ""]]
    for hook, sae in dict.fromkeys((row["hook"], row["sae"]) for row in found):
        of = {row["width"]: row for row in found if (row["hook"], row["sae"]) == (hook, sae)}
        cells = [
            f"{number(of[width]['predicted'])} [{number(of[width]['low'])}, {number(of[width]['high'])}]"
            for width in WIDTHS
        ]
        row = of[WIDTHS[0]]
        figures = [f"`{hook}`", f"{row['l0']:.1f}", f"{row['d_star']:.0f}"]
        lines.append([sae, *figures, *cells, number(row["error"])])
    return table(["dictionary", "hook point", "L0", "d*", *(f"d={width}" for width in WIDTHS), "all latents"], lines)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
