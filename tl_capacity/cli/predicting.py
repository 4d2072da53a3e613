"""Verbs that predict from a measurement: budget, floor and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_capacity.cli.shared import AsJson, Importance, Law, MaxFvu, Widths, print_notes, show, widths_in
from tl_capacity.errors import CapacityError
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_json


def budget(
    folder: Annotated[Path, typer.Argument(help="A measurement.")],
    widths: Widths = "",
    importance: Importance = None,
    law: Law = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Print the per-layer table: F, L0, α, g(α), budget, d*, d*_het, FVU, with intervals."""
    from tl_capacity.measurement.measurement import Measurement

    table_of_layers = Measurement.load(folder).budget(widths_in(widths), importance, law, max_fvu)
    show(table_of_layers, as_json)


def floor(
    path: Annotated[Path, typer.Argument(help="A measurement folder, or the JSON of a published importance curve.")],
    widths: Widths,
    importance: Importance = None,
    law: Law = None,
    hook: Annotated[str | None, typer.Option(help="Only this hook point.")] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Predict the loss floor of students of some widths."""
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.predict.caveats import error_warnings
    from tl_capacity.predict.curve import Curve
    from tl_capacity.predict.floors import floor_cells

    wanted, notes = widths_in(widths), list[str]()
    if path.is_dir():
        measurement = Measurement.load(path)
        predictions = [f for f in measurement.floors(wanted, importance, law, max_fvu) if hook in (None, f.hook)]
        if hook is not None:
            measurement[hook]  # names the hooks that were measured where this is none of them
        notes = measurement.warnings + error_warnings(measurement, wanted, law)
    else:
        predictions = Curve.load(path).floors(wanted, law)
    if not predictions:
        raise CapacityError("no width was given: pass --widths 128,256,512")
    if as_json:
        print_json([p.to_json() for p in predictions])
        return
    title = f"Predicted floors: importance {predictions[0].importance}, law {predictions[0].law}"
    console().print(table(title, *floor_cells(predictions)))
    print_notes(notes + sorted({f"{p.law}: {p.caveat}" for p in predictions if p.caveat}))


def plan(
    folder: Annotated[Path, typer.Argument(help="A measurement of the teacher.")],
    keep: Annotated[float | None, typer.Option(help="Share of the features to keep, as 0.95.")] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(help="Largest predicted floor, in the importance's unit per token; with --splice in nats."),
    ] = None,
    splice: Annotated[
        Path | None, typer.Option(help="What run splice wrote of the measurement: floors in nats, nothing fitted.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Also show what these widths cost.")] = "",
    hook: Annotated[
        str | None, typer.Option(help="Only this hook point. Default: the goal must be met at all of them.")
    ] = None,
    importance: Importance = None,
    law: Law = None,
    model: Annotated[
        str | None, typer.Option(help="The teacher, for the cost in parameters. Default: the one that was measured.")
    ] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Find the smallest student width that meets a goal, and what each width costs in parameters."""
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.plan import check_goal, teacher_config
    from tl_capacity.plan import plan as make_plan
    from tl_capacity.predict.spliced import Spliced

    check_goal(keep, target_loss)
    measurement = Measurement.load(folder)
    answer = make_plan(
        measurement,
        keep=keep,
        target_loss=target_loss,
        widths=widths_in(widths),
        hook=hook,
        importance=importance,
        law=law,
        max_fvu=max_fvu,
        config=teacher_config(measurement, model),
        spliced=None if splice is None else Spliced.load(splice),
    )
    show(answer, as_json)
