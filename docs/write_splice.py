"""Writes docs/results/splice.json, the tables of docs/results/splice.md and worth.md, and the package's record of how
far such predictions were off: `python docs/write_splice.py runs`.

The folder holds what the commands that the page names have written: `saes/NAME`, dictionaries that train-sae trained,
`splice/*`, measurements of them, and beside each `splice/*-s`, its splice. A prediction that stands in splice.json
keeps its number; only what was observed is added later. So do the rows of dictionaries that are not in the folder.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from write_record import LAWS, TEACHER, TEACHER_WIDTH
from write_record import write as write_record
from write_results import RESULTS, filled, table

from tl_capacity import Measurement, Spliced, theory
from tl_capacity.distillation.effective import effective_widths
from tl_capacity.distillation.observed import observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement

WIDTHS = (16, 20, 24, 32, 40, 48, 56, 64, 80, 96)
HOOK = "blocks.3.hook_resid_post"
"""The hook point of most dictionaries."""
MISSING = "not computed"
"""A cell for a dictionary that is not in the folder."""
NEW = (20, 40, 56, 80)
"""Widths for which no student had been trained when their floors were predicted."""
BUDGET, SHARE = LAWS
CONSISTENT = "d·g(α), interpolated to d* = d_T"
ARCHITECTURES = {"topk": "TopK", "standard": "ReLU", "jumprelu": "JumpReLU"}
PAPERS = {8: (31_006, 234.9), 12: (28_665, 218.29), 16: (29_169, 248.96)}
"""F and L0 of the paper's dictionaries (arXiv:2604.04037), by layer."""
PAPERS_WIDTH = 1_024


def curves(runs: Path) -> Iterator[tuple[HookMeasurement, SplicedCurve, dict[str, Any]]]:
    """Each dictionary's measurement, its curve by the paper's importance, and its training settings."""
    for folder in sorted(runs.glob("splice/*-s")):
        measurement = Measurement.load(folder.with_name(folder.name.removesuffix("-s")))
        for curve in Spliced.load(folder):
            [hook] = [h for h in measurement if h.sae_digest == curve.sae_digest]
            trained = json.loads((runs / "saes" / Path(hook.sae).name / "training.json").read_text())
            yield hook, curve, trained


def kept(law: str, hook: HookMeasurement, width: int) -> int:
    """Features that a width keeps."""
    at = context_at(hook, hook.importance(), hook.summary.alpha.value)
    return kept_features(plugins().capacity_laws[LAWS[law]], width, at)


def rows(runs: Path) -> list[dict[str, Any]]:
    """A row for each dictionary, law and width."""
    return [
        row
        for hook, curve, trained in curves(runs)
        for row in rows_of(TEACHER, hook, curve, trained["settings"], WIDTHS)
    ]


