"""Which features of the teacher did its students keep: `tl-capacity run recover MEASUREMENT DISTILLATION --out DIR`.

Reads every feature out of every student linearly, on documents that the readouts were not fitted to, beside the
teacher, its principal components and students with random weights. A run that was interrupted goes on where it was;
under `accelerate launch -m tl_capacity run recover …` each process reads a part of the text, and all sums are added up.
"""

from __future__ import annotations

import glob
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.students import new_student
from tl_capacity.errors import CapacityError
from tl_capacity.measure.setup import as_measured, measured_dictionary, measured_teacher, tapped_model
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import row_length
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery import Recovery, recovery_figure
from tl_capacity.probing.recovery_row import JSON_NAME
from tl_capacity.recipe import already_there, argument, option, run_file, settings_of
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP, device_named
from tl_capacity.runtime.processes import Processes
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.checkpoints import Checkpoint, remove_checkpoint
from tl_capacity.storage.digests import digest, fingerprint
from tl_capacity.storage.files import make_folder, write_bytes, write_json
from tl_capacity.text.counting import special_token_ids

ABOUT_NAME = "settings.json"


@dataclass(frozen=True)
class RecoverConfig:
    """Everything that decides the result."""

    measurement: Path = argument("A measurement of the teacher.")
    distillation: Path = argument("A distillation of it, as `tl-capacity run distill --out` wrote it.")
    out: Path = option(Path("runs/recover"), "The folder to write.")
    hook: tuple[str, ...] = option((), "Hook points; by default the middle one of those measured.")
    source: str = option(
        "",
        "The text to read; by default the distillation's held-out source, else the one that the teacher was"
        " measured on.",
    )
    tokens: int = option(200_000, "Tokens to read: 6 of 10 documents fit the readouts, 1 chooses the ridge, 3 judge.")
    tau: float = option(0.95, "AUROC from which a feature counts as kept.")
    importance: str = option("second_moment", "Importance estimator of the predicted set.")
    random: bool = option(True, "Also read out students with random weights, the floor.")
    device: str = option(AUTO, f"Where the models run: {DEVICE_HELP}")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.")


def main(config: RecoverConfig) -> list[Recovery] | None:
    """Count the features that students kept, and write them down beside their budget.

    Returns:
        What was found at each hook point; None where `out` already holds it.

    Raises:
        CapacityError: where the measurement and the distillation are not of the same teacher, or on whatever reading
            refuses.
    """
    config = replace(config, device=device_named(config.device))  # is recorded
    processes = Processes.of_launch()
    folder = processes.own(config.out)
    known = settings_of(config, "out") if config.source else settings_of(config, "out", "source")
    if already_there(config.out / JSON_NAME, config.out / ABOUT_NAME, known):
        for state in folder.parent.glob(f"{glob.escape(folder.name)}.*.checkpoint.safetensors"):
            remove_checkpoint(state)
        return None
    processes = processes.connected(config.device)
    measurement, run = Measurement.load(config.measurement), DistillationRun.load(config.distillation)
    hooks = chosen(measurement, config.hook)
    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.monotonic()
    provenance = measurement.provenance
    teacher = measured_teacher(config.measurement, provenance, config.device)
    if fingerprint(teacher.model) != run.fingerprint:
        raise CapacityError(
            f"{config.distillation} was distilled from {run.teacher!r} with other weights than {provenance.model!r} has"
            " now: distil again"
        )
    source = config.source or (run.heldout_source if run.heldout_source != run.source else provenance.source)
    mask = provenance.settings.get("masked_token_ids", special_token_ids(teacher.model, teacher.tokenizer))
    stream = as_measured(source, teacher.tokenizer, provenance, row_length(teacher.model.config))
    models = {
        s.name: load_model(str(config.distillation / "students" / s.name), device=config.device)
        for s in run
        if s.start != "teacher"
    }
    untrained = random_students(teacher, run, models) if config.random else {}
    weights = [loaded.revision for loaded in (teacher, *models.values())]
    decides = settings_of(config, "out") | {
        "source": source,
        "weights": weights,
        "measured": digest((config.measurement / MEASUREMENT_JSON).read_bytes()),
    }
    make_folder(config.out)
    recoveries, states = [], []
    for measured in hooks:
        sae = measured_dictionary(measured, teacher, provenance)
        tapped = {name: tapped_model(model, [], [], [measured.hook]) for name, model in models.items()}
        fitting, judging = (
            folder.with_name(f"{folder.name}.{measured.hook}.{which}.checkpoint.safetensors")
            for which in ("fit", "judge")
        )
        states += [fitting, judging]
        recoveries.append(
            recover_features(
                tapped_model(teacher, [sae], [measured.hook]),
                sae,
                tapped,
                stream,
                measured=measured,
                random={name: tapped_model(model, [], [], [measured.hook]) for name, model in untrained.items()},
                importance=config.importance,
                tau=config.tau,
                max_tokens=config.tokens,
                mask_token_ids=mask,
                processes=processes,
                checkpoints=(Checkpoint(fitting, decides), Checkpoint(judging, decides)),
            )
        )
        if processes.first:
            Console(width=180).print(recoveries[-1])
    if processes.first:
        about = {
            "schema": 1,
            "settings": {**settings_of(config, "out"), "source": source},
            "versions": library_versions(),
            "seconds": round(time.monotonic() - started, 1),
        }
        write(recoveries, config.out, about)
        print(f"written to {config.out}")
    processes.wait()
    for state in states:
        remove_checkpoint(state)
    return recoveries


def chosen(measurement: Measurement, hooks: tuple[str, ...]) -> list[HookMeasurement]:
    """What was measured at some hook points, or at the middle one."""
    return (
        [measurement[hook] for hook in dict.fromkeys(hooks)]
        if hooks
        else [measurement.hooks[len(measurement.hooks) // 2]]
    )


def random_students(
    teacher: LoadedModel, run: DistillationRun, models: dict[str, LoadedModel]
) -> dict[str, LoadedModel]:
    """Each student with the random weights that its seed gives."""
    return {
        name: LoadedModel(
            new_student(teacher.model, run[name].width, run[name].seed).eval(),
            teacher.tokenizer,
            f"{name} with random weights",
            None,
        )
        for name in models
    }


def write(recoveries: list[Recovery], out: Path, about: dict[str, Any]) -> None:
    """The list of students, the figures of every feature, the figure, and what it was made with; the list last, as it
    says that all is there.
    """
    make_folder(out)
    for recovery in recoveries:
        recovery.save_arrays(out, about)
    write_bytes(out / "recoverability.html", recovery_figure(recoveries).to_html(include_plotlyjs=True).encode())
    write_json(out / ABOUT_NAME, about)
    Recoverability(tuple(row for recovery in recoveries for row in recovery.rows)).save(out)


if __name__ == "__main__":
    run_file(main)
