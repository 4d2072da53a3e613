"""`tl-capacity`: the verbs of the core. Torch and the model libraries are imported by the commands that need them, so
that help is instant.

Exit codes: 0 done, 2 bad input (one sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_capacity import __version__
from tl_capacity.errors import CapacityError, printable, reporting_errors
from tl_capacity.measure.settings import MAX_FVU, MeasureSettings
from tl_capacity.options import command_with, read, whole_numbers
from tl_capacity.runtime.logs import bar_allowed, configure, figures
from tl_capacity.runtime.logs import log as logger
from tl_capacity.runtime.progress import peak_memory

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="tl-capacity",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="How many features a language model holds, and how narrow a student may be before it must lose some.",
)

Widths = Annotated[str, typer.Option("--widths", help="Student widths, as 128,256,512.")]
Importance = Annotated[
    str, typer.Option("--importance", help="Importance estimator; `tl-capacity plugins` lists them.")
]
Law = Annotated[str, typer.Option("--law", help="Capacity law; `tl-capacity plugins` lists them.")]
MaxFvu = Annotated[
    float,
    typer.Option("--max-fvu", help=MAX_FVU),
]
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
    "skip_first_positions": "As for measure.",
    "device": "As for measure.",
    "dtype": "As for measure.",
    "max_fvu": None,
}
"""The options of `measure` that `doctor` has too, and what its help says of them."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _log_kind(kind: str) -> str:
    """Configures the log at once, so that a command that does not exist is a line of it too."""
    if kind not in ("text", "json"):
        raise CapacityError(f"--log {kind!r} is no kind of log: choose text or json")
    configure(kind == "json", quiet=False)
    return kind


@app.callback(invoke_without_command=True)
def root(
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", help="Also load this Python file as a plugin; may be repeated.")
    ] = None,
    log: Annotated[
        str,
        typer.Option(
            "--log",
            callback=_log_kind,
            is_eager=True,
            help="What to say on standard error while something runs: text, or json, an object a line.",
        ),
    ] = "text",
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Say nothing but errors there: no progress, no warnings.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Load plugins named on the command line."""
    configure(log == "json", quiet)
    if quiet or log == "json" or not sys.stderr.isatty():
        # Those of transformers and SAELens too, which they draw where nobody can see them move.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    if version:
        typer.echo(f"tl-capacity {__version__}")
        raise typer.Exit
    if plugin:
        from tl_capacity.plugins import load_plugin_file
        from tl_capacity.plugins import plugins as find

        for path in plugin:
            name = load_plugin_file(path)
            problem = find().failures.get(name)
            if problem is not None:
                logger.error(f"the plugin file {path} failed and is left out ({problem})")


@app.command()
@command_with(MeasureSettings, after={"widths": "importance"})
def measure(
    settings: MeasureSettings,
    widths: Annotated[
        str, typer.Option(help="Also print the predicted floors of these student widths, as 16,32,64.")
    ] = "",
) -> None:
    """Count a model's SAE features on text and write a measurement."""
    wanted = _widths(widths)
    console = _console()
    from tl_capacity.measure.distributed import measure_together
    from tl_capacity.predict.caveats import error_warnings
    from tl_capacity.runtime.processes import is_first

    measurement = measure_together(settings)
    if not is_first():
        return
    p = measurement.provenance
    masked = measurement.hooks[0].summary
    console.print(
        f"{masked.n_tokens:,} tokens of {printable(p.source)} through {printable(p.model)} in {p.seconds:,.0f} s;"
        " masked: "
        + ", ".join(f"{count:,} {reason}" for reason, count in masked.masked.items())
        + f" (special and first positions hold {masked.masked_norm_share:.1%} of Σ‖x‖²); peak memory"
        f" {peak_memory() / 1e9:.2f} GB",
        markup=False,
        highlight=False,
    )
    importance = settings.importance[0] if settings.importance else None
    console.print(measurement.budget(wanted, importance, max_fvu=settings.max_fvu))
    for note in error_warnings(measurement, wanted):
        console.print(f"note: {note}", markup=False, highlight=False)
    written = printable(str(settings.out))
    console.print(
        f"\nwritten to {written}; next: tl-capacity floor {written} --widths {widths or '128,256,512'}",
        markup=False,
        highlight=False,
    )


