"""Writes docs/results/rivals.json and the tables of docs/results/rivals.md: `python docs/write_rivals.py runs/rivals`.

The folder is what the command that the page names has written. A rank bound that is above what a student reached would
be no bound, and is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from write_record import TEACHER
from write_results import RESULTS, filled, table
from write_splice import observed

from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.runtime.units import NATS

PAGE = RESULTS / "rivals.md"


def longest() -> dict[int, list[float]]:
    """The mean of the last tenth of each student of a width: those of embedded_floor.md, with 20 million tokens, and
    those of other widths in splice.json, with 10.
    """
    losses = observed([])
    for row in json.loads((RESULTS / "splice.json").read_text(encoding="utf-8")):
        if row["teacher"] == TEACHER and row["observed_seeds"]:
            losses.setdefault(row["width"], row["observed_seeds"])
    return losses


def reached() -> dict[int, list[float]]:
    """The mean of the last tenth of every committed student of a width, with 20, 10 and 4 million tokens."""
    losses = longest()
    for row in json.loads((RESULTS / "embedded_floor_4m.json").read_text(encoding="utf-8")):
        losses.setdefault(row["width"], []).append(row["last_tenth"])
    return losses


def check(forecasts: Forecasts, losses: Mapping[int, list[float]]) -> None:
    """Refuse a bound that lies above a student.

    Raises:
        ValueError: names the width.
    """
    for width, floor in forecasts.floors("rank_bound").items():
        if width in losses and floor.value > min(losses[width]):
            raise ValueError(
                f"a student of width {width} reached {min(losses[width]):.4f}, below the rank bound {floor.value:.4f}:"
                " the search has not settled, so allow more --iterations"
            )


def rows(forecasts: Forecasts, losses: Mapping[int, list[float]]) -> list[dict[str, Any]]:
    """Each record as a row, with what students of its width reached."""
    return [{**record.to_json(), "observed_seeds": losses.get(record.width, [])} for record in forecasts]


def floors_table(forecasts: Forecasts, losses: Mapping[int, list[float]], reached: str = "**observed**") -> str:
    """A row for each predictor and hook point, a column for each width; above them, what students reached."""
    widths = sorted({record.width for record in forecasts})
    students = [f"{sum(losses[w]) / len(losses[w]):.3f}" if w in losses else "not yet" for w in widths]
    lines: list[list[Any]] = [[reached, "", *students]]
    for (predictor, hook, *_), by_width in forecasts.series.items():
        in_nats = by_width[min(by_width)].unit == NATS
        form, unit = (".3f", "") if in_nats else (",.0f", f" ({by_width[min(by_width)].unit})")
        values = [f"{by_width[width].floor.value:{form}}" if width in by_width else "not run" for width in widths]
        lines.append([f"`{predictor}`{unit}", hook and f"`{hook}`", *values])
    return table(["predictor", "hook point", *(f"d={width}" for width in widths)], lines)


def bound_table(forecasts: Forecasts, losses: Mapping[int, list[float]]) -> str:
    """The bound beside the lowest student of each width, and an extrapolation of its curve."""
    fits: dict[int, list[dict[str, Any]]] = {}
    for row in json.loads((RESULTS / "embedded_floor.json").read_text(encoding="utf-8")):
        fits.setdefault(row["width"], []).append(row)
    lines = []
    for width, floor in forecasts.floors("rank_bound").items():
        if width not in losses:
            continue
        searched = forecasts.about["parts"]["rank_bound"]["searches"][str(width)]
        fit = min(fits.get(width, ()), key=lambda row: float(row["observed_floor"]), default=None)
        lines.append(
            [
                width,
                floor.show(".4f"),
                f"{min(losses[width]):.3f}",
                "not fitted"
                if fit is None
                else f"{fit['observed_floor']:.3f} [{fit['observed_low']:.3f}, {fit['observed_high']:.3f}]",
                searched["iterations"],
                f"{searched['gain']:.1%}",
            ]
        )
    header = ["width", "rank bound", "lowest student", "lowest L∞ of a fit", "iterations", "gained in the last twenty"]
    return table(header, lines)


def main(folder: str) -> None:
    forecasts, losses = Forecasts.load(folder), longest()
    check(forecasts, reached())
    text = json.dumps(rows(forecasts, losses), indent=1, ensure_ascii=False) + "\n"
    (RESULTS / "rivals.json").write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for name, content in (("floors", floors_table), ("bounds", bound_table)):
        page = filled(page, name, content(forecasts, losses), "docs/write_rivals.py")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
