"""Writes the tables and figures of docs/results/ on the embedded teacher's students: `python docs/write_results.py
runs`, or `… runs floors kept` for these two.

The folder holds what the commands that the pages name have written.
Only what stands between two marks is written; the text around it is for people to write, who must read the tables
first. The figures need plotly's static export (`pip install kaleido`) and Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tl_capacity import Measurement
from tl_capacity.distillation.candidates import short_names
from tl_capacity.distillation.decomposition import Decomposition, decompose_floors
from tl_capacity.distillation.observed import ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.standings import candidate_cells, league_cells
from tl_capacity.models.loading import load_config
from tl_capacity.plan.costs import parameters_of_widths
from tl_capacity.predict.predictors import forecasts_of
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery_row import COUNT_LABELS
from tl_capacity.probing.rows import COMPONENTS, EMBEDDINGS, RANDOM, TRAINED
from tl_capacity.probing.saved_probes import Probes
from tl_capacity.results.naming import middle
from tl_capacity.show.figures import series_figure

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Runs:
    """The folders that the pages' commands write."""

    folder: Path

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())

    def distillation(self, path: str) -> DistillationRun:
        return DistillationRun.load(self.folder / path)

    @property
    def probes(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """By kind, model and concept."""
        return {(row["kind"], row["model"], row["concept"]): row for row in self.json("probes/probes.json")["probes"]}


def floors(runs: Runs) -> str:
    predicted = {row["width"]: row["predicted_floor"] for row in runs.json("full/floors.json")}
    rows = [
        [
            floor.width,
            floor.seed,
            f"{floor.last_tenth:.3f}",
            f"{floor.value:.3f} [{floor.low:.3f}, {floor.high:.3f}]",
            f"{predicted[floor.width]:,.0f}",
        ]
        for floor in observed_floors(runs.distillation("full/distillation"))
    ]
    return table(
        ["width", "seed", "last tenth, nats per token", "L∞ of the fit [95%]", "predicted, layer 3, latent²"], rows
    )


def printed_floors() -> list[ObservedFloor]:
    """The floors as the page prints them. The league can be made from them without the distillation."""
    number, interval = r"([\d.]+)", r"([\d.]+) \[([\d.]+), ([\d.]+)\]"
    row = re.compile(rf"^\| (\d+) \| (\d+) \| {number} \| {interval} \|", re.MULTILINE)
    return [
        ObservedFloor(
            f"width{w}-seed{s}", int(w), int(s), "truncated", float(fit), float(low), float(high), float(last)
        )
        for w, s, last, fit, low, high in row.findall((RESULTS / "embedded_floor.md").read_text(encoding="utf-8"))
    ]


def decomposed(runs: Runs, observed: str = "last_tenth") -> Decomposition:
    measurement, floors = Measurement.load(runs.folder / "nats"), printed_floors()
    widths = sorted({floor.width for floor in floors})
    costs = parameters_of_widths(load_config("embedded"), widths)
    parameters = {width: body for width, (_, body) in costs.items()}
    hook = middle(measurement)
    forecasts = forecasts_of(measurement, widths, parameters=parameters)
    return decompose_floors(
        floors, forecasts, ("importance", hook.hook, hook.sae, "compressed_sensing", "second_moment"), observed
    )


def league(runs: Runs) -> str:
    """The verdict for each way to read the floor, with its league."""
    parts = []
    for observed in ("last_tenth", "fit"):
        decomposition = decomposed(runs, observed)
        verdict = decomposition.verdict()
        cells = league_cells(decomposition.groups, short_names(fit.candidate for fit in decomposition.fits))
        parts.append(f"**{verdict[:1].upper()}{verdict[1:]}.**\n\n{table(*cells)}")
    return "\n".join(parts)


def candidates(runs: Runs) -> str:
    decomposition = decomposed(runs)
    short = short_names(fit.candidate for fit in decomposition.fits)
    header, rows = candidate_cells(decomposition.shown(), decomposition.chosen, short)
    return table(header, rows) + f"\n{len(decomposition.fits)} candidates in all.\n"


def tokens(runs: Runs) -> str:
    """Last-tenth losses of runs that each completed the schedule. Of several seeds, the first."""
    folders = {"0.5M": "scan/500000", "1M": "scan/1000000", "2M": "scan/2000000", "20M": "full/distillation"}
    seen = {
        length: {f.width: f.last_tenth for f in observed_floors(runs.distillation(path)) if f.seed == 0}
        for length, path in folders.items()
    }
    kept = json.loads((RESULTS / "embedded_floor_4m.json").read_text())  # of another machine, whose runs were not kept
    seen["4M"] = {row["width"]: row["last_tenth"] for row in kept if row["seed"] == 0}
    lengths = ["0.5M", "1M", "2M", "4M", "20M"]
    rows = []
    for width in sorted(seen["20M"]):
        losses = [round(seen[length][width], 3) for length in lengths]
        rows.append(
            [
                width,
                *(f"{loss:.3f}" for loss in losses),
                *(f"{before - after:.3f}" for before, after in pairwise(losses)),
            ]
        )
    return table(
        [
            "width",
            *(f"{length} tokens" for length in lengths),
            *(f"gained from {before} to {after}" for before, after in pairwise(lengths)),
        ],
        rows,
    )


def starts(runs: Runs) -> str:
    named = {"truncated": runs.distillation("scan/1000000"), "random": runs.distillation("scan/random")}
    first = {
        start: {student.width: student.heldout_kl[0] for student in run if student.seed == 0}
        for start, run in named.items()
    }
    last = {
        start: {floor.width: floor.last_tenth for floor in observed_floors(run) if floor.seed == 0}
        for start, run in named.items()
    }
    rows = [
        [width, *(f"{losses[start][width]:.3f}" for losses in (first, last) for start in named)]
        for width in last["random"]
    ]
    return table(
        ["width", *(f"{start}, {when}" for when in ("before the first step", "at the end") for start in named)], rows
    )


def features(runs: Runs) -> str:
    rows = []
    for row in runs.json("recover/recoverability.json"):
        intervals, overlap = row["intervals"], row["overlap"]
        named = {"student": "kept", "pca": "kept_pca", "random": "kept_random"}
        counts = {
            name: f"{row[kept]:,} [{intervals[name][0]:,.0f}, {intervals[name][1]:,.0f}]"
            for name, kept in named.items()
        }
        shares = [f"{overlap[name]:.0%}" for name in ("kept_of_predicted", "kept_of_all")]
        seed = row["student"].rpartition("seed")[2]
        rows.append(
            [
                row["width"],
                seed,
                counts["student"],
                f"{row['budget']:,.0f}",
                f"{row['equilibrium']:,.0f}",
                counts["pca"],
                counts["random"],
                *shares,
            ]
        )
    header = [
        "width",
        "seed",
        "kept by the student",
        "d·g(α)",
        "equilibrium law",
        "teacher's PCA of that width",
        "random weights",
    ]
    return table([*header, "of the F_S predicted, kept", "by chance"], rows)


def concepts(runs: Runs) -> str:
    probes, named = runs.probes, runs.json("probes/probes.json")["concepts"]
    teacher = next(iter(probes))[1]
    students = [
        model
        for kind, model, concept in probes
        if kind == TRAINED and concept == named[0]["name"] and (model == teacher or model.endswith("seed0"))
    ]
    rows = []
    for concept in named:
        name, words = concept["name"], probes[EMBEDDINGS, teacher, concept["name"]]
        trained = [probes[TRAINED, model, name] for model in students]
        rows.append(
            [
                " or ".join(concept["classes"]),
                f"{words['accuracy']:.2f}",
                *(f"{probe['accuracy']:.2f} [{probe['low']:.2f}, {probe['high']:.2f}]" for probe in trained),
                *(
                    f"{trained[0][name]:.2f} [{trained[0][f'{name}_low']:.2f}, {trained[0][f'{name}_high']:.2f}]"
                    for name in ("auroc", "selectivity")
                ),
                concept["falls_at"] or "–",
            ]
        )
    widths = [
        f"d = {probes[TRAINED, model, named[0]['name']]['width']}" + " (teacher)" * (model == teacher)
        for model in students
    ]
    return table(["concept", EMBEDDINGS, *widths, "AUROC (teacher)", "selectivity (teacher)", "falls at"], rows)


def baselines(runs: Runs) -> str:
    """Means over concepts. An interval would need the concepts' texts resampled together."""
    probes = runs.probes
    rows = []
    for kind, model, _ in dict.fromkeys((kind, model, "") for kind, model, _ in probes if kind == TRAINED):
        width = next(row["width"] for (k, m, _), row in probes.items() if (k, m) == (kind, model))
        means = [
            [row["accuracy"] for (k, m, _), row in probes.items() if (k, m) == (other, model)]
            for other in (TRAINED, COMPONENTS, RANDOM)
        ]
        rows.append([model, width, *(f"{np.mean(some):.3f}" if some else "–" for some in means)])
    return table(["model", "width", *(TRAINED, COMPONENTS, RANDOM)], rows)


def few_features(runs: Runs) -> str:
    rows = []
    for sparse in runs.json("probes/probes.json")["sparse"]:
        if len(sparse["features"]) in (1, 4):
            ranks = ", ".join("–" if rank is None else f"{rank:,}" for rank in sparse["ranks"])
            shown = f"{sparse['accuracy']:.2f} [{sparse['low']:.2f}, {sparse['high']:.2f}]"
            rows.append(
                [
                    sparse["concept"],
                    len(sparse["features"]),
                    shown,
                    ranks,
                    sparse["lost_below"] or "–",
                    sparse["falls_at"] or "–",
                ]
            )
    return table(
        [
            "concept",
            "features",
            "accuracy",
            "importance ranks",
            "the law keeps all from width",
            "the full probe falls at width",
        ],
        rows,
    )


TABLES: dict[str, dict[str, Callable[[Runs], str]]] = {
    "embedded_floor.md": {
        "floors": floors,
        "league": league,
        "candidates": candidates,
        "tokens": tokens,
        "starts": starts,
    },
    "probing.md": {"features": features, "concepts": concepts, "baselines": baselines, "few features": few_features},
}


def kept_figure(runs: Runs) -> Any:
    """Kept features against the width."""
    recoverability = Recoverability.from_json(runs.json("recover/recoverability.json"))
    rows = [
        {
            "series": label,
            "width": row.width,
            "value": number.value,
            "low": number.low,
            "high": number.high,
            "baseline": label != COUNT_LABELS["kept"],
        }
        for row in recoverability.rows
        for label, number in row.labelled.items()
    ]
    return series_figure(rows, f"features with AUROC ≥ τ = {recoverability.rows[0].tau:g}").update_layout(
        width=900, height=460
    )


def concepts_figure(runs: Runs) -> Any:
    return Probes.from_json(runs.json("probes/probes.json")).plot().update_layout(width=1100)


FIGURES: dict[str, Callable[[Runs], Any]] = {"kept": kept_figure, "concepts": concepts_figure}


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def filled(text: str, name: str, content: str, by: str = "docs/write_results.py") -> str:
    """A page with one table replaced."""
    begin, end = f"<!-- {name}, by {by} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = text.partition(begin)
    if end not in rest:
        raise ValueError(
            f"the page has no place for the table of {name}: put {begin.strip()} and {end.strip()} where it belongs"
        )
    return before + begin + content + end + rest.split(end, 1)[1]


COPIES = {"embedded_floor.json": "full/floors.json", "recoverability.json": "recover/recoverability.json"}


def main(folder: str, names: Sequence[str]) -> None:
    runs = Runs(Path(folder))

    def wanted(name: str) -> bool:
        return name in names or not names

    for page, tables in TABLES.items():
        text = (RESULTS / page).read_text(encoding="utf-8")
        for name, make in tables.items():
            if wanted(name):
                text = filled(text, name, make(runs))
        (RESULTS / page).write_text(text, encoding="utf-8")
    for name, draw in FIGURES.items():
        if wanted(name):
            draw(runs).write_image(RESULTS / f"{name}.png", scale=1.5)
    for name, path in COPIES.items():
        if wanted(name):
            shutil.copy(runs.folder / path, RESULTS / name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
