"""Writes a sweep's results: `toy.md` with tables and computed sentences, `toy.json` with one object per student, and
figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_capacity.storage.files import make_folder, write_bytes, write_json
from tl_capacity.toy.figures import floors_figure, png, predictors_figure
from tl_capacity.toy.judging import predictions
from tl_capacity.toy.page import markdown
from tl_capacity.toy.predictors import predictors
from tl_capacity.toy.result import SweepResult


def write_report(result: SweepResult, folder: Path, command: str) -> None:
    """Write `toy.md`, `toy.json` and the figures. Files of these names in the folder are replaced.

    Args:
        command: what the sweep was run with.

    Raises:
        CapacityError: where figures cannot be drawn or the folder cannot be written.
    """
    make_folder(folder)
    chosen = predictors()
    students = predictions(result, chosen)
    for name, figure, (width, height) in (
        ("toy-floors", floors_figure(students, chosen), (1100, 760)),
        ("toy-predictors", predictors_figure(students, chosen), (1100, 360)),
    ):
        write_bytes(folder / f"{name}.png", png(figure, width, height))
    write_json(folder / "toy.json", student_list(result))
    write_bytes(folder / "toy.md", markdown(result, students, chosen, command).encode())


def student_list(result: SweepResult) -> list[dict[str, Any]]:
    """`{"n", "alpha", "width", "seed", "achieved_floor", "kept"}` of each converged student that was trained on the
    data.
    """
    students = result.students
    direct = students[(students.kind == "direct") & ~students.diverged]
    return [
        {
            "n": int(s.n),
            "alpha": float(s.alpha),
            "width": int(s.width),
            "seed": int(s.seed),
            "achieved_floor": float(s.achieved_floor),
            "kept": int(s.kept),
        }
        for s in direct.itertuples()
    ]