@app.command()
def budget(
    folder: Annotated[Path, typer.Argument(help="A measurement.")],
    widths: Widths = "",
    importance: Importance = "second_moment",
    law: Law = "compressed_sensing",
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Print the per-layer table: F, L0, α, g(α), budget, d*, d*_het, FVU, with intervals."""
    from tl_capacity.measurement.measurement import Measurement

    found = Measurement.load(folder).budget(_widths(widths), importance, law, max_fvu)
    if as_json:
        from tl_capacity.results.estimate import Estimate

        _print_json(
            [{k: v.to_json() if isinstance(v, Estimate) else v for k, v in row.items()} for row in found.rows()]
        )
    else:
        _console().print(found)


@app.command()
def floor(
    path: Annotated[Path, typer.Argument(help="A measurement folder, or the JSON of a published importance curve.")],
    widths: Widths,
    importance: Importance = "second_moment",
    law: Law = "compressed_sensing",
    hook: Annotated[str | None, typer.Option("--hook", help="Only this hook point.")] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Predict the loss floor of students of some widths."""
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.predict import caveats, curve, floors
    from tl_capacity.show import tables

    notes: list[str] = []
    if path.is_dir():
        measurement = Measurement.load(path)
        predictions = [
            f for f in measurement.floors(_widths(widths), importance, law, max_fvu) if hook in (None, f.hook)
        ]
        if hook is not None:
            measurement[hook]  # names the hooks that were measured where this is none of them
        notes = measurement.warnings + caveats.error_warnings(measurement, _widths(widths), law)
    else:
        predictions = curve.Curve.load(path).floors(_widths(widths), law)
    if not predictions:
        raise CapacityError("no width was given: pass --widths 128,256,512")
    if as_json:
        _print_json([p.to_json() for p in predictions])
        return
    console = _console()
    console.print(
        tables.table(
            f"Predicted floors: importance {predictions[0].importance}, law {law}", *floors.floor_cells(predictions)
        )
    )
    for note in notes + sorted({f"{p.law}: {p.caveat}" for p in predictions if p.caveat}):
        console.print(f"note: {note}", markup=False, highlight=False)


@app.command()
def decompose(
    measurement: Annotated[Path, typer.Argument(help="A measurement of the teacher.")],
    distillation: Annotated[
        Path, typer.Argument(help="A distillation of it, as `tl-capacity run distill --out` wrote it.")
    ],
    hook: Annotated[
        str | None,
        typer.Option("--hook", help="The hook point to predict from. Default: the middle one of those measured."),
    ] = None,
    importance: Importance = "second_moment",
    law: Law = "compressed_sensing",
    observed: Annotated[
        str,
        typer.Option("--observed", help="fit: where the held-out curve is heading; last_tenth: its mean at the end."),
    ] = "fit",
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Compare predicted with observed floors, and with everything else that might explain them."""
    from tl_capacity.distillation.decomposition import decompose as run_decompose
    from tl_capacity.distillation.run import DistillationRun
    from tl_capacity.measurement.measurement import Measurement

    found = run_decompose(
        Measurement.load(measurement),
        DistillationRun.load(distillation),
        hook=hook,
        importance=importance,
        law=law,
        observed=observed,
        max_fvu=max_fvu,
    )
    if as_json:
        _print_json(found.to_json())
    else:
        _console().print(found)


@app.command()
@command_with(MeasureSettings, only=EXAMINED, defaults={"model": "", "out": Path("runs")})
def doctor(
    settings: MeasureSettings,
    folder: Annotated[
        Path | None, typer.Argument(help="A measurement or checkpoint that is to be gone on with; instead of --model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a set-up before a long measurement, on its first thousand tokens, and say what to change; exit code 2 where
    a run would fail or mean nothing.
    """
    if (folder is None) == (not settings.model):
        raise CapacityError("doctor checks either a folder or a model: pass one of DIR and --model")
    from dataclasses import asdict

    from tl_capacity.doctor import STOP, examine, examine_folder
    from tl_capacity.show import tables

    findings = examine(settings) if folder is None else examine_folder(folder, settings.tokens, settings.device)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        _console().print(
            tables.table(
                "Doctor", ["", "check", "what was found"], [[f.level, f.check, f.says] for f in findings], right=False
            )
        )
    if stops := sum(finding.level == STOP for finding in findings):
        raise CapacityError(
            f"{stops} of {len(findings)} checks found what would stop this run or leave it without meaning: mend what"
            f" is marked {STOP!r} above"
        )


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help=(
                "A measurement, and with it a distillation, probes, recoverability: folders or JSON files, in any"
                " order."
            )
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    widths: Annotated[
        str, typer.Option("--widths", help="Student widths, as 128,256,512. Default: those that were distilled.")
    ] = "",
    importance: Importance = "second_moment",
    law: Law = "compressed_sensing",
    hook: Annotated[
        str | None,
        typer.Option(
            "--hook", help="The hook point that the verdict is about. Default: the middle one of those measured."
        ),
    ] = None,
    observed: Annotated[str, typer.Option("--observed", help="As for decompose: fit or last_tenth.")] = "fit",
    snippets: Annotated[
        bool,
        typer.Option(
            "--snippets/--no-snippets", help="Show the text on which features are most active; runs the model."
        ),
    ] = True,
    model: Annotated[
        str | None, typer.Option("--model", help="The model that was measured, where it is now to be found elsewhere.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Text to show features on. Default: that which was measured.")
    ] = None,
    snippet_tokens: Annotated[int, typer.Option("--snippet-tokens", help="How much of it to look through.")] = 20_000,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps.")] = "cpu",
) -> None:
    """Write one self-contained HTML page that shows everything that was found."""
    from tl_capacity.report import ReportSettings, Results, find_snippets, write_report

    found = Results.load(results)
    settings = ReportSettings(_widths(widths), importance, law, hook, observed)
    examples, note = (
        find_snippets(found, settings, model, source, snippet_tokens, device)
        if snippets
        else ({}, "Text was left out with --no-snippets.")
    )
    write_report(out, found, settings, examples, note)
    typer.echo(
        f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)" + (f"; {note[:1].lower()}{note[1:]}" if note else "")
    )


