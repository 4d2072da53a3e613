"""Runs the experiment of docs/results/placement.md on the embedded teacher, and writes placement.json and placement.md:
`python docs/write_placement.py runs/placement`.

Every stage is kept in the folder, and the same command goes on where it stopped. At each width: train plain students;
choose features that they lost and that the law gives up, and as many random ones, on text that judges nothing; train
students that are asked for either; price both; and see what splicing the teacher predicts for them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tl_capacity.recipes import placement as recipe
from tl_capacity.recipes.placement import PlacementConfig
from write_results import RESULTS, filled, table

from tl_capacity import Measurement, Spliced, splice
from tl_capacity.distillation.settings import KeepFeatures
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measure.setup import as_measured, measured_dictionary, measured_teacher
from tl_capacity.models.defaults import row_length
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.placement import Placement
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.recovery import Recovery
from tl_capacity.results.estimate import Estimate, estimate_around
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.storage.files import make_folder, write_bytes, write_json
from tl_capacity.text.counting import CountingRule

HOOK = "blocks.3.hook_resid_post"
CHOSEN_ON, JUDGED_ON = "embedded", "embedded:heldout"
SETS = {"lost": "lost and given up", "random": "random"}
CHOICE = (
    "*Lost and given up* are 100 features that the plain students lost and that the law gives up. Each fires often"
    " enough to be judged. A readout of the teacher finds it, and no readout of a plain student does, with either seed."
    " It is not among the F_S most important ones. Of all such features these are the most important. *Random* are 100"
    f" of all that are judged. Both sets were chosen on `{CHOSEN_ON}`, which judges nothing here. All figures are of"
    f" `{JUDGED_ON}`.",
    "[Kept](../keep.md#the-price-list) means that a readout finds a feature with an AUROC of at least 0.95. KL is in"
    " nats per token at T = 1. Figures are means over seeds, with 95% intervals over documents. *Splice predicts* is a"
    " difference of two [spliced floors](../splice.md) with equally many features. The first keeps the chosen features"
    " and the most important others. The second keeps the most important ones.",
)
EMPTY = """# The price of choosing what students keep

