"""A progress bar with tokens (or steps) per second and the remaining time, shown only once something takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 2.0


@contextmanager
def token_progress(total: int | None, enabled: bool = True, label: str = "counting", unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the tokens, or whatever else is counted, done so far."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}" + (" of {task.total:,.0f}" if total else "") + f" {unit}"),
        TextColumn("{task.fields[rate]:,.0f} " + f"{unit}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and (console.is_terminal or console.is_jupyter)),
    )
    task = bar.add_task(label, total=total, rate=0.0)
    started, first = time.monotonic(), 0

    def advance(done: int) -> None:
        nonlocal first
        seconds = time.monotonic() - started
        first = first or done
        if seconds > PATIENCE_SECONDS and not bar.live.is_started:
            bar.start()
        bar.update(task, completed=min(done, total) if total else done, rate=(done - first) / seconds if seconds else 0.0)

    try:
        yield advance
    finally:
        bar.stop()
