"""The floor of a width in nats, with nothing fitted: `tl-capacity run splice MEASUREMENT --widths 16,24,32 --out DIR`.

Runs the teacher with only its most important features at a hook point, for as many of them as each width may keep, and
writes KL against features kept. From that curve `floor`s of further widths and laws are read without the model. Under
`accelerate launch -m tl_capacity run splice …` each process runs a part of the text, and all sums are added up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from tl_capacity.hooks.embedded import heldout_of

from tl_capacity.measure.setup import as_measured, measured_dictionary, measured_teacher, tapped_model
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import row_length
from tl_capacity.predict.spliced import JSON_NAME, Spliced, floor_cells
from tl_capacity.recipe import already_there, argument, option, run_file, settings_of
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP, device_named
from tl_capacity.runtime.processes import Processes
from tl_capacity.show.tables import table, terminal_notes
from tl_capacity.splicing.splice import LOST, splice
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import make_folder, write_json

ABOUT_NAME = "settings.json"


@dataclass(frozen=True)
class SpliceConfig:
    """Everything that decides the curves."""

    measurement: Path = argument("A measurement of the teacher.")
    widths: tuple[int, ...] = option((), "Student widths. Their numbers of features are run exactly.")
    out: Path = option(Path("runs/splice"), "Folder to write.")
    hook: tuple[str, ...] = option((), "Hook points. Default: all that were measured.")
    importance: tuple[str, ...] = option((), "Importance estimators that rank the features. Default: the paper's.")
    law: tuple[str, ...] = option((), "Capacity laws that say how many features a width keeps. Default: the paper's.")
    kept: tuple[int, ...] = option((), "Further numbers of features to run. Default: ten between none and all.")
    source: str = option(
        "",
        "Text to read, best text that was not measured. Default: the measured text; for the embedded teacher's, its"
        " held-out part.",
    )
    tokens: int = option(20_000, "Tokens to read.")
    lost: str = option("mean", f"What stands in for a lost latent: {', '.join(LOST)}.")
    keep_error: bool = option(False, "Leave the SAE's own error in the stream.")
    device: str = option(AUTO, f"Where the model runs: {DEVICE_HELP}")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)


def main(config: SpliceConfig) -> Spliced | None:
    """Run the teacher with only its most important features, print the floors of the widths, and write the curves.

    Returns:
        The curves; None where `out` already holds them.

    Raises:
        CapacityError: where the measurement is of another model or SAE than there is now, or on whatever splicing
            refuses.
    """
    config = replace(config, device=device_named(config.device))  # is recorded
    processes = Processes.of_launch()
    if already_there(config.out / JSON_NAME, config.out / ABOUT_NAME, settings_of(config, "out", "threads")):
        return None
    processes = processes.connected(config.device)
    measurement = Measurement.load(config.measurement)
    hooks = chosen(measurement, config.hook)
    if config.threads:
        torch.set_num_threads(config.threads)
    provenance = measurement.provenance
    teacher = measured_teacher(config.measurement, provenance, config.device)
    source = text_to_judge_on(config.source, provenance.source)
    parts = []
    for hook in hooks:
        sae = measured_dictionary(hook, teacher, provenance)
        parts.append(
            splice(
                tapped_model(teacher, [sae], [hook.hook]),
                measurement,
                as_measured(source, teacher.tokenizer, provenance, row_length(teacher.model.config)),
                config.widths,
                saes={hook.hook: sae},
                importance=config.importance,
                laws=config.law,
                kept=config.kept,
                lost=config.lost,
                keep_error=config.keep_error,
                max_tokens=config.tokens,
                processes=processes,
            )
        )
        if processes.first:
            _say(parts[-1], hook, config)
    curves = tuple(curve for part in parts for curve in part)
    about = {**parts[-1].about, "measured": digest((config.measurement / MEASUREMENT_JSON).read_bytes())}
    about["seconds"] = round(sum(part.about["seconds"] for part in parts), 1)
    spliced = Spliced(curves, about)
    if processes.first:
        make_folder(config.out)
        write_json(config.out / ABOUT_NAME, {"schema": 1, "settings": settings_of(config, "out", "threads")})
        spliced.save(config.out)
        print(f"written to {config.out}")
    processes.wait()
    return spliced


def text_to_judge_on(given: str, measured: str) -> str:
    """The requested text, or else the measured one; instead of the embedded corpus its held-out part."""
    return given or heldout_of(measured) or measured


def chosen(measurement: Measurement, hooks: tuple[str, ...]) -> list[HookMeasurement]:
    """The measurement at some hook points with all SAEs there; by default at all hook points."""
    for hook in hooks:
        if hook not in {measured.hook for measured in measurement}:
            measurement[hook]  # says which there are
    return [measured for measured in measurement if not hooks or measured.hook in hooks]


def _say(part: Spliced, hook: HookMeasurement, config: SpliceConfig) -> None:
    """Print the floors of the widths, or the curve if no width was given."""
    console = Console(width=180)
    if not config.widths:
        console.print(part)
        return
    floors = [floor for law in (config.law or (None,)) for floor in part.floors([hook], config.widths, law)]
    console.print(table("Floors with nothing fitted [95% interval over documents]", *floor_cells(floors)))
    for note in terminal_notes(part.notes()):
        console.print(note)


if __name__ == "__main__":
    run_file(main)