<!-- prices, by docs/write_placement.py -->
<!-- end of prices -->
"""
"""The page before anybody wrote what the figures mean."""
COMMIT = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]


@dataclass(frozen=True)
class Experiment:
    """The settings and stages of the experiment.

    Attributes:
        runs: the folder of all stages.
        source: what students are trained on.
        features: how many are chosen.
        choose_tokens, splice_tokens: read to choose features, and to splice.
        device: where the models run.
        given: other settings of each placement, as its command has them.
    """

    runs: Path
    source: str
    features: int
    measure_tokens: int
    choose_tokens: int
    splice_tokens: int
    device: str
    given: dict[str, Any]

    @cached_property
    def measurement(self) -> Measurement:
        """The teacher's measurement at the hook point, made if it does not exist."""
        settings = MeasureSettings(
            "embedded", self.runs / "measurement", (HOOK,), tokens=self.measure_tokens, resume=True, device=self.device
        )
        there = (self.runs / "measurement" / "measurement.json").exists()
        return Measurement.load(settings.out) if there else measure(settings)

    @cached_property
    def hook(self) -> HookMeasurement:
        return self.measurement[HOOK]

    @cached_property
    def teacher(self) -> LoadedModel:
        return measured_teacher(self.runs / "measurement", self.measurement.provenance, self.device)

    @cached_property
    def sae(self) -> Any:
        return measured_dictionary(self.hook, self.teacher, self.measurement.provenance)

    def budget(self, width: int) -> int:
        """F_S, the features that the default law gives a width."""
        at = context_at(self.hook, self.hook.importance(None), self.hook.summary.alpha.value)
        return kept_features(plugins().capacity_laws.default, width, at)

    def config(self, width: int, out: str, keep: str = "", weights: Sequence[float] = (0.0,)) -> PlacementConfig:
        """The settings of a placement at one width."""
        return PlacementConfig(
            measurement=self.runs / "measurement",
            keep=keep,
            widths=(width,),
            weights=tuple(weights),
            out=self.runs / out,
            source=self.source,
            heldout=JUDGED_ON,
            device=self.device,
            **self.given,
        )

    def plain(self, width: int) -> dict[str, LoadedModel]:
        """The plain students of a width, trained if they do not exist."""
        config = self.config(width, f"plain-{width}")
        nothing = KeepFeatures(HOOK, (0,))
        run = recipe.train(config, self.teacher, (width,), nothing, 0.0, self.sae, JUDGED_ON)
        folder = config.out / "weight-0" / "students"
        return {student.name: load_model(str(folder / student.name), device=self.device) for student in run}

    def chosen(self, width: int) -> dict[str, Path]:
        """The files of chosen features of a width, by the name of the set."""
        files = {name: self.runs / f"{name}-{width}.json" for name in SETS}
        if not all(file.exists() for file in files.values()):
            recovery = self._recovered(self.plain(width))
            lost, random = choose(recovery, self.hook, self.budget(width), self.features)
            for name, features in (("lost", lost), ("random", random)):
                write_json(files[name], {"hook": HOOK, "features": features.tolist()})
        return files

    def _recovered(self, students: dict[str, LoadedModel]) -> Recovery:
        """What plain students keep, on text that is not used for judging."""
        provenance = self.measurement.provenance
        return recover_features(
            self.teacher.model,
            self.sae,
            {name: student.model for name, student in students.items()},
            as_measured(CHOSEN_ON, self.teacher.tokenizer, provenance, row_length(self.teacher.model.config)),
            measured=self.hook,
            max_tokens=self.choose_tokens,
            rule=CountingRule.recorded(provenance.settings),
        )

    def placed(self, width: int, name: str, weights: Sequence[float]) -> Placement:
        """The price list of a set. Its plain students are those by which the features were chosen."""
        out, file = f"{name}-{width}-priced", self.chosen(width)[name]
        if (self.runs / out / "placement.json").exists():
            return Placement.load(self.runs / out)
        config = self.config(width, out, str(file), weights)
        plain = config.out / "weight-0"
        if not (plain / "distillation.json").exists():
            shutil.copytree(self.runs / f"plain-{width}" / "weight-0", plain, dirs_exist_ok=True)
        recipe.main(config)
        return Placement.load(config.out)

    def predicted(self, width: int, name: str, features: Sequence[int]) -> Estimate:
        """The price of keeping these features, predicted by splicing: the KL with them and the most important others,
        as many as the law gives the width, minus the KL with the most important ones.
        """
        out, kept = self.runs / f"{name}-{width}-spliced", self.budget(width)
        if not (out / "splice.json").exists():
            ranked = [int(feature) for feature in self.hook.ranked(None)]
            first = [*features, *(feature for feature in ranked if feature not in set(features))]
            text = as_measured(JUDGED_ON, self.teacher.tokenizer, self.measurement.provenance, 256)
            saes, tokens = {HOOK: self.sae}, self.splice_tokens
            orders = {"chosen first": first}
            splice(
                self.teacher.model, self.measurement, text, saes=saes, kept=[kept], orders=orders, max_tokens=tokens
            ).save(out)
        usual, asked = sorted(Spliced.load(out), key=lambda curve: curve.order == "chosen first")
        price = asked.at(kept).value - usual.at(kept).value
        if usual.replicates is None or asked.replicates is None:
            return Estimate(price)
        place = usual.kept.index(kept)
        return estimate_around(price, asked.replicates[:, place] - usual.replicates[:, place])


