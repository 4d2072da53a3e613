"""Verbs that count: measure, the doctor before it, merge after it, and the hook points there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_capacity.cli.shared import AsJson, print_notes, widths_in
from tl_capacity.errors import CapacityError, printable
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.options import command_with
from tl_capacity.runtime.progress import peak_memory
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_json, print_text

EXAMINED = {
    "model": "As for measure.",
    "saes": "As for measure; may be repeated.",
    "out": "Where the measurement is to be written; nothing is written there.",
    "tokens": "Tokens that are to be counted, for the time that it takes.",
    "source": "As for measure.",
    "importance": "As for measure; may be repeated.",
    "context": "As for measure.",
    "batch_rows": "As for measure.",
    "prepend_bos": "As for measure.",
    "special_tokens": "As for measure.",
    "skip_first_positions": "As for measure.",
    "device": "As for measure.",
    "dtype": "As for measure.",
    "revision": "As for measure.",
    "device_map": "As for measure.",
    "max_fvu": None,
}
"""The options of `measure` that `doctor` has too, and what its help says of them."""


@command_with(MeasureSettings, after={"widths": "importance"})
def measure(
    settings: MeasureSettings,
    widths: Annotated[
        str, typer.Option(help="Also print the predicted floors of these student widths, as 16,32,64.")
    ] = "",
) -> None:
    """Count a model's SAE features on text and write a measurement."""
    wanted = widths_in(widths)
    from tl_capacity.measure.distributed import measure_together
    from tl_capacity.predict.caveats import error_warnings
    from tl_capacity.runtime.processes import is_first

    measurement = measure_together(settings)
    if not is_first():
        return
    p, summary = measurement.provenance, measurement.hooks[0].summary
    masked = ", ".join(f"{count:,} {reason}" for reason, count in summary.masked.items())
    print_text(
        f"{summary.n_tokens:,} tokens of {printable(p.source)} through {printable(p.model)} in {p.seconds:,.0f} s;"
        f" masked: {masked} (special and first positions hold {summary.masked_norm_share:.1%} of Σ‖x‖²); peak memory"
        f" {peak_memory() / 1e9:.2f} GB"
    )
    importance = settings.importance[0] if settings.importance else None
    console().print(measurement.budget(wanted, importance, max_fvu=settings.max_fvu))
    print_notes(error_warnings(measurement, wanted))
    written = printable(str(settings.out))
    print_text(f"\nwritten to {written}; next: tl-capacity floor {written} --widths {widths or '128,256,512'}")


@command_with(MeasureSettings, only=EXAMINED, defaults={"model": "", "out": Path("runs")})
def doctor(
    settings: MeasureSettings,
    folder: Annotated[
        Path | None, typer.Argument(help="A measurement or checkpoint to continue; instead of --model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a set-up before a long measurement, on its first thousand tokens, and say what to change; exit code 2 where
    a run would fail or mean nothing.
    """
    if (folder is None) == (not settings.model):
        raise CapacityError("doctor checks either a folder or a model: pass one of DIR and --model")
    from tl_capacity.doctor import STOP, examine, examine_folder

    findings = examine(settings) if folder is None else examine_folder(folder, settings.tokens, settings.device)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        rows = [[finding.level, finding.check, finding.says] for finding in findings]
        console().print(table("Doctor", ["", "check", "what was found"], rows, right=False))
    if stops := sum(finding.level == STOP for finding in findings):
        raise CapacityError(
            f"{stops} of {len(findings)} checks found what would stop this run or leave it without meaning: mend what"
            f" is marked {STOP!r} above"
        )


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Measurements of the shards.")],
    out: Annotated[Path, typer.Option(help="Folder of the joined measurement.")],
) -> None:
    """Join measurements of shards into one: counts exactly, moments to rounding."""
    from tl_capacity.measurement.folder import JSON_NAME
    from tl_capacity.measurement.measurement import Measurement

    if (out / JSON_NAME).exists():
        raise CapacityError(f"{out} already holds a measurement: choose another --out")
    joined = Measurement.merge([Measurement.load(folder) for folder in folders])
    joined.save(out)
    console().print(joined.budget(max_fvu=None))


def hooks(
    model: Annotated[str, typer.Option(help="A registered name, a save_pretrained folder, or a hub id.")],
    matching: Annotated[str, typer.Option(help="Only names that contain this.")] = "",
) -> None:
    """List the hook points of a model."""
    from tl_capacity.models.hook_points import hook_names
    from tl_capacity.models.loading import load_model

    for name in hook_names(load_model(model).bridge):
        if matching in name:
            typer.echo(name)
