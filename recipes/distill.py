"""Distils a teacher into students of several widths at once: `tl-capacity run distill --teacher … --widths … --tokens …
--out …`.

Also under `accelerate launch -m tl_capacity run distill …`, where each process takes a part of every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.settings import DistillSettings, HiddenMatch, KeepFeatures, LogitLoss
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.recipe import option, option_of, run_file, values_of
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides the students."""

    teacher: str = option(
        "embedded", "The teacher: a name that a plugin registered, a save_pretrained folder, or a hub id."
    )
    widths: tuple[int, ...] = option(
        (), "Student widths. Default: seven, from an eighth of the teacher's width to all of it."
    )
    tokens: int = option_of(DistillSettings, "tokens")
    out: Path = option(Path("runs/distillation"), "Folder to write.")
    resume: bool = option(False, "Continue from the checkpoint in --out.")
    source: str = option("", "Text to train on. Default: the text that comes with the teacher.")
    heldout: str = option(
        "",
        "Text to judge the students on. Default: some whole documents of --source, which are then not trained on.",
    )
    heldout_tokens: int = option_of(DistillSettings, "heldout_tokens")
    evaluations: int = option_of(DistillSettings, "evaluations")
    repeat: bool = option_of(DistillSettings, "repeat")
    seeds: tuple[int, ...] = option_of(DistillSettings, "seeds")
    seeded_widths: tuple[int, ...] = option_of(DistillSettings, "seeded_widths")
    keep: tuple[str, ...] = option_of(DistillSettings, "keep")
    keep_weight: float = option_of(KeepFeatures, "weight")
    keep_hook: str = option(
        "", "Hook point of a concept's features, or of a file that names none. Default: the middle SAE's."
    )
    concept_features: int = option(16, "How many features carry a concept. The k-sparse probe chooses them.", least=1)
    sae: tuple[str, ...] = option(
        (), "Dictionaries of the features to keep, as for measure. Default: those that come with the teacher."
    )
    start: str = option_of(DistillSettings, "start")
    control: bool = option_of(DistillSettings, "control")
    loss: str = option_of(LogitLoss, "divergence")
    temperature: float = option_of(LogitLoss, "temperature")
    beta: float = option_of(LogitLoss, "beta")
    ce_weight: float = option_of(LogitLoss, "ce_weight")
    hidden: tuple[str, ...] = option_of(DistillSettings, "hidden")
    lr: float = option_of(DistillSettings, "lr")
    warmup: float = option_of(DistillSettings, "warmup")
    schedule: str = option_of(DistillSettings, "schedule")
    weight_decay: float = option_of(DistillSettings, "weight_decay")
    batch_rows: int = option_of(DistillSettings, "batch_rows")
    context: int | None = option(
        None, "Positions in a row, BOS included. Default: what the teacher takes, at most 256."
    )
    special_tokens: bool = option_of(MeasureSettings, "special_tokens")
    seed: int = option_of(DistillSettings, "seed")
    device: str = option(AUTO, f"Where teacher and students run: {DEVICE_HELP}")
    dtype: str = option("float32", "Precision of the teacher's weights. The students' are float32.")
    revision: str | None = option_of(MeasureSettings, "revision")
    shard_teacher: bool = option(
        False, "Spread the blocks of a teacher that was loaded on the CPU over the processes (FSDP)."
    )
    mixed_precision: str = option_of(DistillSettings, "mixed_precision")
    checkpoint_seconds: float = option(60.0, "Save a checkpoint this often.", least=0)
    trackers: tuple[str, ...] = option((), "Also report to these trackers of Accelerate, such as wandb,tensorboard.")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)

    def settings(self) -> DistillSettings:
        """The settings of the students, without teacher, widths, text, and the features to keep.

        Raises:
            CapacityError: on a value outside its domain.
        """
        settings = values_of(self, DistillSettings)
        settings["loss"] = LogitLoss(**values_of(self, LogitLoss))
        settings["hidden"] = tuple(HiddenMatch.parse(text) for text in self.hidden)
        settings["keep"] = ()  # for which the teacher is needed
        return DistillSettings(**settings)


def main(config: DistillConfig) -> DistillationRun:
    """Distil a teacher into students of several widths and print their observed floors.

    Raises:
        CapacityError: on settings that do not fit, an unknown model or source, text that is too short, or a loss that
            is no longer finite.
    """
    import torch
    from tl_capacity.recipes.wanted_features import named_saes, wanted_features

    from tl_capacity.distillation import distill
    from tl_capacity.models.defaults import row_length
    from tl_capacity.models.loading import load_model
    from tl_capacity.text.streams import TokenStream

    if config.threads:
        torch.set_num_threads(config.threads)
    settings = config.settings()
    teacher = load_model(config.teacher, device=config.device, dtype=config.dtype, revision=config.revision)
    saes = named_saes(config.sae, teacher, config.keep)
    keep = wanted_features(config.keep, teacher, saes, config.keep_hook, config.keep_weight, config.concept_features)
    text = partial(
        TokenStream,
        tokenizer=teacher.tokenizer,
        context=row_length(teacher.model.config, config.context),
        special_tokens=config.special_tokens,
    )
    run = distill(
        teacher,
        tuple(dict.fromkeys(config.widths)) or usual_widths(teacher.model.config),
        text(teacher.source(config.source)),
        heldout=text(config.heldout) if config.heldout else None,
        settings=replace(settings, keep=keep),
        saes=saes,
        out=config.out,
        resume=config.resume,
        shard_teacher=config.shard_teacher,
        checkpoint_seconds=config.checkpoint_seconds,
        trackers=config.trackers,
    )
    show(run)
    print(f"written to {config.out}")
    return run


def usual_widths(config: Any) -> tuple[int, ...]:
    """Student widths if none are named: two in each octave, from an eighth of the teacher's width.

    Each is the nearest width that the family can build.
    """
    from tl_capacity.distillation.students import nearest_widths
    from tl_capacity.models.defaults import width_of
    from tl_capacity.plan import ladder

    return nearest_widths(config, ladder(width_of(config), octaves=3))


def show(run: DistillationRun) -> None:
    """Print the observed floors."""
    from rich.console import Console

    from tl_capacity.distillation.observed import floor_cells, observed_floors
    from tl_capacity.show.tables import table

    tokens = run.students[0].tokens[-1]
    repeated = f", {tokens / run.distinct_tokens:.1f} times over" if tokens > run.distinct_tokens else ""
    title = (
        f"Observed floors of {run.teacher}, d={run.teacher_width:,}, after {tokens:,} tokens{repeated}; "
        f"KL in nats per token on {run.heldout_tokens:,} held-out tokens"
    )
    console = Console(width=140)
    console.print(table(title, *floor_cells(observed_floors(run))))


if __name__ == "__main__":
    run_file(main)
