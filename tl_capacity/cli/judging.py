"""Commands that judge predictions: `decompose`, `effective`, `observe` and `report`."""

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
        typer.Argument(help="Its students: the folder that `tl-capacity run distill` or `tl-capacity observe` wrote."),
    ],
    hook: Annotated[
        str | None, typer.Option(help="The hook point to predict from. Default: the middle one of those measured.")
    ] = None,
    importance: Importance = None,
    law: Law = None,
    observed: Annotated[
        str,
        typer.Option(
            help="How to read the loss that students reached. last_tenth is the mean of the last tenth of the "
            "held-out curve, fit is where the curve is heading. The verdict by the other one is shown too."
        ),
    ] = "last_tenth",
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="Further predictions, made with `run splice` or `run rivals`: their folder, or its splice.json or "
            "forecasts.json. May be repeated.",
        ),
    ] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Compare predicted with observed floors, and with rival explanations."""
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
        Path, typer.Argument(help="Its students: the folder that `tl-capacity run distill` wrote.")
    ],
    splice: Splice = None,
    hook: Annotated[str | None, typer.Option(help="Only this hook point. Default: all that were spliced.")] = None,
    importance: Annotated[
        str | None,
        typer.Option(help="Only features ranked by this importance. Default: every ranking that was spliced."),
    ] = None,
    law: Law = None,
    observed: Annotated[
        str,
        typer.Option(
            help="How to read the loss that students reached. last_tenth is the mean of the last "
            "tenth of the held-out curve, fit is where the curve is heading."
        ),
    ] = "last_tenth",
    as_json: AsJson = False,
) -> None:
    """Say how many features each dimension of the students is worth.

    The answer stands beside g(α), the number that the theory predicts.
    """
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
            else (
                f"no splice of this measurement lies beside it: run tl-capacity run splice {measurement}, and pass "
                "the folder that it writes with --splice"
            )
        )
    students = DistillationRun.load(distillation)
    show(
        effective_capacity(measured, spliced, students, hook=hook, importance=importance, law=law, observed=observed),
        as_json,
    )


@command_with(ObserveSettings)
def observe(settings: ObserveSettings, as_json: AsJson = False) -> None:
    """Judge students that somebody else trained. Their loss is the KL from the teacher on held-out text. It is stored
    for every document.
    """
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
            help="A measurement, and anything else to show with it: a distillation, probes, recoverability, a "
            "splice, a price list. Folders or JSON files, in any order. A second measurement is compared with "
            "the first."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    widths: Annotated[
        str, typer.Option(help="Student widths, such as 128,256,512. Default: the widths that were distilled.")
    ] = "",
    importance: Importance = None,
    law: Law = None,
    hook: Annotated[
        str | None,
        typer.Option(help="The hook point that the verdict is about. Default: the middle one of those measured."),
    ] = None,
    observed: Annotated[
        str,
        typer.Option(
            help="How to read the loss that students reached: last_tenth or fit. `decompose --help` explains them."
        ),
    ] = "last_tenth",
    target_loss: Annotated[
        float, typer.Option(help="The verdict names a width for this loss, in nats per token.")
    ] = 0.1,
    splice: Splice = None,
    snippets: Annotated[
        bool, typer.Option(help="Show text on which features are most active. This runs the model.")
    ] = True,
    model: Annotated[str | None, typer.Option(help="The measured model, if it has another name or folder now.")] = None,
    source: Annotated[str | None, typer.Option(help="Text to show features on. Default: the measured text.")] = None,
    snippet_tokens: Annotated[int, typer.Option(help="How many tokens of that text to search.")] = 20_000,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = AUTO,
) -> None:
    """Write one self-contained HTML page that shows all results."""
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
