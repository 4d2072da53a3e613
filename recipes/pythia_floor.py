"""The paper's experiment as one command: measure a teacher, predict floors, distil students, observe their floors, and
compare.

`tl-capacity run pythia-floor --preset quick`; each stage is saved, and the same command goes on where it stopped. The
paper's own setting (arXiv:2604.04037) is
`--teacher EleutherAI/pythia-410m --widths 128,256,512,768,1024 --sae … --source …`, through the same code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tl_capacity.hooks.embedded import heldout_of

from tl_capacity.distillation.decomposition import Decomposition, decompose
from tl_capacity.distillation.run import JSON_NAME as DISTILLATION_JSON
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.settings import DistillSettings, LogitLoss
from tl_capacity.errors import CapacityError
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import USUAL_CONTEXT, row_length
from tl_capacity.models.loading import LoadedModel, load_config, load_model
from tl_capacity.recipe import option, option_of, run_file, values_of
from tl_capacity.results.naming import middle
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP
from tl_capacity.storage.files import make_folder, read_kept, write_json
from tl_capacity.storage.same_run import changed_fields

IMPORTANCES = ("second_moment", "gradient", "fisher")
"""Importances that are always measured: the paper's, and two in nats per token, whose C must be 1."""
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "measure_tokens": 16_000,
        "tokens": 20_000,
        "evaluations": 10,
        "heldout_tokens": 1_000,
        "batch_rows": 4,
        "context": 128,
    },
    "demo": {
        "measure_tokens": 100_000,
        "tokens": 250_000,
        "evaluations": 20,
        "heldout_tokens": 4_000,
        "batch_rows": 4,
        "context": 256,
    },
    "full": {
        "measure_tokens": 400_000,
        "tokens": 20_000_000,
        "evaluations": 60,
        "heldout_tokens": 16_384,
        "batch_rows": 8,
        "context": 256,
    },
}


@dataclass(frozen=True)
class PythiaFloorConfig:
    """Everything that decides the result. The preset supplies what is not given."""

    preset: str = option(
        "quick", "quick (at most 2 minutes on 2 cores), demo (at most 10) or full (20 million tokens)."
    )
    out: Path = option(Path("runs/pythia-floor"), "Folder to write. A rerun continues in it.")
    teacher: str = option(
        "embedded", "The teacher: a name that a plugin registered, a save_pretrained folder, or a hub id."
    )
    sae: tuple[str, ...] = option(
        (),
        "SAE folder or RELEASE/SAE_ID, optionally after HOOK=. May be repeated. Default: all that come with"
        " the teacher.",
    )
    widths: tuple[int, ...] = option(
        (), "Student widths. Default: seven, from an eighth of the teacher's width to all of it."
    )
    seeds: tuple[int, ...] = option_of(DistillSettings, "seeds", "Seeds of the students' initial weights.")
    seeded_widths: tuple[int, ...] = option_of(DistillSettings, "seeded_widths")
    start: str = option_of(
        DistillSettings,
        "start",
        "The students' first weights: truncated (the teacher's, in the leading directions of its residual stream) or"
        " random.",
        default="truncated",
    )
    control: bool = option_of(
        DistillSettings,
        "control",
        "Also train a control: a student of the teacher's width that starts with the teacher's weights. It shows what"
        " the training itself costs.",
        default=True,
    )
    measurement: Path | None = option(None, "A finished measurement of the teacher to use instead of measuring.")
    source: str = option("", "Text to measure and train on. Default: the text that comes with the teacher.")
    heldout: str = option(
        "",
        "Text to judge the students on. Default: embedded:heldout for the embedded teacher, else documents of"
        " --source.",
    )
    hook: str = option("", "Hook point to predict from. Default: the middle one of those measured.")
    importance: str = option("second_moment", "Importance estimator of the prediction.")
    law: str = option("compressed_sensing", "Capacity law of the prediction.")
    observed: str = option(
        "last_tenth",
        "Observed floor: last_tenth (the mean at the end of the held-out curve) or fit (where the curve is heading).",
    )
    measure_tokens: int | None = option(None, "Tokens to measure on.")
    tokens: int | None = option_of(
        DistillSettings, "tokens", "Predicted tokens to train on. A shorter source is repeated.", default=None
    )
    evaluations: int | None = option_of(
        DistillSettings, "evaluations", "How often the students are judged during training.", default=None
    )
    heldout_tokens: int | None = option_of(
        DistillSettings, "heldout_tokens", "Predicted tokens that the students are judged on.", default=None
    )
    batch_rows: int | None = option_of(DistillSettings, "batch_rows", "Rows in a step.", default=None)
    context: int | None = option(
        None, "Positions in a row, BOS included. Default: the preset's, or what the teacher takes."
    )
    temperature: float = option_of(LogitLoss, "temperature", "Temperature of the training loss.")
    lr: float = option_of(DistillSettings, "lr", "Peak learning rate.")
    schedule: str = option_of(DistillSettings, "schedule")
    concepts: tuple[str, ...] = option(
        (), "Also probe teacher and students for these concepts, such as embedded (docs/probe.md). This takes minutes."
    )
    seed: int = option_of(DistillSettings, "seed")
    device: str = option(AUTO, f"Where everything runs: {DEVICE_HELP}")
    revision: str | None = option_of(MeasureSettings, "revision")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)

    def whole(self) -> PythiaFloorConfig:
        """The settings with the preset's values filled in.

        Raises:
            CapacityError: on an unknown preset.
        """
        if self.preset not in PRESETS:
            raise CapacityError(f"{self.preset!r} is not a preset: choose one of {', '.join(PRESETS)}")
        return replace(
            self, **{name: value for name, value in PRESETS[self.preset].items() if getattr(self, name) is None}
        )

    def fitted(self, teacher: Any) -> PythiaFloorConfig:
        """The settings with missing values filled in to fit the teacher's configuration.

        Raises:
            CapacityError: on an unknown preset, or a longer context than the teacher takes.
        """
        from tl_capacity.recipes.distill import usual_widths

        whole = self.whole()
        return replace(
            whole,
            widths=tuple(dict.fromkeys(self.widths)) or usual_widths(teacher),
            context=row_length(teacher, self.context, usual=whole.context or USUAL_CONTEXT),
        )

    def distill_settings(self) -> DistillSettings:
        """The settings of the students, without teacher, widths and text.

        Raises:
            CapacityError: on a value outside its domain.
        """
        loss = LogitLoss(**values_of(self, LogitLoss))
        return DistillSettings(**values_of(self, DistillSettings), loss=loss, repeat=True)


