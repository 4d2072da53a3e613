"""A progress bar with tokens (or steps) per second and the remaining time. It appears once something takes longer than
two seconds. The log gets the same figures.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tl_capacity.runtime.logs import bar_allowed, figures, log

PATIENCE_SECONDS = 2.0
LOG_SECONDS = 10.0


def peak_memory() -> int:
    """The most memory that this process has held, in bytes (its peak resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def token_progress(
    total: int | None, enabled: bool = True, label: str = "counting", unit: str = "tokens"
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of tokens, or other items, done so far."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}" + (" of {task.total:,.0f}" if total else "") + f" {unit}"),
        TextColumn("{task.fields[rate]:,.0f} " + f"{unit}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and bar_allowed() and (console.is_terminal or console.is_jupyter)),
    )
    task = bar.add_task(label, total=total, rate=0.0)
    started, first = time.monotonic(), 0
    logged = started

    def advance(done: int) -> None:
        nonlocal first, logged
        seconds = time.monotonic() - started
        first = first or done
        if seconds > PATIENCE_SECONDS and not bar.live.is_started:
            bar.start()
        rate = (done - first) / seconds if seconds else 0.0
        bar.update(task, completed=min(done, total) if total else done, rate=rate)
        if enabled and time.monotonic() - logged >= LOG_SECONDS:
            logged = time.monotonic()
            log.info(
                f"{label}: {done:,} {unit}", extra=figures(done=done, total=total, unit=unit, per_second=round(rate, 1))
            )

    try:
        yield advance
    finally:
        bar.stop()
