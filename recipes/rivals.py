"""Floors that know nothing of features, and a bound for every student: `tl-capacity run rivals MEASUREMENT --widths
16,24,32 --out DIR`.

Computes with the teacher what a prediction has to beat: the teacher projected on principal components, the truncated
student before its first step, and the least KL that logits of a width's rank can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tl_capacity.recipes.splice import ABOUT_NAME, text_to_judge_on

from tl_capacity.errors import CapacityError
from tl_capacity.measure.setup import as_measured, measured_teacher, tapped_model
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.models.defaults import row_length
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.models.loading import LoadedModel
from tl_capacity.models.places import hugging_face_place
from tl_capacity.predict.forecasts import JSON_NAME, Forecast, Forecasts
from tl_capacity.recipe import already_there, argument, option, option_of, run_file, settings_of
from tl_capacity.rivals.bound import RANK_BOUND, BoundSettings, rank_bound
from tl_capacity.rivals.projection import PCA_SPLICE, every_layer, pca_splice
from tl_capacity.rivals.start import TRUNCATED_START, truncated_start
from tl_capacity.rivals.text import heldout_text
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP, device_named
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.checkpoints import Checkpoint, remove_checkpoints_in
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import make_folder, write_json
from tl_capacity.text.counting import CountingRule

PREDICTORS = (RANK_BOUND, PCA_SPLICE, TRUNCATED_START)
PARTS_NAME, BOUND_NAME = "parts.checkpoint.safetensors", "rank_bound.checkpoint.safetensors"


@dataclass(frozen=True)
class RivalsConfig:
    """Everything that decides the floors."""

    measurement: Path = argument("A measurement of the teacher.")
    widths: tuple[int, ...] = option((), "Student widths, such as 16,24,32.")
    predictors: tuple[str, ...] = option(PREDICTORS, f"What to compute, out of {', '.join(PREDICTORS)}.")
    out: Path = option(Path("runs/rivals"), "Folder to write.")
    hook: tuple[str, ...] = option((), "Hook points to project at, measured or not. Default: all that were measured.")
    every_layer: bool = option(False, "Also project the residual stream after all blocks at once.")
    source: str = option(
        "",
        "Text to judge on, best text that was not measured. Default: the measured text; for the embedded teacher's,"
        " its held-out part.",
    )
    tokens: int = option(16_384, "Predicted tokens to read, in whole batches, as run distill reads --heldout-tokens.")
    fit_tokens: int = option(50_000, "Tokens of the measured text to fit principal components to.", least=1)
    seed: int = option(0, "Seed of the truncated student's weights that the teacher does not give.", least=0)
    iterations: int = option_of(BoundSettings, "iterations")
    tolerance: float = option_of(BoundSettings, "tolerance")
    device: str = option(AUTO, f"Where the models run: {DEVICE_HELP}")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)


def main(config: RivalsConfig) -> Forecasts | None:
    """Compute floors without any features and a bound for every student, print them, and write them.

    The same command started again goes on where it was stopped.

    Returns:
        The floors; None where `out` already holds them.

    Raises:
        CapacityError: where a predictor is none of these, the measurement is of another model than there is now, or on
            whatever the predictors refuse.
    """
    config = replace(config, device=device_named(config.device))  # is recorded
    if unknown := [name for name in config.predictors if name not in PREDICTORS]:
        raise CapacityError(f"{unknown[0]!r} is not computed here: choose from {', '.join(PREDICTORS)}")
    if not config.widths:
        raise CapacityError("there is no width to compute floors for: pass --widths, such as 16,24,32")
    settings = settings_of(config, "out", "threads")
    if already_there(config.out / JSON_NAME, config.out / ABOUT_NAME, settings):
        remove_checkpoints_in(config.out)
        return None
    measurement = Measurement.load(config.measurement)
    settings["measured"] = digest((config.measurement / MEASUREMENT_JSON).read_bytes())
    if config.threads:
        torch.set_num_threads(config.threads)
    teacher = measured_teacher(config.measurement, measurement.provenance, config.device)
    make_folder(config.out)
    forecasts = _computed(config, measurement, teacher, settings)
    write_json(config.out / ABOUT_NAME, {"schema": 1, "settings": settings_of(config, "out", "threads")})
    forecasts.save(config.out)
    remove_checkpoints_in(config.out)
    Console(width=180).print(forecasts)
    print(f"written to {config.out}")
    return forecasts


def _computed(
    config: RivalsConfig, measurement: Measurement, teacher: LoadedModel, settings: dict[str, Any]
) -> Forecasts:
    """The floors of every predictor. Those of an interrupted run come from the checkpoint."""
    provenance = measurement.provenance
    source = text_to_judge_on(config.source, provenance.source)
    text = partial(
        as_measured, tokenizer=teacher.tokenizer, provenance=provenance, usual=row_length(teacher.model.config)
    )
    batches, measured = heldout_text(text(source), config.tokens), text(provenance.source)
    jobs: dict[str, Callable[[], Forecasts]] = {}
    if TRUNCATED_START in config.predictors:
        jobs[TRUNCATED_START] = lambda: truncated_start(
            teacher.model, batches, config.widths, shown_on=measured, seed=config.seed
        )
    if PCA_SPLICE in config.predictors:
        hooks = list(dict.fromkeys(config.hook or [measured_hook.hook for measured_hook in measurement]))
        rule = CountingRule.recorded(provenance.settings)
        project = partial(pca_splice, fitted_on=measured, rule=rule, fit_tokens=config.fit_tokens)
        tapped = _tapped(config, provenance, teacher, hooks)
        jobs[PCA_SPLICE] = lambda: project(tapped, batches, config.widths, hooks)
        if config.every_layer:
            layers = every_layer(teacher.model)
            jobs[f"{PCA_SPLICE} everywhere"] = lambda: project(
                _tapped(config, provenance, teacher, layers), batches, config.widths, layers, together=True
            )
    if RANK_BOUND in config.predictors:
        bound = BoundSettings(config.iterations, config.tolerance)
        jobs[RANK_BOUND] = lambda: rank_bound(
            teacher.model, batches, config.widths, bound, checkpoint=config.out / BOUND_NAME
        )
    checkpoint = Checkpoint(config.out / PARTS_NAME, settings)
    done = dict(checkpoint.about)
    for name, job in jobs.items():
        if name not in done:
            done[name] = job().to_json()
            checkpoint.save({}, done)
    parts = [_restored(done[name]) for name in jobs]
    about = {
        "model": provenance.model,
        "revision": provenance.revision,
        "source": source,
        "measured_on": provenance.source,
        "tokens": parts[0].about["tokens"],
        "measured": settings["measured"],
        "versions": library_versions(),
        "seconds": round(sum(part.about["seconds"] for part in parts), 1),
        "parts": {name: part.about for name, part in zip(jobs, parts, strict=True)},
    }
    return Forecasts(
        tuple(record for part in parts for record in part),
        about,
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _tapped(config: RivalsConfig, provenance: Provenance, teacher: LoadedModel, hooks: Sequence[str]) -> Any:
    """The teacher in a form that has some hook points.

    A bridge changes the model that it wraps, so it gets a model of its own.
    """
    if not all(hugging_face_place(teacher.model, hook) for hook in hooks):
        teacher = measured_teacher(config.measurement, provenance, config.device)
    model = tapped_model(teacher, [], [], hooks)
    for hook in hooks:
        find_tap_point(model, hook)  # says which there are, before anything runs
    return model


def _restored(saved: Mapping[str, Any]) -> Forecasts:
    """The floors of one predictor from a checkpoint."""
    return Forecasts(tuple(map(Forecast.from_json, saved["forecasts"])), saved["about"], tuple(saved["notes"]))


if __name__ == "__main__":
    run_file(main)
