"""What it costs to choose what students keep: `tl-capacity run placement MEASUREMENT --widths 24,48 --keep
FEATURES.json --weights 0,0.1,1,10 --out DIR`.

Distils students of each width once for each weight of the chosen features, counts what they keep as `recover` does, and
writes the price list: chosen and other features kept, nats paid, nats per feature. A run that was interrupted goes on
where it was; under `accelerate launch -m tl_capacity run placement …` the processes share every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tl_capacity.recipes.splice import text_to_judge_on
from tl_capacity.recipes.wanted_features import CONCEPT, concept_latents, concept_of

from tl_capacity.distillation.keeping import risen
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.settings import DistillSettings, KeepFeatures, LogitLoss
from tl_capacity.distillation.train import distill
from tl_capacity.errors import CapacityError
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measure.setup import as_measured, measured_dictionary, measured_teacher
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import row_length
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.placement.divergence import divergence_by_group
from tl_capacity.placement.pricing import PricedStudent, prices_of, teacher_figures
from tl_capacity.placement.result import JSON_NAME, Placement
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.probing.activations import collect
from tl_capacity.probing.concepts import LabelledTexts
from tl_capacity.probing.probes import Probe, fit_probes
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.recovery import Recovery
from tl_capacity.probing.sparse import carrying_features
from tl_capacity.probing.splitting import HELD_OUT, check_parts, split
from tl_capacity.recipe import already_there, argument, option, option_of, run_file, settings_of, values_of
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import middle
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP, device_named
from tl_capacity.runtime.processes import Processes
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.checkpoints import (
    Checkpoint,
    checkpoint_in,
    gone_if_refused,
    remove_checkpoint,
    remove_checkpoints_in,
)
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import make_folder, write_bytes, write_json
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import TokenStream

ABOUT_NAME, FIGURE_NAME = "settings.json", "placement.html"
FEWEST_FIRINGS = 10
"""Fewest firings on the measured text of a feature that may carry a concept: students learn only what they see."""


@dataclass(frozen=True)
class PlacementConfig:
    """Everything that decides the price list."""

    measurement: Path = argument("A measurement of the teacher.")
    keep: str = option(
        "", "The chosen features: a JSON file with a list, or concept:NAME for the features that carry a concept."
    )
    widths: tuple[int, ...] = option((), "Student widths. Default: a quarter of the teacher's.")
    weights: tuple[float, ...] = option(
        (0.0, 0.1, 1.0, 10.0),
        "Weights of the chosen features in the loss, in nats per token. 0 is always among them.",
    )
    out: Path = option(Path("runs/placement"), "Folder to write. A rerun continues in it.")
    hook: str = option("", "Hook point. Default: the file's, else the middle one of those measured.")
    concept_features: int = option(16, "How many features carry a concept. The k-sparse probe chooses them.", least=1)
    tokens: int = option_of(DistillSettings, "tokens", "Predicted tokens to train the students of each weight on.")
    seeds: tuple[int, ...] = option_of(DistillSettings, "seeds")
    start: str = option_of(DistillSettings, "start", default="truncated")
    source: str = option("", "Text to train on. Default: the text that comes with the teacher.")
    heldout: str = option(
        "",
        "Text to judge the students on; they must not be trained on it. Default: the held-out part of the embedded"
        " teacher's text, else the measured text.",
    )
    heldout_tokens: int = option_of(DistillSettings, "heldout_tokens", "Predicted tokens of the held-out curves.")
    judge_tokens: int = option(200_000, "Tokens to read for the price list. As for recover, 3 of 10 documents judge.")
    evaluations: int = option_of(DistillSettings, "evaluations")
    repeat: bool = option_of(DistillSettings, "repeat")
    loss: str = option_of(LogitLoss, "divergence")
    temperature: float = option_of(LogitLoss, "temperature")
    beta: float = option_of(LogitLoss, "beta")
    ce_weight: float = option_of(LogitLoss, "ce_weight")
    lr: float = option_of(DistillSettings, "lr")
    warmup: float = option_of(DistillSettings, "warmup")
    schedule: str = option_of(DistillSettings, "schedule")
    weight_decay: float = option_of(DistillSettings, "weight_decay")
    batch_rows: int = option_of(DistillSettings, "batch_rows")
    context: int | None = option(None, "Positions in a row of the training text. Default: at most 256.")
    special_tokens: bool = option_of(MeasureSettings, "special_tokens")
    seed: int = option_of(DistillSettings, "seed")
    mixed_precision: str = option_of(DistillSettings, "mixed_precision")
    tau: float = option(0.95, "A feature counts as kept from this AUROC on.")
    checkpoint_seconds: float = option(60.0, "Save a checkpoint of a distillation this often.", least=0)
    device: str = option(AUTO, f"Where the models run: {DEVICE_HELP}")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)

    def settings(self, keep: KeepFeatures | None, weight: float) -> DistillSettings:
        """The settings of the distillation with one weight."""
        loss = LogitLoss(**values_of(self, LogitLoss))
        kept = () if keep is None or weight == 0 else (keep.weighing(weight),)
        return DistillSettings(**{**values_of(self, DistillSettings), "loss": loss, "keep": kept})

    def all_weights(self) -> tuple[float, ...]:
        """The weights in ascending order, with 0 among them.

        Raises:
            CapacityError: where one is below 0 or no number.
        """
        if wrong := [weight for weight in self.weights if not (weight >= 0 and isfinite(weight))]:
            raise CapacityError(
                f"--weights {wrong[0]:g} is not a weight of a loss: choose numbers of at least 0, such as 0,0.1,1,10"
            )
        return tuple(sorted({0.0, *self.weights}))


def main(config: PlacementConfig) -> Placement | None:
    """Train students with and without the chosen features, and write what these cost.

    Returns:
        The price list; None where `out` already holds it.

    Raises:
        CapacityError: where no feature is named, or on whatever measuring, distilling or recovering refuses.
    """
    config = replace(config, device=device_named(config.device))  # is recorded
    free = ("out", "threads", "checkpoint_seconds")
    if already_there(config.out / JSON_NAME, config.out / ABOUT_NAME, settings_of(config, *free)):
        remove_checkpoints_in(config.out)
        return None
    weights = config.all_weights()
    config.settings(None, 0.0)  # in case it is refused, before a model is loaded
    if config.threads:
        torch.set_num_threads(config.threads)
    measurement = Measurement.load(config.measurement)
    provenance = measurement.provenance
    teacher = measured_teacher(config.measurement, provenance, config.device)
    measured, keep, concept, sae = chosen(config, measurement, teacher)
    widths = tuple(dict.fromkeys(config.widths)) or (max(1, measured.teacher_width // 4),)
    heldout = text_to_judge_on(config.heldout, provenance.source)
    text = as_measured(heldout, teacher.tokenizer, provenance, row_length(teacher.model.config))
    rule = CountingRule.recorded(provenance.settings)
    check_parts(text, rule, config.judge_tokens, "--judge-tokens")  # before hours of training
    runs = {weight: train(config, teacher, widths, keep, weight, sae, heldout) for weight in weights}
    processes = Processes.of_launch().connected(config.device)
    models = {
        _name(weight, student.name): load_model(
            str(_folder(config.out, weight) / "students" / student.name), device=config.device
        )
        for weight, run in runs.items()
        for student in run
    }
    recovery = recover(config, measured, teacher, models, sae, text, rule, processes)
    kl, tokens = divergence_by_group(
        teacher.model,
        {name: model.model for name, model in models.items()},
        (batch for _, batch in split(text, (HELD_OUT,), config.judge_tokens)),
        processes,
    )
    probes = processes.map(lambda name: probe_of(models[name], measured.hook, concept), list(models))
    students = [
        PricedStudent(name, run[own].width, weight, run[own].seed, kl[name], probe)
        for (name, probe), (weight, run, own) in zip(
            zip(models, probes, strict=True),
            ((weight, run, student.name) for weight, run in runs.items() for student in run),
            strict=True,
        )
    ]
    asked = np.isin(recovery.features, keep.features)
    [of_teacher] = processes.map(lambda model: probe_of(model, measured.hook, concept), [teacher])
    placement = Placement(
        prices=prices_of(recovery, students, tokens, asked),
        hook=measured.hook,
        sae=measured.sae,
        sae_digest=measured.sae_digest,
        features=keep.features,
        concept=concept.name if concept is not None else "",
        n_chosen=int((asked & recovery.judged).sum()),
        n_others=int((~asked & recovery.judged).sum()),
        teacher=teacher_figures(recovery, asked, of_teacher),
        tau=config.tau,
        about=about(config, measurement, heldout, recovery, int(tokens.sum())),
        remarks=tuple(remarks(measured, keep, widths, runs)),
    )
    if processes.first:
        write(placement, recovery, config, free)
    processes.wait()
    for state in _states(config.out, processes):
        remove_checkpoint(state)
    return placement


def chosen(
    config: PlacementConfig, measurement: Measurement, teacher: LoadedModel
) -> tuple[HookMeasurement, KeepFeatures, LabelledTexts | None, Any]:
    """The measurement of the hook point, the chosen features, the concept that they carry, and their dictionary.

    Raises:
        CapacityError: where none is named, or one never fired while it was measured.
    """
    if not config.keep:
        raise CapacityError("no feature is chosen: pass --keep FEATURES.json, or --keep concept:NAME")
    if not config.keep.startswith(CONCEPT):
        wanted = KeepFeatures.load(config.keep, config.hook or middle(measurement).hook)
        if len(wanted) > 1:
            raise CapacityError(
                f"{config.keep} names features of {len(wanted)} hook points: name features of one hook point at a time"
            )
        [keep] = wanted
        measured = measurement[keep.hook]
        alive = measured.summary.alive
        if lost := [f for f in keep.features if f >= len(alive) or not alive[f]]:
            raise CapacityError(
                f"feature {lost[0]:,} of {config.keep} is not alive at {keep.hook} in the measurement: leave it out,"
                " or measure on text where it fires"
            )
        return measured, keep, None, measured_dictionary(measured, teacher, measurement.provenance)
    concept = concept_of(config.keep)
    measured = measurement[config.hook] if config.hook else middle(measurement)
    sae = measured_dictionary(measured, teacher, measurement.provenance)
    firing = measured.summary.alive & (measured.summary.arrays["counts"].sum(0) >= FEWEST_FIRINGS)
    latents = concept_latents(concept, teacher, sae, measured.hook)
    features = carrying_features(latents, concept, config.concept_features, firing)
    return measured, KeepFeatures(measured.hook, features), concept, sae


def train(
    config: PlacementConfig,
    teacher: LoadedModel,
    widths: tuple[int, ...],
    keep: KeepFeatures,
    weight: float,
    sae: Any,
    heldout: str,
) -> DistillationRun:
    """The students of one weight, trained now, continued, or finished earlier."""
    context = row_length(teacher.model.config, config.context)
    source = teacher.source(config.source)
    texts = [
        TokenStream(name, teacher.tokenizer, context, special_tokens=config.special_tokens)
        for name in (source, heldout)
    ]
    return distill(
        teacher,
        widths,
        texts[0],
        heldout=texts[1] if heldout != source else None,
        settings=config.settings(keep, weight),
        saes={keep.hook: sae},
        out=_folder(config.out, weight),
        resume=True,
        checkpoint_seconds=config.checkpoint_seconds,
    )


def recover(
    config: PlacementConfig,
    measured: HookMeasurement,
    teacher: LoadedModel,
    models: Mapping[str, LoadedModel],
    sae: Any,
    text: TokenStream,
    rule: CountingRule,
    processes: Processes,
) -> Recovery:
    """What readouts find in all students."""
    decides = {
        "tau": config.tau,
        "tokens": config.judge_tokens,
        "source": text.source,
        "weights": [loaded.revision for loaded in (teacher, *models.values())],
        "measured": digest((config.measurement / MEASUREMENT_JSON).read_bytes()),
    }
    states = _states(config.out, processes)
    fitting, judging = (Checkpoint(state, decides) for state in states)
    with gone_if_refused(states):
        return recover_features(
            teacher.model,
            sae,
            {name: loaded.model for name, loaded in models.items()},
            text,
            measured=measured,
            tau=config.tau,
            max_tokens=config.judge_tokens,
            rule=rule,
            processes=processes,
            checkpoints=(fitting, judging),
        )


def probe_of(model: LoadedModel, hook: str, concept: LabelledTexts | None) -> Probe | None:
    """A linear probe of the concept on a model's activations."""
    if concept is None:
        return None
    pooled = collect(model.model, hook, concept.texts, tokenizer=model.tokenizer, progress=False)
    [probe] = fit_probes({concept.name: pooled}, [concept], control=False)
    return probe


