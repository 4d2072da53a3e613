"""Commands that count: `doctor`, `measure`, `merge` and `hooks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tl_capacity.cli.shared import AsJson, print_notes, widths_in
from tl_capacity.errors import CapacityError, printable
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.options import command_with
from tl_capacity.runtime.progress import peak_memory
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_json, print_text

if TYPE_CHECKING:
    from tl_capacity.measurement.measurement import Measurement

EXAMINED = {
    "model": None,
    "saes": None,
    "out": "The folder that you will give to measure. Nothing is written there.",
    "tokens": "Tokens that you will count, to estimate the time.",
    "source": None,
    "importance": None,
    "context": None,
    "batch_rows": None,
    "prepend_bos": None,
    "special_tokens": None,
    "skip_first_positions": None,
    "device": None,
    "dtype": None,
    "revision": None,
    "device_map": None,
    "max_fvu": None,
}
"""The options that `doctor` shares with `measure`, each with its help text; None keeps the text of `measure`."""


@command_with(MeasureSettings, after={"widths": "importance"})
def measure(
    settings: MeasureSettings,
    widths: Annotated[
        str, typer.Option(help="Print predicted floors of these student widths too, such as 16,32,64.")
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
    print_text(
        f"\nwritten to {written}; next: tl-capacity floor {written} --widths {widths or some_narrower(measurement)}"
    )


def some_narrower(measurement: Measurement) -> str:
    """A quarter, a half and three quarters of the narrowest hook point's width, as widths on a command line."""
    width = min(hook.width for hook in measurement)
    return ",".join(str(each) for each in sorted({max(1, part * width // 4) for part in (1, 2, 3)}))


@command_with(MeasureSettings, only=EXAMINED, defaults={"model": "", "out": Path("runs")})
def doctor(
    settings: MeasureSettings,
    folder: Annotated[
        Path | None, typer.Argument(help="A measurement or checkpoint to continue. Give this or --model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a set-up before a long measurement. This tries the first thousand tokens and says what to change. The exit
    code is 2 if a run would fail or mean nothing.
    """
    if (folder is None) == (not settings.model):
        raise CapacityError("doctor checks either a folder or a model: pass a folder or --model")
    from tl_capacity.doctor import STOP, examine, examine_folder

    findings = examine(settings) if folder is None else examine_folder(folder, settings.tokens, settings.device)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        rows = [[finding.level, finding.check, finding.says] for finding in findings]
        console().print(table("Doctor", ["", "check", "what was found"], rows, right=False))
    if stops := sum(finding.level == STOP for finding in findings):
        raise CapacityError(
            f"{stops} of {len(findings)} checks found something that would stop this run or make it meaningless: fix "
            f"what is marked {STOP!r} above"
        )


def merge(
    folders: Annotated[list[Path], typer.Argument(help="The measurements to join, one for each shard.")],
    out: Annotated[Path, typer.Option(help="The folder to write the joined measurement to.")],
) -> None:
    """Join measurements of shards into one.

    Counts are exact, and moments are exact up to rounding.
    """
    from tl_capacity.measurement.folder import JSON_NAME
    from tl_capacity.measurement.measurement import Measurement

    if (out / JSON_NAME).exists():
        raise CapacityError(f"{out} already holds a measurement: choose another --out")
    joined = Measurement.merge([Measurement.load(folder) for folder in folders])
    joined.save(out)
    console().print(joined.budget(max_fvu=None))


def hooks(
    model: Annotated[
        str, typer.Option(help="The model: a name that a plugin registered, a save_pretrained folder, or a hub id.")
    ],
    matching: Annotated[str, typer.Option(help="Only hook points whose names contain this.")] = "",
) -> None:
    """List the hook points of a model."""
    from tl_capacity.models.hook_points import hook_names
    from tl_capacity.models.loading import load_model

    for name in hook_names(load_model(model).bridge):
        if matching in name:
            typer.echo(name)