def rows_of(
    teacher: str, hook: HookMeasurement, curve: SplicedCurve, settings: dict[str, Any], widths: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each law and width of one dictionary, with its training settings."""
    summary = hook.summary
    about = {
        "teacher": teacher,
        "hook": hook.hook,
        "sae": Path(hook.sae).name,
        "architecture": settings["architecture"],
        "k": settings["k"] if settings["architecture"] == "topk" else None,
        "d_sae": summary.d_sae,
        "alive": int(summary.n_alive.value),
        "l0": summary.l0.value,
        "g": summary.capacity.value,
        "d_star": summary.critical_width.value,
        "error": curve.error.value,
    }
    for law in LAWS:
        for width in widths:
            yield {**about, "law": law, **predicted(curve.at(kept(law, hook, width)), width)}


def predicted(estimate: Estimate, width: int) -> dict[str, Any]:
    """The fields of a row that state a prediction."""
    return {"width": width, "predicted": estimate.value, "low": estimate.low, "high": estimate.high}


def interpolated(found: list[dict[str, Any]], teacher: str, teacher_width: int) -> Iterator[dict[str, Any]]:
    """For each hook point, architecture and size of dictionary, the prediction at d* = d_T, log-linear in d* between
    the two nearest dictionaries. The interval is interpolated between the two intervals in the same way.
    """
    groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in found:
        if row["law"] == BUDGET:
            groups.setdefault((row["hook"], row["architecture"], row["d_sae"], row["width"]), []).append(row)
    for (hook, architecture, d_sae, width), members in groups.items():
        members.sort(key=lambda row: row["d_star"])
        stars = np.array([row["d_star"] for row in members])
        if not stars[0] <= teacher_width <= stars[-1]:
            continue
        at = {
            name: float(np.exp(np.interp(np.log(teacher_width), np.log(stars), np.log([row[name] for row in members]))))
            for name in ("predicted", "low", "high", "l0", "error")
        }
        yield {
            "teacher": teacher,
            "hook": hook,
            "sae": f"{len(members)} {ARCHITECTURES[architecture]} dictionaries of {d_sae:,} latents",
            "architecture": architecture,
            "k": None,
            "d_sae": d_sae,
            "d_star": float(teacher_width),
            "law": CONSISTENT,
            "width": width,
            **at,
        }


def observed(distillations: list[Path]) -> dict[int, list[float]]:
    """The mean of the last tenth of each student of a width, those of embedded_floor.md and others."""
    losses: dict[int, list[float]] = {}
    page = (RESULTS / "embedded_floor.md").read_text(encoding="utf-8")
    for width, last_tenth in re.findall(r"^\| (\d+) \| \d+ \| ([\d.]+) \|", page, re.MULTILINE):
        losses.setdefault(int(width), []).append(float(last_tenth))
    add_reached(losses, distillations)
    return losses


def add_reached(losses: dict[int, list[float]], distillations: Iterable[Path]) -> None:
    """Add the mean of the last tenth of each student, by its width."""
    for folder in distillations:
        for floor in observed_floors(DistillationRun.load(folder)):
            losses.setdefault(floor.width, []).append(floor.last_tenth)


def with_observed(
    row: dict[str, Any], before: Mapping[tuple[Any, ...], dict[str, Any]], seen: Mapping[int, list[float]], new: bool
) -> dict[str, Any]:
    """A row with what students reached. A committed prediction stays as it was.

    Args:
        before: the committed rows.
        seen: what students of each width reached.
        new: whether no student of its width had been trained when this was first predicted.
    """
    values, earlier = seen.get(row["width"], []), before.get(key(row), {})
    return {
        **row,
        **{name: earlier[name] for name in ("predicted", "low", "high") if name in earlier},
        "observed": float(np.mean(values)) if values else None,
        "observed_seeds": values,
        "committed_before": earlier.get("committed_before", new and not values),
    }


def write(runs: Path, distillations: list[Path]) -> None:
    """Replace splice.json and the tables of both pages. Existing predictions stay as they were committed."""
    path = RESULTS / "splice.json"
    every = json.loads(path.read_text(encoding="utf-8"))
    before = {key(row): row for row in every if row["teacher"] == TEACHER}
    others = [row for row in every if row["teacher"] != TEACHER]
    seen = observed(distillations)
    new = rows(runs)
    there = {(row["hook"], row["sae"]) for row in new}
    new += [row for row in before.values() if row["law"] != CONSISTENT and (row["hook"], row["sae"]) not in there]
    found = [
        with_observed(row, before, seen, row["width"] in NEW)
        for row in [*new, *interpolated(new, TEACHER, TEACHER_WIDTH)]
    ]
    path.write_text(json.dumps(found + others, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = RESULTS / "splice.md"
    text = page.read_text(encoding="utf-8")
    for name, law in (("budget", BUDGET), ("proportional", SHARE), ("consistent", CONSISTENT)):
        text = filled(text, name, law_table(found, law), "docs/write_splice.py")
    text = filled(text, "spread", spread_table(found), "docs/write_splice.py")
    text = filled(text, "paper", paper_table(), "docs/write_splice.py")
    if distillations:
        text = filled(text, "curves", curves_table(distillations), "docs/write_splice.py")
    page.write_text(text, encoding="utf-8")
    page = RESULTS / "worth.md"
    text = page.read_text(encoding="utf-8")
    text = filled(text, "worth", worth_table(runs, seen, cells_of(text, "worth")), "docs/write_splice.py")
    page.write_text(text, encoding="utf-8")


def law_table(found: list[dict[str, Any]], law: str) -> str:
    """A row for each dictionary by one law, below what was observed."""
    mine = [row for row in found if row["law"] == law]
    header = ["dictionary", "L0", "d*", *(f"d={width}" for width in WIDTHS), "all latents"]
    lines = [
        ["**observed**", "", "", *(number(observed_at(mine, width)) for width in WIDTHS), ""],
    ]
    for hook, name in dict.fromkeys((row["hook"], row["sae"]) for row in mine):
        of = {row["width"]: row for row in mine if (row["hook"], row["sae"]) == (hook, name)}
        any_row = of[WIDTHS[0]]
        cells = [number(of[width]["predicted"]) for width in WIDTHS]
        name = f"{name}, layer {hook.split('.')[1]}" if law == CONSISTENT else name
        lines.append([name, f"{any_row['l0']:.1f}", f"{any_row['d_star']:.0f}", *cells, number(any_row["error"])])
    return table(header, lines)


def cells_of(text: str, name: str) -> dict[str, dict[str, str]]:
    """The cells of a table of the present page, by the row's first cell and the column's heading."""
    lines = text.split(f"<!-- {name}, ", 1)[1].split(f"<!-- end of {name}", 1)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def worth_table(runs: Path, seen: dict[int, list[float]], before: dict[str, dict[str, str]]) -> str:
    """A row for each dictionary: the features per dimension that students of each width are worth."""
    widths = sorted(seen)
    law = plugins().capacity_laws[LAWS[BUDGET]]
    header = ["dictionary", "d*", "g(α)", *(f"d={width}" for width in widths)]
    found: dict[str, list[str]] = {}
    for hook, curve, _ in curves(runs):
        by_width = {width: tuple(map(Estimate, seen[width])) for width in widths}
        rows = effective_widths(hook, curve, by_width, law)
        worth = ["not reached" if r.per_dimension is None else r.per_dimension.show(".1f") for r in rows]
        summary = hook.summary
        figures = [f"{summary.critical_width.value:.0f}", f"{summary.capacity.value:.1f}"]
        found[Path(hook.sae).name] = [Path(hook.sae).name, *figures, *worth]
    earlier = {name: [cells.get(column, MISSING) for column in header] for name, cells in before.items()}
    lines = [*(earlier | found).values()]
    there = [place for place in range(len(header)) if any(line[place] != MISSING for line in lines)]
    return table([header[place] for place in there], [[line[place] for place in there] for line in lines])


def spread_table(found: list[dict[str, Any]]) -> str:
    """For each rule, how far its predictions lie apart over the TopK dictionaries of one layer, how far from what
    students reached, and how far apart where ReLU and JumpReLU are counted too.
    """
    found = [row for row in found if row["hook"] == HOOK]
    lines = []
    for law in (*LAWS, CONSISTENT):
        for width in WIDTHS:
            every = [row for row in found if (row["law"], row["width"]) == (law, width)]
            of = [row for row in every if row["architecture"] == "topk"]
            values, others = (np.array([row["predicted"] for row in some]) for some in (of, every))
            if not len(values):
                continue
            low, middle, high = values.min(), np.median(values), values.max()
            reached = observed_at(of, width)
            off = "not yet" if reached is None else f"{middle / reached - 1:+.0%}"
            spread = [f"{low:.3f}", f"{middle:.3f}", f"{high:.3f}", f"{high / low:.2f}"]
            also = f"{others.max() / others.min():.1f} ({len(others)})" if len(others) > len(values) else ""
            lines.append([law, str(width), str(len(values)), *spread, also, number(reached), off])
    header = ["rule", "width", "dictionaries", "lowest", "median", "highest", "highest / lowest", "of all kinds"]
    return table([*header, "observed", "median / observed − 1"], lines)


def curves_table(distillations: list[Path]) -> str:
    """For each student, its mean loss over three tenths of its training: in the middle and at the end of the constant
    rate, and the last tenth, after the rate fell.
    """
    lines = []
    for folder in distillations:
        run = DistillationRun.load(folder)
        for student in run:
            tokens, kl = np.array(student.tokens), np.array(student.heldout_kl)
            share = tokens / tokens[-1]
            middle, end, last = (
                float(kl[(share > start) & (share <= start + 0.1)].mean()) for start in (0.5, 0.7, 0.9)
            )
            figures = [f"{value:.3f}" for value in (middle, end, last, float(kl[-1]))]
            lines.append([str(student.width), str(student.seed), *figures, f"{end - middle:+.3f}"])
    header = ["width", "seed", "50–60%", "70–80%", "last tenth", "at the end", "change at constant rate"]
    return table(header, sorted(lines, key=lambda line: (int(line[0]), line[1])))


def paper_table() -> str:
    """The paper's dictionaries, and the L0 at which each would have d* = d_T with as many features."""
    lines = []
    for layer, (alive, l0) in PAPERS.items():
        star = float(theory.critical_width(alive, theory.sparsity(l0, alive)))
        consistent_l0 = brentq(
            lambda x, alive=alive: theory.critical_width(alive, theory.sparsity(x, alive)) - PAPERS_WIDTH, 1, l0
        )
        cells = [f"{alive:,}", f"{l0:.1f}", f"{star:,.0f}", f"{star / PAPERS_WIDTH:.2f}", f"{consistent_l0:.1f}"]
        lines.append([str(layer), *cells, f"{l0 / consistent_l0 - 1:+.0%}"])
    return table(["layer", "F", "L0", "d*", "d*/d_T", "L0 where d* = d_T", "L0 is off by"], lines)


def observed_at(found: list[dict[str, Any]], width: int) -> float | None:
    """What students of a width reached."""
    return next((row["observed"] for row in found if row["width"] == width), None)


def number(value: float | None) -> str:
    """Three decimals, or a text if there is no number yet."""
    return "not yet" if value is None else f"{value:.3f}"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a prediction. One between dictionaries is identified by their kind and size, because more may
    come.
    """
    dictionary = ("architecture", "d_sae") if row["law"] == CONSISTENT else ("sae",)
    return tuple(row[name] for name in ("teacher", "hook", *dictionary, "law", "width"))


if __name__ == "__main__":
    write(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
    write_record(Path(sys.argv[1]))
