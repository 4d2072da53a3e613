"""Which concepts a model and its students still tell: `tl-capacity run probe --model TEACHER --model STUDENT … --hook H
--concepts embedded --out DIR`.

Linear probes of each concept at one hook point of each model, beside a majority vote, a bag of embeddings, models with
random weights, a control task, and as many principal components of the teacher as a student is wide; and, with an SAE,
the few features that carry a concept. A run that was interrupted goes on where it was; under
`accelerate launch -m tl_capacity run probe …` each process takes some of the models.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from tl_capacity.dictionaries.adapter import dictionary_digest
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.distillation.named_students import NamedStudent, is_run, students_named
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.measure.setup import measured_dictionary
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import middle_hook
from tl_capacity.models.loading import LoadedModel
from tl_capacity.probing.concepts import load_concepts
from tl_capacity.probing.experiment import ProbeSettings, TappedModel, probe_models
from tl_capacity.probing.layers import named_hooks, possible_hooks
from tl_capacity.probing.probe_result import ProbeResult
from tl_capacity.probing.rows import JSON_NAME
from tl_capacity.recipe import already_there, option, run_file, settings_of
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP, device_named
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
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import make_folder, write_bytes

TABLE_NAME, FIGURE_NAME = "probes.csv", "probes.html"


@dataclass(frozen=True)
class ProbeConfig:
    """Everything that decides the result."""

    model: tuple[str, ...] = option(
        ("embedded",),
        "A model: a name that a plugin registered, a save_pretrained folder, a hub id, or the folder of a"
        " distillation or of observed students. May be repeated. The first is the teacher.",
    )
    student_hook: tuple[str, ...] = option(
        (),
        "Where students are read, as HOOK or STUDENT=HOOK. May be repeated. Default: the teacher's hook point. For a"
        " student with more or fewer layers: the best layer on the validation texts.",
        repeated=True,
    )
    hook: str = option(
        "",
        "Hook point, by TransformerLens' name. Default: the residual stream after the teacher's middle layer.",
    )
    concepts: tuple[str, ...] = option(
        ("embedded",),
        "Concepts, collections of them, .jsonl files or datasets ids; `tl-capacity plugins` lists the first two.",
    )
    out: Path = option(Path("runs/probes"), "Folder to write.")
    pooling: str = option(
        "mean",
        "What is kept of a text: mean, last (its last token) or token (up to eight single tokens).",
    )
    sae: str = option(
        "",
        "An SAE of the teacher at that hook point, for k-sparse probes. Default: the one that comes with the teacher.",
    )
    measurement: Path | None = option(
        None,
        "A measurement of the teacher. It names the SAE, ranks its features, and gives the width at which the law"
        " drops them.",
    )
    importance: str = option("second_moment", "Importance estimator that ranks the features.")
    law: str = option("compressed_sensing", "Capacity law that gives the widths.")
    baselines: bool = option(
        True,
        "Also probe models with random weights, the teacher's principal components, its embeddings, and the control"
        " task.",
    )
    context: int | None = option(None, "Positions in a row, BOS included. Default: what the model takes, at most 512.")
    batch_rows: int = option(32, "Texts in a forward pass.", least=1)
    seed: int = option(0, "Seed of folds, random weights, control labels and resamples.", least=0)
    device: str = option(AUTO, f"Where the models run: {DEVICE_HELP}")
    threads: int = option(0, "CPU threads of the models; 0 leaves it to torch.", least=0)

    def decisive(self, *without: str) -> dict[str, Any]:
        """The settings that decide the result, except the given ones.

        A setting that earlier versions did not have is there only if it was given.
        """
        return settings_of(self, "out", *([] if self.student_hook else ["student_hook"]), *without)


def main(config: ProbeConfig) -> ProbeResult | None:
    """Probe models for concepts, and write their accuracy and AUROC beside those of baselines.

    Returns:
        What was found; None where `out` already holds it.

    Raises:
        CapacityError: on an unknown model, concept or hook point, texts that cannot be probed, or a folder that already
            holds other probes.
    """
    config = replace(config, device=device_named(config.device))  # is recorded
    processes = Processes.of_launch()
    known = config.decisive(*([] if config.hook else ["hook"]))
    if already_there(config.out / JSON_NAME, config.out / JSON_NAME, known):
        remove_checkpoints_in(config.out)
        return None
    processes = processes.connected(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.monotonic()
    concepts = load_concepts(config.concepts)
    measurement = None if config.measurement is None else Measurement.load(config.measurement)
    names = named(config.model)
    models = [student.load(config.device) for student in names.values()]
    config = replace(config, hook=config.hook or middle_hook(models[0].model.config))
    # All of them before anything is collected, in case one lacks the hook.
    read_at = named_hooks(config.student_hook, list(names)[1:])
    hooks = [
        (read_at[name],) if name in read_at else possible_hooks(models[0].model, model.model, config.hook)
        for name, model in zip(names, models, strict=True)
    ]
    tapped = [TappedModel.at(model, *each) for model, each in zip(models, hooks, strict=True)]
    sae, measured = _dictionary(config, models[0], measurement)
    texts = digest(
        "\n".join(
            repr((c.name, c.texts, c.labels.tolist(), c.documents.tolist(), c.splits.tolist())) for c in concepts
        ).encode()
    )
    decides = config.decisive() | {"weights": [model.revision for model in models], "texts": texts}
    state = checkpoint_in(
        config.out,
        processes.own(Path("probes")).name,
        beside=beside(processes.own(config.out), "checkpoint.safetensors"),
    )
    checkpoint = Checkpoint(state, decides)
    settings = ProbeSettings(**{field.name: getattr(config, field.name) for field in fields(ProbeSettings)})
    with gone_if_refused([state]):
        result = probe_models(settings, concepts, tapped, sae, measured, checkpoint, processes)
    if processes.first:
        versions = library_versions() | {"scikit-learn": importlib.metadata.version("scikit-learn")}
        about = {
            "settings": config.decisive(),
            "versions": versions,
            "seconds": round(time.monotonic() - started, 1),
        }
        write(result, about, config.out)
        show(result)
        print(f"written to {config.out}")
    processes.wait()
    remove_checkpoint(state)
    return result


def named(models: Sequence[str]) -> dict[str, NamedStudent]:
    """The models by short names.

    A distillation stands for its students without controls, and for its teacher unless another model comes first.

    Raises:
        CapacityError: where none is named, or one twice.
    """
    specs = list(models)
    if specs and is_run(specs[0]):
        specs.insert(0, DistillationRun.load(specs[0]).teacher)
    if not specs:
        raise CapacityError("no model is named: pass --model, with the teacher first")
    return students_named(specs)


def write(result: ProbeResult, about: Mapping[str, Any], out: Path) -> None:
    """Write the table and the figure, then the JSON. It comes last, as it says that everything is there."""
    make_folder(out)
    numbers = result.numbers(**about)
    write_bytes(out / TABLE_NAME, numbers.to_frame().to_csv(index=False).encode())
    write_bytes(out / FIGURE_NAME, numbers.plot().to_html(include_plotlyjs=True).encode())
    numbers.save(out)


def show(result: ProbeResult) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=180)
    for table in result.tables():
        console.print(table)
    for note in result.notes():
        console.print(f"note: {note}", highlight=False, markup=False)


def _dictionary(
    config: ProbeConfig, teacher: LoadedModel, measurement: Measurement | None
) -> tuple[SparseAutoencoder | None, HookMeasurement | None]:
    """The SAE of the k-sparse probes, and its measurement.

    Raises:
        CapacityError: where the measurement is of another model, or of other weights than the SAE has that is given.
    """
    bundled = teacher.named.saes.get(config.hook) if teacher.named else None
    given = config.sae or (str(bundled) if bundled is not None and measurement is None else "")
    sae = load_sae(given, config.device)[1] if given else None
    if measurement is None:
        return sae, None
    measured, provenance = measurement[config.hook], measurement.provenance
    if provenance.revision != teacher.revision:
        raise CapacityError(
            f"{config.measurement} was measured on {provenance.model!r} with other weights than {teacher.name!r} has:"
            " pass the teacher's measurement"
        )
    if sae is None:
        return measured_dictionary(measured, teacher, provenance), measured
    if dictionary_digest(sae) != measured.sae_digest:
        raise CapacityError(
            f"{config.measurement} was measured with another SAE at {config.hook}: pass that SAE with --sae, or leave"
            " --sae out"
        )
    return sae, measured


if __name__ == "__main__":
    run_file(main)
