"""`tl-capacity`: the core's commands. Torch and the model libraries are imported only by the commands that need them,
so help is instant.

Exit codes: 0 done, 2 bad input (one sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from tl_capacity import __version__
from tl_capacity.cli.extending import plugins, run
from tl_capacity.cli.judging import decompose, effective, observe, report
from tl_capacity.cli.measuring import doctor, hooks, measure, merge
from tl_capacity.cli.predicting import budget, floor, plan
from tl_capacity.errors import EXIT_INTERRUPTED, CapacityError, reporting_errors
from tl_capacity.runtime.logs import configure, figures
from tl_capacity.runtime.logs import log as logger
from tl_capacity.runtime.progress import peak_memory

app = typer.Typer(
    name="tl-capacity",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Count the features that a language model holds. Predict how narrow a distilled student may be, and what "
    "it loses. Check the prediction.",
)


def _log_kind(kind: str) -> str:
    """Configure the log at once, so that a mistyped command is logged too."""
    if kind not in ("text", "json"):
        raise CapacityError(f"--log {kind!r} is not a kind of log: choose text or json")
    configure(kind == "json", quiet=False)
    return kind


@app.callback(invoke_without_command=True)
def root(
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Load this Python file as a plugin too. May be repeated.")
    ] = None,
    log: Annotated[
        str,
        typer.Option(
            callback=_log_kind,
            is_eager=True,
            help="Form of the log on standard error: text, or json for one object a line.",
        ),
    ] = "text",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only: no progress, no warnings.")] = False,
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
                logger.error(f"the plugin file {path} failed and was left out ({problem})")


for verb in (measure, budget, floor, decompose, effective, observe, doctor, report, plan, merge, plugins, hooks):
    app.command()(verb)
app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})(run)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line's entry point."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error is: the name of a file need not be UTF-8
    with reporting_errors():
        code = app(arguments, standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # which Typer makes of Ctrl-C
            raise KeyboardInterrupt
        logger.info("done", extra=figures(peak_memory_bytes=peak_memory()))
        raise SystemExit(code)
