"""Writes the second teacher's rows of docs/results/splice.json and the tables of docs/results/second_teacher.md:
`python docs/write_second_teacher.py runs/smollm`.

The folder holds what the commands that the page names have written: dictionaries, `measurement`, its splice in
`spliced`, `rivals`, `bound`, `bound-432`, and, where there are any yet, distillations in `students` and the same
students in `observed`. A prediction that stands in splice.json keeps its number; only what was observed is added later.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from write_results import RESULTS, filled, table
from write_rivals import floors_table
from write_splice import (
    BUDGET,
    CONSISTENT,
    SHARE,
    add_reached,
    curves_table,
    interpolated,
    key,
    number,
    rows_of,
    with_observed,
)

from tl_capacity import Measurement, Spliced
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.predict.forecasts import JSON_NAME as FORECASTS
from tl_capacity.predict.forecasts import Forecasts

TEACHER, WIDTHS = "smollm2-135m", (144, 288, 432)
REACHED = "**reached so far, not flat**"
PAGE, JSON = RESULTS / "second_teacher.md", RESULTS / "splice.json"


def rows(runs: Path) -> Iterator[dict[str, Any]]:
    """A row for each dictionary, law and width."""
    measurement = Measurement.load(runs / "measurement")
    for curve in Spliced.load(runs / "spliced"):
        [hook] = [h for h in measurement if h.sae_digest == curve.sae_digest]
        trained = json.loads((runs / Path(hook.sae).name / "training.json").read_text(encoding="utf-8"))
        yield from rows_of(TEACHER, hook, curve, trained["settings"], WIDTHS)


def write(runs: Path) -> None:
    """Replace this teacher's rows and tables. Existing predictions stay as they were committed."""
    every = json.loads(JSON.read_text(encoding="utf-8"))
    before = {key(row): row for row in every if row["teacher"] == TEACHER}
    teacher_width = Measurement.load(runs / "measurement").hooks[0].teacher_width
    new = list(rows(runs))
    seen: dict[int, list[float]] = {}
    students = sorted(runs.glob("students/*"))
    add_reached(seen, students)
    found = [with_observed(row, before, seen, True) for row in [*new, *interpolated(new, TEACHER, teacher_width)]]
    others = [row for row in every if row["teacher"] != TEACHER]
    JSON.write_text(json.dumps(others + found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for name, law in (("budget", BUDGET), ("proportional", SHARE), ("consistent", CONSISTENT)):
        text = filled(text, name, law_table([row for row in found if row["law"] == law], seen), Path(__file__).name)
    folders = [runs / name for name in ("rivals", "bound", "bound-432")]
    forecasts = [Forecasts.load(folder) for folder in folders if (folder / FORECASTS).exists()]
    records = tuple(record for each in forecasts for record in each)
    text = filled(text, "rivals", floors_table(Forecasts(records), seen, REACHED), Path(__file__).name)
    if students:
        text = filled(text, "curves", curves_table(students), Path(__file__).name)
    if (runs / "observed").exists():
        text = filled(text, "judged", judged_table(runs / "observed"), Path(__file__).name)
    PAGE.write_text(text, encoding="utf-8")


def judged_table(folder: Path) -> str:
    """Each student beside the teacher in float32, with intervals over documents."""
    lines = []
    for student in DistillationRun.load(folder):
        assert student.judged is not None
        figures = student.judged.figures
        shown = [figures[name].show(".3f") for name in ("kl", "above_teacher", "agreement")]
        lines.append([str(student.width), str(student.seed), *shown])
    return table(
        ["width", "seed", "KL(teacher ‖ student)", "cross-entropy above the teacher's", "top-1 agreement"], lines
    )


def law_table(found: list[dict[str, Any]], seen: dict[int, list[float]]) -> str:
    """A row for each dictionary, below what was observed."""
    observed = [number(float(np.mean(seen[width])) if width in seen else None) for width in WIDTHS]
    lines = [[REACHED, "", "", "", *observed, ""]]
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
