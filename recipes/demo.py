"""The first minute: everything on the embedded teacher, from counting its features to a report, as a smoke test:
`tl-capacity run demo`.

Every stage is the one that its own command runs, in one process, on little text. Its students are far from converged,
so nothing here says which theory is right: that is what the recorded runs of 20 million tokens are for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from tl_capacity.recipes.demo_summary import PAGE, TARGET_LOSS, Found, say

from tl_capacity.measurement.measurement import Measurement
from tl_capacity.recipe import option, run_file
from tl_capacity.results.naming import middle
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP
from tl_capacity.runtime.logs import bar_allowed
from tl_capacity.show.terminal import console

TEACHER = "embedded"
WIDTHS = (16, 32, 64, 96)
"""Below five widths the league is not computed, so a smoke test never ranks theories."""
COUNTED, SPLICED, READ, SHOWN = 30_000, 10_000, 20_000, 10_000
"""Tokens that are counted, spliced, read for features in students, and searched for examples."""
BETWEEN = (100, 1_000)
"""Numbers of features to splice, besides those that the widths keep."""
CONTEXT, BATCH_ROWS, HELD_OUT, EVALUATIONS = 128, 4, 2_000, 8


@dataclass(frozen=True)
class DemoConfig:
    """The demo's options."""

    out: Path = option(Path("runs/demo"), "Folder to write. A rerun continues in it.")
    tokens: int = option(20_000, "Predicted tokens to train each student on.")
    verbose: bool = option(False, "Also print what the command of each stage prints.", "--verbose")
    device: str = option(AUTO, f"Where everything runs: {DEVICE_HELP}")
    threads: int = option(1, "CPU threads. Such small models gain little from more. 0 leaves it to torch.", least=0)


def main(config: DemoConfig) -> Path:
    """Measure the embedded teacher, predict, distil small students for some seconds, and write a report on all of it.

    Returns:
        The report.

    Raises:
        CapacityError: where the folder holds results of other settings, or cannot be written.
    """
    started = time.monotonic()
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    for number, (doing, stage) in enumerate(STAGES, 1):
        if bar_allowed():
            print(f"{number}/{len(STAGES)} {doing}", file=sys.stderr, flush=True)
        with _heard(config.verbose):
            stage(config)
    found = Found.load(config.out)
    say(found, time.monotonic() - started)
    return found.page


# The stages, each as its own command runs it


def count(config: DemoConfig) -> None:
    """Count the teacher's features at every layer that has a dictionary."""
    from tl_capacity.measure.job import measure
    from tl_capacity.measure.settings import MeasureSettings

    settings = MeasureSettings(TEACHER, config.out, tokens=COUNTED, resume=True, device=config.device)
    console().print(measure(settings).budget(WIDTHS))


def predict(config: DemoConfig) -> None:
    """Predict losses in nats by running the teacher with only the features that a width may keep."""
    from tl_capacity.recipes.splice import SpliceConfig
    from tl_capacity.recipes.splice import main as splice

    hook = middle(Measurement.load(config.out)).hook
    splice(
        SpliceConfig(
            config.out,
            WIDTHS,
            config.out / "splice",
            hook=(hook,),
            kept=BETWEEN,
            tokens=SPLICED,
            device=config.device,
            threads=config.threads,
        )
    )


def distil(config: DemoConfig) -> None:
    """Train a student of each width, starting from the truncated teacher."""
    from tl_capacity.recipes.distill import DistillConfig
    from tl_capacity.recipes.distill import main as distill

    distill(
        DistillConfig(
            TEACHER,
            WIDTHS,
            tokens=config.tokens,
            out=config.out / "students",
            resume=True,
            heldout=f"{TEACHER}:heldout",
            heldout_tokens=HELD_OUT,
            evaluations=EVALUATIONS,
            repeat=True,
            start="truncated",
            batch_rows=BATCH_ROWS,
            context=CONTEXT,
            device=config.device,
            threads=config.threads,
        )
    )


def read_out(config: DemoConfig) -> None:
    """Look for the teacher's features in the students."""
    from tl_capacity.recipes.recover import RecoverConfig
    from tl_capacity.recipes.recover import main as recover

    students = config.out / "students"
    recover(
        RecoverConfig(
            config.out,
            students,
            out=config.out / "recover",
            tokens=READ,
            device=config.device,
            threads=config.threads,
        )
    )


def report(config: DemoConfig) -> None:
    """Write the page, with text on which features are most active."""
    from tl_capacity.report import ReportSettings, Results, find_snippets, write_report

    results, settings = Results.load([config.out]), ReportSettings(target_loss=TARGET_LOSS)
    examples, note = find_snippets(results, settings, tokens=SHOWN, device=config.device)
    write_report(config.out / PAGE, results, settings, examples, note)


STAGES: tuple[tuple[str, Callable[[DemoConfig], None]], ...] = (
    ("counting the features of a small language model", count),
    ("predicting what narrower students lose", predict),
    ("training narrower students for some seconds", distil),
    ("looking for the features in the students", read_out),
    ("writing the report", report),
)
"""The stages in their order, each with what it says while it runs."""


@contextmanager
def _heard(verbose: bool) -> Iterator[None]:
    """Print what a stage's command prints, or nothing."""
    with nullcontext() if verbose else redirect_stdout(StringIO()):
        yield


if __name__ == "__main__":
    run_file(main)
