"""Which of the teacher's features its students kept: `tl-capacity run recover MEASUREMENT STUDENTS --out DIR`.

Reads every feature out of every student linearly, on documents that the readouts were not fitted to, beside the
teacher, its principal components and students with random weights. A run that was interrupted goes on where it was;
under `accelerate launch -m tl_capacity run recover …` each process reads a part of the text, and all sums are added up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tl_capacity.distillation.named_students import NamedStudent, is_run, students_named
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.students import new_student
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.measure.setup import as_measured, measured_dictionary, measured_teacher, tapped_model
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import row_length
from tl_capacity.models.forward import check_token_ids, longest
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.models.loading import LoadedModel
from tl_capacity.probing.activations import randomly_initialised
from tl_capacity.probing.layers import named_hooks, possible_hooks
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery import Recovery, recovery_figure
from tl_capacity.probing.recovery_row import JSON_NAME
from tl_capacity.recipe import already_there, argument, option, run_file, settings_of
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import middle
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP, device_named
from tl_capacity.runtime.logs import log
from tl_capacity.runtime.paths import beside
from tl_capacity.runtime.processes import Processes
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.checkpoints import (
    Checkpoint,
    checkpoint_in,
    gone_if_refused,
    remove_checkpoint,
    remove_checkpoints_in,
)
from tl_capacity.storage.digests import digest, fingerprint
from tl_capacity.storage.files import make_folder, write_bytes, write_json
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.same_tokens import check_same_tokens, last_token

ABOUT_NAME = "settings.json"


@dataclass(frozen=True)
class RecoverConfig:
    """Everything that decides the result."""

    measurement: Path = argument("A measurement of the teacher.")
    distillation: Path = argument(
        "Its students: the folder that `tl-capacity run distill --out` or `tl-capacity observe --out` wrote; or one"
        " student, a folder or a hub id."
    )
    student: tuple[str, ...] = option(
        (), "A further student: a folder, a hub id, or the folder of a distillation. May be repeated.", repeated=True
    )
    student_hook: tuple[str, ...] = option(
        (),
        "Where students are read, as HOOK or STUDENT=HOOK. May be repeated. Default: the teacher's hook point. For a"
        " student with more or fewer layers: the best layer on the documents that fit.",
        repeated=True,
    )
    out: Path = option(Path("runs/recover"), "Folder to write.")
    hook: tuple[str, ...] = option((), "Hook points. Default: the middle one of those measured.")
    source: str = option(
        "",
        "Text to read. Default: the distillation's held-out source, else the text that the teacher was measured on.",
    )
    tokens: int = option(200_000, "Tokens to read: 6 of 10 documents fit the readouts, 1 chooses the ridge, 3 judge.")
    tau: float = option(0.95, "A feature counts as kept from this AUROC on.")
    importance: str = option("second_moment", "Importance estimator of the predicted set.")
    random: bool = option(True, "Also read students with random weights, as the floor.")
    device: str = option(AUTO, f"Where the models run: {DEVICE_HELP}")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)

    def decisive(self, *without: str) -> dict[str, Any]:
        """The settings that decide the result, except the given ones.

        Settings that earlier versions did not have are there only if they were given.
        """
        unset = [name for name in ("student", "student_hook") if not getattr(self, name)]
        return settings_of(self, "out", *unset, *without)


def main(config: RecoverConfig) -> list[Recovery] | None:
    """Count the features that students kept, beside the numbers that the theorem allows.

    Returns:
        What was found at each hook point; None where `out` already holds it.

    Raises:
        CapacityError: where the measurement and the students are not of the same teacher, or on whatever reading
            refuses.
    """
    config = replace(config, device=device_named(config.device))  # is recorded
    processes = Processes.of_launch()
    if already_there(
        config.out / JSON_NAME, config.out / ABOUT_NAME, config.decisive(*([] if config.source else ["source"]))
    ):
        remove_checkpoints_in(config.out)
        return None
    processes = processes.connected(config.device)
    measurement = Measurement.load(config.measurement)
    specs = (str(config.distillation), *config.student)
    runs = {spec: DistillationRun.load(spec) for spec in specs if is_run(spec) or not might_be_model(spec)}
    students = students_named(specs)
    hooks = chosen(measurement, config.hook)
    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.monotonic()
    provenance = measurement.provenance
    teacher = measured_teacher(config.measurement, provenance, config.device)
    for spec, run in runs.items():
        check_teacher(spec, run, teacher)
    heldout = [run.heldout_source for run in runs.values() if run.heldout_source != run.source]
    source = config.source or next(iter(heldout), provenance.source)
    stream = as_measured(source, teacher.tokenizer, provenance, row_length(teacher.model.config))
    models = {name: student.load(config.device) for name, student in students.items()}
    read_at = named_hooks(config.student_hook, list(models))
    stream = replace(stream, context=shared_context(stream.context, teacher, models))
    for name, model in models.items():
        if students[name].distilled is None:
            check_same_tokens(teacher.tokenizer, model.tokenizer, f"the student {name!r}", stream)
        check_token_ids(model.model, np.array([last_token(teacher.tokenizer)]), f"the student {name!r}")
        for measured in hooks:  # all of them before anything is read, in case one lacks a hook point
            tapped_at(teacher, model, name, measured.hook, read_at.get(name))
    untrained = random_students(teacher, students, models) if config.random else {}
    weights = [loaded.revision for loaded in (teacher, *models.values())]
    decides = config.decisive() | {
        "source": source,
        "weights": weights,
        "measured": digest((config.measurement / MEASUREMENT_JSON).read_bytes()),
    }
    recoveries, states = [], []
    for measured in hooks:
        sae = measured_dictionary(measured, teacher, provenance)
        paths = [_state(config.out, processes, f"{measured.hook}.{which}") for which in ("try", "fit", "judge")]
        states += paths
        trying, fitting, judging = (Checkpoint(path, decides) for path in paths)
        with gone_if_refused(states):
            recovery = recover_features(
                tapped_model(teacher, [sae], [measured.hook]),
                sae,
                {name: tapped_at(teacher, m, name, measured.hook, read_at.get(name)) for name, m in models.items()},
                stream,
                measured=measured,
                random={
                    name: tapped_at(teacher, m, name, measured.hook, read_at.get(name)) for name, m in untrained.items()
                },
                importance=config.importance,
                tau=config.tau,
                max_tokens=config.tokens,
                rule=CountingRule.recorded(provenance.settings),
                processes=processes,
                checkpoints=(fitting, judging),
                student_hooks=read_at,
                trying=trying,
            )
        recoveries.append(recovery)
        if processes.first:
            Console(width=180).print(recovery)
    if processes.first:
        about = {
            "schema": 1,
            "settings": {**config.decisive(), "source": source},
            "versions": library_versions(),
            "seconds": round(time.monotonic() - started, 1),
        }
        write(recoveries, config.out, about)
        print(f"written to {config.out}")
    processes.wait()
    for state in states:
        remove_checkpoint(state)
    return recoveries


def _state(out: Path, processes: Processes, name: str) -> Path:
    """The file of this process's checkpoint."""
    of_version_0_1 = beside(processes.own(out), f"{name}.checkpoint.safetensors")
    return checkpoint_in(out, processes.own(Path(name)).name, beside=of_version_0_1)