def remarks(
    measured: HookMeasurement, keep: KeepFeatures, widths: tuple[int, ...], runs: Mapping[float, DistillationRun]
) -> list[str]:
    """Remarks that a reader must know."""
    law = plugins().capacity_laws.default
    at = context_at(measured, measured.importance(None), measured.summary.alpha.value)
    said = []
    if any(run.heldout_source == run.source for run in runs.values()):
        said.append(
            "the students are judged on the text that they were trained on, which flatters them: name another one"
            " with --heldout"
        )
    for width in widths:
        budget = kept_features(law, width, at)
        if len(keep.features) > budget:
            said.append(
                f"width {width:,}: {len(keep.features):,} features were chosen, more than the {budget:,} that the"
                f" capacity law {law.name!r} gives it"
            )
    for weight, run in runs.items():
        said += [
            f"width {student.width:,}, weight {weight:g}, seed {student.seed}: the held-out KL rose from"
            f" {student.heldout_kl[0]:.4g} to {student.heldout_kl[-1]:.4g} nats per token, so the chosen features"
            " outweigh the distillation: choose a lower weight"
            for student in run
            if weight > 0 and risen(student.heldout_kl)
        ]
    return said


def about(
    config: PlacementConfig, measurement: Measurement, heldout: str, recovery: Recovery, judged_tokens: int
) -> dict[str, Any]:
    """How the price list was made."""
    provenance = measurement.provenance
    return {
        "model": provenance.model,
        "revision": provenance.revision,
        "source": config.source or provenance.source,
        "heldout": heldout,
        "tokens": dict(recovery.tokens),
        "judged_tokens": judged_tokens,
        "trained_tokens": config.tokens,
        "start": config.start,
        "versions": library_versions(),
    }


def write(placement: Placement, recovery: Recovery, config: PlacementConfig, free: tuple[str, ...]) -> None:
    """Write the figures and settings, and last the price list, as it says that everything is there."""
    settings = {"schema": 1, "settings": settings_of(config, *free)}
    make_folder(config.out)
    recovery.save_arrays(config.out, settings)
    write_bytes(config.out / FIGURE_NAME, placement.plot().to_html(include_plotlyjs=True).encode())
    write_json(config.out / ABOUT_NAME, settings)
    placement.save(config.out)
    Console(width=180).print(placement)
    print(f"written to {config.out}")


def _folder(out: Path, weight: float) -> Path:
    """The folder of the students of one weight."""
    return out / f"weight-{weight:g}"


def _name(weight: float, student: str) -> str:
    """The name of a student among those of all weights."""
    return f"weight {weight:g}, {student}"


def _states(out: Path, processes: Processes) -> list[Path]:
    """The files in which a process keeps the sums of the two passes of `recover`."""
    return [
        checkpoint_in(
            out, processes.own(Path(which)).name, beside=processes.own(out / f"{which}.checkpoint.safetensors")
        )
        for which in ("fit", "judge")
    ]


if __name__ == "__main__":
    run_file(main)