@app.command()
def plan(
    folder: Annotated[Path, typer.Argument(help="A measurement of the teacher.")],
    keep: Annotated[float | None, typer.Option("--keep", help="Share of the features to keep, as 0.95.")] = None,
    target_loss: Annotated[
        float | None, typer.Option("--target-loss", help="Largest predicted floor, in the importance's unit per token.")
    ] = None,
    widths: Annotated[str, typer.Option("--widths", help="Also show what these widths cost.")] = "",
    hook: Annotated[
        str | None, typer.Option("--hook", help="Only this hook point. Default: the goal must be met at all of them.")
    ] = None,
    importance: Importance = "second_moment",
    law: Law = "compressed_sensing",
    model: Annotated[
        str | None,
        typer.Option("--model", help="The teacher, for the cost in parameters. Default: the one that was measured."),
    ] = None,
    max_fvu: MaxFvu = 1.0,
    as_json: AsJson = False,
) -> None:
    """Find the smallest student width that meets a goal, and what each width costs in parameters."""
    from tl_capacity.measurement.measurement import Measurement
    from tl_capacity.plan import check_goal, teacher_config
    from tl_capacity.plan import plan as make_plan

    check_goal(keep, target_loss)
    measurement = Measurement.load(folder)
    found = make_plan(
        measurement,
        keep=keep,
        target_loss=target_loss,
        widths=_widths(widths),
        hook=hook,
        importance=importance,
        law=law,
        max_fvu=max_fvu,
        config=teacher_config(measurement, model),
    )
    if as_json:
        _print_json(found.to_json())
    else:
        _console().print(found)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Measurements of the shards.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the joined measurement.")],
) -> None:
    """Join measurements of shards into one: counts exactly, moments to rounding."""
    from tl_capacity.measurement.folder import JSON_NAME
    from tl_capacity.measurement.measurement import Measurement

    if (out / JSON_NAME).exists():
        raise CapacityError(f"{out} already holds a measurement: choose another --out")
    joined = Measurement.merge([Measurement.load(folder) for folder in folders])
    joined.save(out)
    _console().print(joined.budget(max_fvu=None))


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """List what plugins contribute and where it comes from."""
    from tl_capacity.plugins import plugins as find
    from tl_capacity.show import tables

    found = find()
    rows = [
        [registry.kind, name, registry.origins[name], str(getattr(item, "caveat", "") or getattr(item, "summary", ""))]
        for registry in found.registries().values()
        for name, item in registry.items.items()
    ]
    if as_json:
        _print_json(
            {
                "plugins": [dict(zip(("kind", "name", "from", "summary"), row, strict=True)) for row in rows],
                "failures": found.failures,
            }
        )
        return
    console = _console()
    console.print(tables.table("Plugins", ["kind", "name", "from", "what it is"], rows, right=False))
    for origin, problem in found.failures.items():
        console.print(f"failed: {origin}: {problem}", style="red", markup=False)


@app.command()
def hooks(
    model: Annotated[str, typer.Option("--model", help="A registered name, a save_pretrained folder, or a hub id.")],
    matching: Annotated[str, typer.Option("--matching", help="Only names that contain this.")] = "",
) -> None:
    """List the hook points of a model."""
    from tl_capacity.models.hook_points import hook_names
    from tl_capacity.models.loading import load_model

    for name in hook_names(load_model(model).bridge):
        if matching in name:
            typer.echo(name)


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def run(
    name: Annotated[str | None, typer.Argument(help="The recipe; none lists them.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Its options.")] = None,
) -> None:
    """Run a recipe; without a name, list them. `tl-capacity run NAME --help` shows its options."""
    from tl_capacity import recipe
    from tl_capacity.plugins import plugins as find
    from tl_capacity.show import tables

    recipes = find().recipes
    if name is None or name in ("--help", "-h"):
        _console().print(
            tables.table(
                "Recipes",
                ["name", "from", "what it does"],
                [[r.name, recipes.origins[r.name], r.summary] for r in recipes],
                right=False,
            )
        )
        return
    recipe.run(recipe.load(recipes[name]), options or [], f"tl-capacity run {name}")
    from tl_capacity.runtime.processes import is_first

    if bar_allowed() and is_first():
        typer.echo(f"peak memory {peak_memory() / 1e9:.2f} GB", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line's entry point."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error is: the name of a file need not be UTF-8
    with reporting_errors():
        code = app(arguments, standalone_mode=False) or 0
        logger.info("done", extra=figures(peak_memory_bytes=peak_memory()))
        raise SystemExit(code)


def _widths(text: str) -> tuple[int, ...]:
    return read("--widths", text, whole_numbers)


def _console() -> Console:
    from rich.console import Console

    # Where the output is not a terminal, rich assumes 80 columns and would fold numbers.
    return Console() if sys.stdout.isatty() else Console(width=140)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