def main(config: PythiaFloorConfig) -> Decomposition:
    """Measure a teacher, predict floors, distil students, and compare.

    Raises:
        CapacityError: on settings that do not fit, a folder of other settings, or whatever a stage refuses.
    """
    if config.concepts and config.revision is not None:
        raise CapacityError(
            f"--concepts probes the teacher's main revision, not {config.revision!r}: leave out --concepts or"
            " --revision"
        )
    teacher_config = load_config(config.teacher, config.revision)
    config = config.fitted(teacher_config)
    _threads(config)
    if not _distilled(config):
        check_students(config, teacher_config)
    _same_settings(config)
    measurement = measure(config)
    predicted = measurement.budget(
        config.widths, config.importance, config.law
    )  # before an hour of training, in case it is refused
    write_json(config.out / "predicted.json", [f.to_json() for f in predicted.floors])
    _print(predicted)
    teacher = load_model(config.teacher, device=config.device, revision=config.revision)
    if None not in (was := measurement.provenance.revision, teacher.revision) and was != teacher.revision:
        raise CapacityError(
            f"{config.teacher!r} is now {teacher.revision}, but was {was} when it was measured: get that revision, or"
            " measure again"
        )
    run = train(config, teacher)
    decomposition = decompose(
        measurement,
        run,
        hook=config.hook or None,
        importance=config.importance,
        law=config.law,
        observed=config.observed,
    )
    write_json(config.out / "decomposition.json", decomposition.to_json())
    write_json(config.out / "floors.json", decomposition.table_of_floors())
    _print(decomposition)
    if config.concepts:
        probe(config, measurement)
    print(
        f"written to {config.out}; next: tl-capacity decompose {config.measurement or config.out / 'measurement'}"
        f" {config.out / 'distillation'} --json"
    )
    return decomposition


def measure(config: PythiaFloorConfig) -> Measurement:
    """The measurement, made now, continued, or finished earlier."""
    from tl_capacity.measure.job import measure as run_measure

    if config.measurement is not None:
        return Measurement.load(config.measurement)
    return run_measure(
        MeasureSettings(
            model=config.teacher,
            out=config.out / "measurement",
            saes=config.sae,
            tokens=config.measure_tokens or 0,
            source=config.source or None,
            resume=True,
            importance=tuple(dict.fromkeys((*IMPORTANCES, config.importance))),
            device=config.device,
            revision=config.revision,
        )
    )


