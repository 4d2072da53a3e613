"""Verbs that judge the prediction: decompose, effective, observe and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_capacity.cli.shared import AsJson, Importance, Law, MaxFvu, Splice, print_notes, show, widths_in
from tl_capacity.distillation.observing import ObserveSettings
from tl_capacity.options import command_with
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_json


def decompose(
    measurement: Annotated[Path, typer.Argument(help="A measurement of the teacher.")],
    distillation: Annotated[
        Path,
        typer.Argument(
            help="Students of it, as `tl-capacity run distill --out` or `tl-capacity observe --out` wrote it."
        ),
    ],
    hook: Annotated[
        str | None, typer.Option(help="The hook point to predict from. Default: the middle one of those measured.")
    ] = None,
    importance: Importance = None,
    law: Law = None,
    observed: Annotated[
        str,
        typer.Option(
            help="last_tenth: the mean of the held-out curve at its end; fit: where it is heading. The verdict by the"
            " other stands beside."
        ),
    ] = "last_tenth",
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="Floors for which the teacher was run: a folder with splice.json or forecasts.json, or the file."
            " Repeatable.",
        ),
    ] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Compare predicted with observed floors, and with everything else that might explain them."""
    from tl_capacity.distillation.decomposition import decompose as run_decompose
    from tl_capacity.distillation.run import DistillationRun
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.predict.forecasts import spliced_and_forecasts

    decomposition = run_decompose(
        Measurement.load(measurement),
        DistillationRun.load(distillation),
        hook=hook,
        importance=importance,
        law=law,
        observed=observed,
        max_fvu=max_fvu,
        forecasts=[told for path in given or () for told in spliced_and_forecasts(path) if told is not None],
    )
    show(decomposition, as_json)


def effective(
    measurement: Annotated[Path, typer.Argument(help="A measurement of the teacher.")],
    distillation: Annotated[
        Path, typer.Argument(help="A distillation of it, as `tl-capacity run distill --out` wrote it.")
    ],
    splice: Splice = None,
    hook: Annotated[str | None, typer.Option(help="Only this hook point. Default: all that were spliced.")] = None,
    importance: Annotated[
        str | None, typer.Option(help="Only this order of the features. Default: all that were spliced.")
    ] = None,
    law: Law = None,
    observed: Annotated[
        str, typer.Option(help="last_tenth: what the students reached; fit: where their held-out curves are heading.")
    ] = "last_tenth",
    as_json: AsJson = False,
) -> None:
    """Say how many features the students of each width are worth, for each of their dimensions, beside g(α)."""
    from tl_capacity.distillation.effective import effective_capacity
    from tl_capacity.distillation.run import DistillationRun
    from tl_capacity.errors import CapacityError
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.measurement.splices import splice_of

    measured = Measurement.load(measurement)
    spliced, notes = splice_of(measured, measurement, splice)
    if spliced is None:
        raise CapacityError(
            notes[0]
            if notes
            else f"no splice of this measurement lies beside it: run tl-capacity run splice {measurement}, and pass"
            " what it wrote with --splice"
        )
    students = DistillationRun.load(distillation)
    show(
        effective_capacity(measured, spliced, students, hook=hook, importance=importance, law=law, observed=observed),
        as_json,
    )


@command_with(ObserveSettings)
def observe(settings: ObserveSettings, as_json: AsJson = False) -> None:
    """Judge students that somebody else made: their KL from the teacher on held-out text, of every document."""
    from tl_capacity.distillation.observed import judged_cells
    from tl_capacity.distillation.observed_by_name import observe_named
    from tl_capacity.distillation.observed_table import judged_json, judged_notes, judged_title
    from tl_capacity.runtime.processes import is_first

    run = observe_named(settings)
    if not is_first():
        return
    if as_json:
        print_json(judged_json(run))
        return
    console().print(table(judged_title(run), *judged_cells(run)))
    print_notes(judged_notes(run))
    typer.echo(f"written to {settings.out}")


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="A measurement, and with it a distillation, probes, recoverability, a splice, a price list: folders or"
            " JSON files, in any order. A second measurement stands beside the first."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    widths: Annotated[
        str, typer.Option(help="Student widths, as 128,256,512. Default: those that were distilled.")
    ] = "",
    importance: Importance = None,
    law: Law = None,
    hook: Annotated[
        str | None,
        typer.Option(help="The hook point that the verdict is about. Default: the middle one of those measured."),
    ] = None,
    observed: Annotated[str, typer.Option(help="As for decompose: last_tenth or fit.")] = "last_tenth",
    target_loss: Annotated[
        float, typer.Option(help="The loss in nats per token for which the verdict names a width.")
    ] = 0.1,
    splice: Splice = None,
    snippets: Annotated[
        bool, typer.Option(help="Show the text on which features are most active; runs the model.")
    ] = True,
    model: Annotated[str | None, typer.Option(help="The model that was measured, if it is elsewhere now.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Text to show features on. Default: that which was measured.")
    ] = None,
    snippet_tokens: Annotated[int, typer.Option(help="How much of it to look through.")] = 20_000,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = AUTO,
) -> None:
    """Write one self-contained HTML page that shows everything that was found."""
    from tl_capacity.report import ReportSettings, Results, find_snippets, write_report

    shown = Results.load(results, splice)
    settings = ReportSettings(widths_in(widths), importance, law, hook, observed, target_loss)
    examples, note = (
        find_snippets(shown, settings, model, source, snippet_tokens, device)
        if snippets
        else ({}, "Text was left out with --no-snippets.")
    )
    write_report(out, shown, settings, examples, note)
    remark = f"; {note[:1].lower()}{note[1:]}" if note else ""
    typer.echo(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB){remark}")
