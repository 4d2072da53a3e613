"""Commands that predict from a measurement: `budget`, `floor` and `plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tl_capacity.cli.shared import AsJson, Importance, Law, MaxFvu, Splice, Widths, print_notes, show, widths_in
from tl_capacity.errors import CapacityError
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_json

if TYPE_CHECKING:
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.predict.spliced import Spliced


def budget(
    folder: Annotated[Path, typer.Argument(help="The folder of a measurement.")],
    widths: Widths = "",
    importance: Importance = None,
    law: Law = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Print how many features each layer has and can hold.

    docs/about-counting.md explains the columns: F, L0, α, g(α), budget, d*, d*_het and FVU, with 95% intervals.
    """
    from tl_capacity.measurement.measurement import Measurement

    table_of_layers = Measurement.load(folder).budget(widths_in(widths), importance, law, max_fvu)
    show(table_of_layers, as_json)


def floor(
    path: Annotated[
        Path, typer.Argument(help="The folder of a measurement, or the JSON file of a published importance curve.")
    ],
    widths: Widths,
    importance: Importance = None,
    law: Law = None,
    hook: Annotated[str | None, typer.Option(help="Only this hook point.")] = None,
    splice: Splice = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Predict the loss floor of students of given widths."""
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.measurement.splices import splice_of
    from tl_capacity.predict.caveats import error_warnings, measurement_warnings
    from tl_capacity.predict.curve import Curve
    from tl_capacity.predict.floors import FloorPrediction, floor_cells
    from tl_capacity.predict.record import records
    from tl_capacity.predict.spliced_floor import SplicedFloor, kept_whole
    from tl_capacity.predict.spliced_floor import floor_cells as spliced_cells

    wanted, notes = widths_in(widths), list[str]()
    predictions, in_nats = list[FloorPrediction](), list[SplicedFloor]()
    if path.is_dir():
        measurement = Measurement.load(path)
        predictions = [f for f in measurement.floors(wanted, importance, law, max_fvu) if hook in (None, f.hook)]
        if hook is not None:
            measurement[hook]  # names the hooks that were measured where this is none of them
        asked = [each for each in measurement if hook in (None, each.hook)]
        notes = measurement_warnings(asked, measurement.complete) + error_warnings(asked, wanted, law)
        spliced, said = splice_of(measurement, path, splice)
        notes += said
        if spliced is not None and wanted:
            in_nats = [
                each
                for each in spliced.floors(measurement, wanted, law)
                if hook in (None, each.hook) and importance in (None, each.order)
            ]
            notes += [*spliced.notes(), *kept_whole(in_nats), *records(each.key for each in in_nats)]
    elif splice is not None:
        raise CapacityError("a published curve has no splice: leave out --splice, or pass a measurement folder")
    else:
        predictions = Curve.load(path).floors(wanted, law)
    if not predictions:
        raise CapacityError("no width was given: pass --widths 128,256,512")
    notes += sorted({f"{p.law}: {p.caveat}" for p in predictions if p.caveat})
    if as_json:
        rows = [*(each.to_json() for each in predictions), *(each.to_json() for each in in_nats)]
        print_json([{**row, "notes": notes} for row in rows])
        return
    title = f"Predicted floors: importance {predictions[0].importance}, law {predictions[0].law}"
    console().print(table(title, *floor_cells(predictions)))
    if in_nats:
        console().print(table("Floors of the spliced teacher, with nothing fitted", *spliced_cells(in_nats)))
    print_notes(notes)


def plan(
    folder: Annotated[Path, typer.Argument(help="A measurement of the teacher.")],
    keep: Annotated[float | None, typer.Option(help="Goal: the share of the features to keep, such as 0.95.")] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(
            help="Goal: the largest loss floor. It is in nats per token with a splice, forecasts or students, and "
            "otherwise in the importance's unit per token."
        ),
    ] = None,
    splice: Splice = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="Show the answers of other predictions too: a folder with forecasts.json or splice.json. "
            "May be repeated.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A distillation of the teacher. The losses of its students correct the predicted floors."),
    ] = None,
    observed: Annotated[
        str,
        typer.Option(
            help="How to read the loss of these students. last_tenth is the mean of the last tenth of "
            "the held-out curve, fit is where the curve is heading."
        ),
    ] = "last_tenth",
    widths: Annotated[str, typer.Option(help="Show what these student widths cost too.")] = "",
    hook: Annotated[
        str | None, typer.Option(help="Meet the goal at this hook point only. Default: at all hook points.")
    ] = None,
    importance: Importance = None,
    law: Law = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The teacher, whose configuration gives the cost in parameters. Default: the measured model."
        ),
    ] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Find the narrowest student that meets a goal, and what each width costs.

    Give --keep or --target-loss as the goal. The cost is in parameters.
    """
    from tl_capacity.distillation.run import DistillationRun
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.plan import check_goal, teacher_config
    from tl_capacity.plan import plan as make_plan
    from tl_capacity.predict.forecasts import spliced_and_forecasts

    check_goal(keep, target_loss)
    measurement = Measurement.load(folder)
    given = [spliced_and_forecasts(path) for path in beside or ()]
    spliced, notes = _spliced_for_plan(
        measurement, folder, splice, [each for each, _ in given], target_loss, importance
    )
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
        spliced=spliced,
        forecasts=[each for _, each in given if each is not None],
        students=None if calibrate is None else DistillationRun.load(calibrate),
        observed=observed,
    )
    show(replace(answer, remarks=(*answer.remarks, *notes)), as_json)


def _spliced_for_plan(
    measurement: Measurement,
    folder: Path,
    named: Path | None,
    beside: list[Spliced | None],
    target_loss: float | None,
    importance: str | None,
) -> tuple[Spliced | None, list[str]]:
    """The splice that a plan reads, and notes on it: the splice that was named, or the one beside the measurement if it
    can answer.
    """
    from tl_capacity.measurement.splices import splice_of
    from tl_capacity.runtime.units import NATS

    given = [each for each in beside if each is not None]
    if len(given) > 1 or (given and named is not None):
        raise CapacityError("a plan reads one splice: pass one, with --splice or as a folder with --with")
    if given:
        return given[0], []
    if named is None and target_loss is None:
        return None, []
    spliced, notes = splice_of(measurement, folder, named)
    if spliced is None or named is not None or measurement.hooks[0].unit(importance) == NATS:
        return spliced, notes
    if any(spliced.curve_of(hook, importance) is not None for hook in measurement):
        return spliced, notes
    order = measurement.hooks[0].estimator(importance).name
    return None, [f"the splice beside the measurement has no curve in the order of {order}, so it is not read"]