def check_students(config: PythiaFloorConfig, teacher_config: Any) -> None:
    """Refuse before the measurement what the distillation would refuse after it.

    Raises:
        CapacityError: on a width that the teacher's family has no student of, or seeds that make no difference there.
    """
    from tl_capacity.distillation.students import new_students, student_config

    settings = config.distill_settings()
    for width in config.widths:
        student_config(teacher_config, width)
    if len(settings.seeds) < 2 or settings.start != "truncated":
        return
    import torch

    teacher = load_model(config.teacher, device=config.device, revision=config.revision)
    tokens = torch.from_numpy(next(iter(_stream(config, teacher))).tokens[:1]).clamp(min=0)
    for width in config.seeded_widths or config.widths:
        new_students(
            teacher.model, [width], replace(settings, seeds=settings.seeds[:2], seeded_widths=(), control=False), tokens
        )


def train(config: PythiaFloorConfig, teacher: LoadedModel) -> DistillationRun:
    """The distillation, run now, continued, or finished earlier.

    Raises:
        CapacityError: where that which is finished is of a teacher with other weights, and on whatever the distillation
            refuses.
    """
    from tl_capacity.distillation import distill as run_distill
    from tl_capacity.storage.digests import fingerprint
    from tl_capacity.text.streams import TokenStream

    out = config.out / "distillation"
    if _distilled(config):  # with these settings, which stand beside it
        run = DistillationRun.load(out)
        if run.fingerprint != fingerprint(teacher.model):
            raise CapacityError(
                f"{out} holds students of another teacher than {config.teacher!r} is now: put its weights back, or"
                " choose another --out"
            )
        return run
    stream = _stream(config, teacher)
    heldout = config.heldout or heldout_of(stream.source) or ""
    return run_distill(
        teacher,
        config.widths,
        stream,
        heldout=TokenStream(heldout, teacher.tokenizer, context=stream.context) if heldout else None,
        settings=config.distill_settings(),
        out=out,
        resume=True,
    )


def probe(config: PythiaFloorConfig, measurement: Measurement) -> None:
    """Probe the concepts, unless the probes are already there.

    Raises:
        CapacityError: where those that are there are for other concepts.
    """
    from tl_capacity.recipes.probe import ProbeConfig
    from tl_capacity.recipes.probe import main as run_probes

    from tl_capacity.probing.rows import JSON_NAME as PROBES_JSON

    out = config.out / "probes"
    if (out / PROBES_JSON).exists():
        settings = read_kept(out / PROBES_JSON).get("settings")
        before = settings.get("concepts") if isinstance(settings, dict) else None
        if not isinstance(before, list):
            raise CapacityError(
                f"{out / PROBES_JSON} does not say what was probed for: delete its folder, or choose another --out"
            )
        if before != list(config.concepts):
            raise CapacityError(
                f"{out} holds probes for {','.join(map(str, before))}: pass the same --concepts, or choose another"
                " --out"
            )
        return
    run_probes(
        ProbeConfig(
            model=(config.teacher, str(config.out / "distillation")),
            hook=config.hook or middle(measurement).hook,
            concepts=config.concepts,
            out=out,
            measurement=config.measurement or config.out / "measurement",
            importance=config.importance,
            law=config.law,
            device=config.device,
            threads=config.threads,
        )
    )


def _distilled(config: PythiaFloorConfig) -> bool:
    return (config.out / "distillation" / DISTILLATION_JSON).exists()


def _stream(config: PythiaFloorConfig, teacher: LoadedModel) -> Any:
    """The text to train on."""
    from tl_capacity.text.streams import TokenStream

    assert config.context is not None  # by the preset
    return TokenStream(teacher.source(config.source), teacher.tokenizer, context=config.context)


def _threads(config: PythiaFloorConfig) -> None:
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)


def _same_settings(config: PythiaFloorConfig) -> None:
    """Keep the settings beside the results, and refuse to continue with other ones."""
    make_folder(config.out)
    path = config.out / "settings.json"
    # Of these no stage that is kept depends, or it checks them itself.
    free = ("out", "preset", "device", "threads", "hook", "importance", "law", "observed", "concepts")
    settings = json.loads(
        json.dumps({name: value for name, value in asdict(config).items() if name not in free}, default=str)
    )
    if path.is_file():
        before = read_kept(path)
        for name in changed_fields(before, settings):
            raise CapacityError(
                f"{config.out} holds a run with {name} {before.get(name)!r}, but this one has {settings[name]!r}: pass"
                " the same settings, or choose another --out"
            )
    write_json(path, settings)


def _print(shown: Any) -> None:
    from rich.console import Console

    Console(width=160).print(shown)


if __name__ == "__main__":
    run_file(main)