def tapped_at(teacher: LoadedModel, student: LoadedModel, name: str, hook: str, named: str | None) -> Any:
    """A student in a form that can be read at all of its possible hook points.

    Raises:
        HookPointError: where it lacks a hook point; says how to name another.
    """
    hooks = (named,) if named is not None else possible_hooks(teacher.model, student.model, hook)
    try:
        module = tapped_model(student, [], [], hooks)
        for each in hooks:
            find_tap_point(module, each)
    except HookPointError as problem:
        raise HookPointError(
            f"the student {name!r} cannot be read ({problem}): name another --student-hook"
        ) from problem
    return module


def chosen(measurement: Measurement, hooks: tuple[str, ...]) -> list[HookMeasurement]:
    """The measurement at some hook points; by default the middle one."""
    return [measurement[hook] for hook in dict.fromkeys(hooks)] if hooks else [middle(measurement)]


def might_be_model(spec: str) -> bool:
    """Whether a name can be a model's. A folder without a model and a distillation are not."""
    folder = Path(spec).expanduser()
    return (folder / "config.json").is_file() or not folder.is_dir()


def check_teacher(spec: str, run: DistillationRun, teacher: LoadedModel) -> None:
    """Refuse students of another teacher.

    Raises:
        CapacityError: where the teacher's weights are not those that they were distilled from, or judged beside.
    """
    if fingerprint(teacher.model) != run.fingerprint:
        was, again = ("observed beside", "observe") if run.observed else ("distilled from", "distil")
        raise CapacityError(
            f"{spec} was {was} {run.teacher!r} with other weights than {teacher.name!r} has now: {again} again"
        )


def shared_context(asked: int, teacher: LoadedModel, models: Mapping[str, LoadedModel]) -> int:
    """Positions in a row that all models take, at most the requested number.

    A message says so if a student takes fewer.
    """
    limits = {name: longest(loaded.model) for name, loaded in models.items()}
    shortest = min(limits, key=limits.__getitem__)
    if limits[shortest] < asked:
        log.warning(
            f"rows have {limits[shortest]:,} positions instead of the measurement's {asked:,}, because the student"
            f" {shortest!r} takes no more"
        )
    return min(asked, limits[shortest], longest(teacher.model))


def random_students(
    teacher: LoadedModel, students: Mapping[str, NamedStudent], models: Mapping[str, LoadedModel]
) -> dict[str, LoadedModel]:
    """Each student with random weights. A distilled one gets those of its seed."""
    fresh = {}
    for name, loaded in models.items():
        curve = students[name].distilled
        model = (
            randomly_initialised(loaded.model)
            if curve is None
            else new_student(teacher.model, curve.width, curve.seed).eval()
        )
        fresh[name] = LoadedModel(model, loaded.tokenizer, f"{name} with random weights", None)
    return fresh


def write(recoveries: list[Recovery], out: Path, about: dict[str, Any]) -> None:
    """Write the figures of every feature, the figure and how it was made, then the list of students.

    The list comes last, as it says that everything is there.
    """
    make_folder(out)
    for recovery in recoveries:
        recovery.save_arrays(out, about)
    write_bytes(out / "recoverability.html", recovery_figure(recoveries).to_html(include_plotlyjs=True).encode())
    write_json(out / ABOUT_NAME, about)
    Recoverability(tuple(row for recovery in recoveries for row in recovery.rows)).save(out)


if __name__ == "__main__":
    run_file(main)