def choose(
    recovery: Recovery, hook: HookMeasurement, budget: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Features that plain students lost, and random ones.

    Lost are those that fire often enough to be judged, that a readout of the teacher tells, that no readout of a plain
    student tells, whatever its seed, and that are not among the most important that the law gives the width. Of these
    the most important are taken. The random ones are drawn from all that are judged, with seed 0.
    """
    told = recovery.kept(recovery.teacher)
    for student in recovery.students:
        told &= ~recovery.kept(student.student)
    lost = set(recovery.features[told].tolist()) - set(hook.ranked(None)[:budget].tolist())
    ranked = [int(feature) for feature in hook.ranked(None) if feature in lost]
    judged = recovery.features[recovery.judged]
    drawn = np.random.default_rng(0).choice(judged, min(count, len(judged)), replace=False)
    return np.array(ranked[:count], dtype=np.int64), np.sort(drawn)


def rows_of(name: str, placement: Placement, predicted: Estimate) -> list[dict[str, Any]]:
    """A row for each weight of a set at one width."""
    return [
        {
            "set": name,
            "features": len(placement.features),
            "judged": placement.n_chosen,
            "others_judged": placement.n_others,
            "teacher_chosen": placement.teacher["chosen"].value,
            **price.to_json(),
            "predicted_price": predicted.to_json(),
        }
        for price in placement.prices
    ]


def sentences(width: int, placements: dict[str, Placement], predicted: dict[str, Estimate]) -> list[str]:
    """What a width showed, in sentences made from its numbers."""
    said = []
    for name, placement in placements.items():
        plain, *asked = placement.of_width(width)
        best = max(asked, key=lambda price: price.chosen.value)
        gained, paid, lost = (each or Estimate(0.0) for each in (best.gained, best.paid, best.lost))
        more = Estimate(-lost.value, *(None if end is None else -end for end in (lost.high, lost.low)))
        said.append(
            f"- Width {width}, {SETS[name]}: plain students keep {plain.chosen.show(',.1f')} of {placement.n_chosen}"
            f" judged. At weight {best.weight:g} students keep {best.chosen.show(',.1f')}, a change of"
            f" {gained.show('+,.1f')}. The number of other kept features changes by {more.show('+,.1f')}, and the KL by"
            f" {paid.show('+.3f')} nats per token. Splicing predicts {predicted[name].show('+.3f')}."
        )
    return said


def measured(found: list[dict[str, Any]], said: list[str], command: str, about: str) -> str:
    """The part of placement.md that comes from the experiment."""
    header = ["width", "set", "weight", "chosen kept", "others kept", "KL", "paid", "per feature", "splice predicts"]
    lines = [
        [
            row["width"],
            SETS[row["set"]],
            f"{row['weight']:g}",
            f"{shown(row['chosen'], ',.1f')} of {row['judged']}",
            f"{shown(row['others'], ',.1f')} of {row['others_judged']:,}",
            shown(row["kl"], ".3f"),
            shown(row["paid"], "+.3f"),
            shown(row["per_feature"], ".2g"),
            shown(row["predicted_price"], "+.3f") if row["paid"] else "",
        ]
        for row in found
    ]
    return "\n".join(
        [
            "```console",
            f"$ {command}",
            "```",
            "",
            about,
            "",
            *said,
            "",
            table(header, lines),
            *(part for sentences in CHOICE for part in (sentences, "")),
        ]
    )


def shown(estimate: dict[str, Any] | None, digits: str) -> str:
    """A saved estimate; empty if there is none."""
    return "" if estimate is None else Estimate(**estimate).show(digits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what does not exist yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--source", default="runs/embedded-teacher/train.jsonl", help="text to train students on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--widths", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="of chosen features")
    parser.add_argument("--device", default="cpu", help="where the models run")
    parser.add_argument("--machine", default=f"the CPU of {platform.machine()}", help="as the page names it")
    parser.add_argument("--commit", help="at which students were trained; by default that of the folder")
    for name, default in {
        "features": 100,
        "tokens": 4_000_000,
        "measure-tokens": 400_000,
        "choose-tokens": 400_000,
        "judge-tokens": 130_000,
        "splice-tokens": 17_500,
        "heldout-tokens": 16_384,
        "evaluations": 40,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(arguments)
    same = ("tokens", "judge_tokens", "heldout_tokens", "evaluations", "threads")
    given = {name: getattr(asked, name) for name in same} | {"seeds": tuple(asked.seeds), "repeat": True}
    tokens = asked.measure_tokens, asked.choose_tokens, asked.splice_tokens
    experiment = Experiment(asked.runs, asked.source, asked.features, *tokens, asked.device, given)
    make_folder(asked.runs)
    found, said = [], []
    for width in asked.widths:
        placements: dict[str, Placement] = {}
        predicted: dict[str, Estimate] = {}
        for name in asked.sets:
            placements[name] = experiment.placed(width, name, asked.weights)
            predicted[name] = experiment.predicted(width, name, placements[name].features)
            found += rows_of(name, placements[name], predicted[name])
        said += sentences(width, placements, predicted)
    widths, seeds, weights = (
        " ".join(map(str, values)) for values in (asked.widths, asked.seeds, [f"{w:g}" for w in asked.weights])
    )
    command = f"python docs/write_placement.py runs/placement --widths {widths} --seeds {seeds} --weights {weights}"
    commit = asked.commit or subprocess.run(COMMIT, capture_output=True, text=True).stdout.strip() or "unknown"
    about = (
        f"Of each kind there are {len(asked.seeds)} students, of seeds {seeds}. They start from the truncated teacher"
        f" and read {asked.tokens:,} tokens of {Path(asked.source).name}. {asked.features} features of the teacher's"
        f" own dictionary at {HOOK} are chosen. Beside the student a linear readout of them is trained. Its loss is"
        " added with a [weight](../about-chosen-features.md), in nats per token; weight 0 is a plain student."
        f" {asked.choose_tokens:,} tokens were read to choose, {asked.judge_tokens:,} to judge and"
        f" {asked.splice_tokens:,} to splice. The students were trained at commit {commit} on {asked.machine}."
    )
    make_folder(asked.results)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_bytes(asked.results / "placement.json", text.encode())
    page = asked.results / "placement.md"
    whole = page.read_text(encoding="utf-8") if page.exists() else EMPTY
    part = measured(found, said, command, about)
    write_bytes(page, filled(whole, "prices", part, by="docs/write_placement.py").encode())


if __name__ == "__main__":
    main()
