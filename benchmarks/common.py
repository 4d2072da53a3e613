"""What every benchmark shares: interleaved timing, peak memory, and a table or JSON of ratios against goals."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One claim: a ratio (or a size), the goal, and whether it holds."""

    name: str
    ratio: float
    goal: str
    holds: bool


def at_most(name: str, ratio: float, goal: float) -> Row:
    return Row(name, round(ratio, 3), f"≤ {goal:g}", ratio <= goal)


def at_least(name: str, ratio: float, goal: float) -> Row:
    return Row(name, round(ratio, 3), f"≥ {goal:g}", ratio >= goal)


@dataclass(frozen=True)
class Prepared:
    """A candidate with a preparation that is not timed: `prepared` is a context manager that yields the step."""

    prepared: Callable[[], AbstractContextManager[Callable[[], object]]]

    def __call__(self) -> object:
        with self.prepared() as step:
            return step()


def medians(candidates: Mapping[str, Callable[[], object]], repetitions: int, each: int = 1) -> dict[str, float]:
    """Median seconds of each candidate; see `interleaved`."""
    return {name: statistics.median(values) for name, values in interleaved(candidates, repetitions, each).items()}


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repetitions: int,
    each: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each candidate; one warm-up, then all take turns of `each` steps, so that drift of
    the machine hits all alike. With `time.process_time` as clock they are this process's own, on a machine that others
    work on too.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, candidate in candidates.items():
            with candidate.prepared() if isinstance(candidate, Prepared) else nullcontext(candidate) as step:
                for _ in range(each if repetition else 1):
                    started = clock()
                    step()
                    if repetition:
                        times[name].append(clock() - started)
    return times


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and its interval as a row shows it."""

    value: float
    interval: str


def median_ratio(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """The ratio of the medians of two candidates that took turns, with a 95% bootstrap interval over their turns."""
    draws, turns = random.Random(0), range(len(times))
    replicates = []
    for _ in range(2_000):
        drawn = draws.choices(turns, k=len(times))
        replicates.append(statistics.median(times[i] for i in drawn) / statistics.median(others[i] for i in drawn))
    replicates.sort()
    low, high = replicates[50], replicates[-51]
    return Ratio(statistics.median(times) / statistics.median(others), f"[{low:.3f}, {high:.3f}]")


def arguments(description: str | None, repetitions: int, **numbers: int) -> argparse.Namespace:
    """What every benchmark is asked on the command line, and `numbers` of its own with their defaults; two threads, and
    no warnings between the figures.
    """
    import torch

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print a list of name, ratio, goal, holds")
    for name, default in {"repetitions": repetitions, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    return parser.parse_args()


def growth_apart(script: str, candidates: Sequence[str], processes: int = 1) -> dict[str, float]:
    """Peak growth of each candidate in MB, as the script prints it with `--memory-of`: the median of so many processes
    of its own.
    """

    def growth(which: str) -> float:
        return float(
            subprocess.run(
                [sys.executable, script, "--memory-of", which], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )

    return {which: statistics.median(growth(which) for _ in range(processes)) for which in candidates}


def peak_growth_mb(candidate: Callable[[], object]) -> float:
    """Growth of the process's peak resident memory over its present size while `candidate` runs twice, in MB; Linux
    only.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    candidate()
    candidate()
    return (_status("VmHWM") - before) / 1024


def report(title: str, rows: list[Row], seconds: Mapping[str, float], as_json: bool) -> None:
    """Print the rows."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    times = Table(title=f"{title}: median seconds", title_justify="left")
    times.add_column("what")
    times.add_column("s", justify="right")
    for name, value in seconds.items():
        times.add_row(name, f"{value:.3f}")
    console.print(times)
    shown = Table(title=f"{title}: ratios", title_justify="left")
    for column in ("what", "ratio", "goal", "holds"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        shown.add_row(row.name, f"{row.ratio:g}", row.goal, "yes" if row.holds else "NO")
    console.print(shown)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")
