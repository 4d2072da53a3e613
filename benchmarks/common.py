"""What all benchmarks share: interleaved pairs, ratios with intervals, goals, and the printed or written rows."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import machine
import numpy as np
import page

Entered = TypeVar("Entered")

NARROW = 0.03
"""An interval is narrow if its width is below this share of the ratio. Then no more pairs are timed."""
ENOUGH = 6
"""Turns before which nobody checks whether an interval is narrow. From here on the interval is a bootstrap's: all of
five independent ratios lie on one side of their median in 1 of 16 cases, all of six in 1 of 32.
"""
FEWEST = 3
"""Turns without which there is no interval, and before which a limit in seconds ends nothing. With fewer than enough
turns the interval is Student's, which over two degrees of freedom is as wide as it must be.
"""
MOST = 200
"""Turns after which timing ends, however wide the interval is."""
DRAWS = 2_000


@dataclass(frozen=True)
class Goal:
    """A bound that a figure must reach.

    Attributes:
        value: the bound of the figure.
        least: whether it must not be below the bound; otherwise it must not be above.
        end: the bound of the interval's unfavourable end, where that is another.
    """

    value: float
    least: bool = False
    end: float | None = None

    def __str__(self) -> str:
        sign = "≥" if self.least else "≤"
        return f"{sign} {self.value:g}" + ("" if self.end is None else f" (end {sign} {self.end:g})")

    def reached(self, figure: float, low: float, high: float) -> bool:
        """Whether the figure reaches its bound, and the unfavourable end of its interval reaches its own bound."""
        end = self.value if self.end is None else self.end
        return figure >= self.value and low >= end if self.least else figure <= self.value and high <= end


def at_most(value: float, end: float | None = None) -> Goal:
    return Goal(value, end=end)


def at_least(value: float, end: float | None = None) -> Goal:
    return Goal(value, least=True, end=end)


@dataclass(frozen=True)
class Row:
    """One figure with its 95% interval, its goal, and whether it reaches the goal.

    Attributes:
        value: None where it could not be measured; the note says why.
        low, high: the interval; None where there were too few turns.
        holds: None where there is no goal, or no figure.
        runs: turns, or processes, that it is the median of.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    goal: str = ""
    holds: bool | None = None
    runs: int = 1
    note: str = ""


def row(name: str, values: Sequence[float], goal: Goal | None = None) -> Row:
    """The median of some values with its interval, compared with a goal. Too few values do not reach a goal."""
    figure, interval = statistics.median(values), median_interval(values)
    low, high = interval or (None, None)
    note = "" if interval else f"only {len(values)} of at least {FEWEST} turns"
    holds = None if goal is None else interval is not None and goal.reached(figure, *interval)
    return Row(name, figure, low, high, str(goal or ""), holds, len(values), note)


def spread(name: str, values: Sequence[float], goal: Goal | None = None) -> Row:
    """The median over several processes, with their smallest and largest value."""
    figure, low, high = statistics.median(values), min(values), max(values)
    holds = None if goal is None else goal.reached(figure, low, high)
    return Row(name, figure, low, high, str(goal or ""), holds, len(values), "range")


def fact(name: str, value: float, goal: Goal | None = None) -> Row:
    """A figure without randomness, such as a number of bytes."""
    holds = None if goal is None else goal.reached(value, value, value)
    return Row(name, value, value, value, str(goal or ""), holds)


def absent(name: str, why: str, goal: Goal | None = None) -> Row:
    """A figure that cannot be measured here, and why."""
    return Row(name, None, goal=str(goal or ""), note=why)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the median of independent positive values: the percentile bootstrap's, or Student's of their
    logarithms if they are few. None if they are fewer than `FEWEST`.
    """
    number = len(values)
    if number < FEWEST:
        return None
    if number < ENOUGH:
        from scipy.stats import t

        logarithms = np.log(values)
        half = float(t.ppf(0.975, number - 1)) * logarithms.std(ddof=1) / number**0.5
        return float(np.exp(logarithms.mean() - half)), float(np.exp(logarithms.mean() + half))
    draws = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (DRAWS, number))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975), method="closest_observation")
    return float(low), float(high)


@dataclass(frozen=True)
class Claim:
    """A ratio of candidates' seconds, computed for each turn.

    Attributes:
        over, under: candidates whose seconds of one turn are added up above and below the line; one may be named twice.
            With nothing below the line it is seconds.
        scale: what it is multiplied by, for another unit.
    """

    name: str
    over: tuple[str, ...]
    under: tuple[str, ...] = ()
    goal: Goal | None = None
    scale: float = 1.0

    def ratios(self, seconds: Mapping[str, Sequence[float]]) -> list[float]:
        """The ratio in each turn in which all candidates took part."""
        turns = range(min(len(seconds[name]) for name in (*self.over, *self.under)))
        above, below = ([sum(seconds[name][i] for name in names) for i in turns] for names in (self.over, self.under))
        return [self.scale * a / (b if self.under else 1) for a, b in zip(above, below, strict=True)]

    def settled(self, seconds: Mapping[str, Sequence[float]], narrow: float) -> bool:
        """Whether there are enough turns and the interval of the ratio is narrow."""
        ratios = self.ratios(seconds)
        interval = median_interval(ratios) if len(ratios) >= ENOUGH else None
        return interval is not None and interval[1] - interval[0] < narrow * statistics.median(ratios)


@dataclass(frozen=True)
class Limit:
    """When timing ends.

    Attributes:
        seconds: after so many no further turn begins, which cannot depend on how the ratios fall.
        narrow: a claim whose interval is narrower than this share is timed no longer.
        hard: the seconds end it with fewer than `FEWEST` turns too.
    """

    seconds: float
    narrow: float = NARROW
    hard: bool = False
    most: int = MOST


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    claims: Sequence[Claim],
    limit: Limit,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[], float] = time.monotonic,
    warm: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every turn of each candidate. A first turn is not counted.

    All take turns, and every other round goes backwards, so that drift of the machine hits all alike. A candidate drops
    out as soon as the claims on it are settled.

    Args:
        clock: measures a turn.
        watch: measures the whole.
        warm: what runs first instead of a candidate that takes long, by its name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    started, turns, open_claims = watch(), 0, list(claims)
    for name, candidate in candidates.items():
        (warm or {}).get(name, candidate)()
    while (
        turns < limit.most
        and open_claims
        and not (watch() - started >= limit.seconds and (limit.hard or turns >= FEWEST))
    ):
        wanted = {name for claim in open_claims for name in (*claim.over, *claim.under)}
        names = [name for name in candidates if name in wanted]
        for name in reversed(names) if turns % 2 else names:
            before = clock()
            candidates[name]()
            seconds[name].append(clock() - before)
        turns += 1
        open_claims = [claim for claim in open_claims if not claim.settled(seconds, limit.narrow)]
    return seconds


@dataclass
class Sitting:
    """One benchmark on one machine: its rows, its times, and what else the machine did meanwhile."""

    name: str
    asked: argparse.Namespace
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load: machine.Load = field(default_factory=machine.Load)

    @staticmethod
    def clock() -> float:
        """The time in seconds, once the device has done everything it was given."""
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def group(self) -> Iterator[Callable[[AbstractContextManager[Entered]], Entered]]:
        """A function that enters context managers, such as sessions. All are left at the end."""
        with ExitStack() as stack:
            yield stack.enter_context

    def time(
        self,
        candidates: Mapping[str, Callable[[], object]],
        claims: Sequence[Claim],
        share: float = 1.0,
        batches: int = 1,
        clock: Callable[[], float] | None = None,
        warm: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, list[float]]:
        """Time candidates against each other and keep a row for each claim. Returns the seconds of every turn.

        Args:
            share: of the seconds that the benchmark has.
            batches: that a candidate does in one turn; times are shown for one of them.
            clock, warm: as in `take_turns`.
        """
        limit = Limit(self.asked.seconds * share, self.asked.narrow, hard=self.asked.device != "cpu")
        turns = take_turns(candidates, claims, limit, clock or self.clock, warm=warm)
        self.rows += [row(claim.name, ratios, claim.goal) for claim in claims if (ratios := claim.ratios(turns))]
        self.rows += [
            absent(claim.name, f"not one turn in {limit.seconds:.0f} s", claim.goal)
            for claim in claims
            if not claim.ratios(turns)
        ]
        self.seconds |= {name: statistics.median(values) / batches for name, values in turns.items() if values}
        return turns

    def record(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "benchmark": self.name,
            "device": self.asked.device,
            "date": date.today().isoformat(),
            "commit": self.asked.commit or machine.commit(),
            "machine": machine.description(),
            "versions": machine.versions(),
            "settings": {k: v for k, v in vars(self.asked).items() if isinstance(v, (bool, int, float))},
            "load": self.load.summary(),
            "notes": self.notes,
            "rows": [asdict(each) for each in self.rows],
            "seconds": self.seconds,
            "sizes": self.sizes,
        }

    def __enter__(self) -> Sitting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Print the rows and write what was asked for. If the benchmark broke off, the existing rows are shown, but the
        page is not written.
        """
        if problem is not None:
            self.notes.append(f"It broke off: {type(problem).__name__}: {problem}")
        record = self.record()
        if self.asked.out:
            page.write_whole(Path(self.asked.out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if self.asked.write and problem is None:
            page.write(record)
        print(json.dumps(record, indent=1, ensure_ascii=False) if self.asked.json else page.printed(record))


def arguments(
    description: str | None,
    seconds: float,
    devices: Mapping[str, float] | None = None,
    tiny: bool = False,
    arguments: Sequence[str] | None = None,
    **numbers: int,
) -> argparse.Namespace:
    """The arguments of a benchmark, and its own `numbers` with their defaults. Sets two threads, and no warnings
    between the figures. With `--write FILE` it writes the page from the file and ends.

    Args:
        seconds: of timing, after which each ratio has the interval that it has.
        devices: seconds on other devices than the CPU that it runs on.
        tiny: whether it has tiny shapes too.
    """
    devices = {"cpu": seconds, **(devices or {})}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(devices), default="cpu", help="what it is measured on")
    parser.add_argument("--seconds", type=float, help=f"of timing at most; by default {seconds:g}")
    parser.add_argument("--narrow", type=float, default=NARROW, help="width of an interval, as a share of its ratio,")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--write",
        metavar="FILE",
        nargs="?",
        const=True,
        help="write docs/benchmarks.md, from this result or from an earlier one's file",
    )
    parser.add_argument("--commit", help="where the folder is no git repository")
    if tiny:
        parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if isinstance(asked.write, str):
        result = page.read(Path(asked.write))
        page.write(result | ({"commit": asked.commit} if asked.commit else {}))
        raise SystemExit(0)
    if asked.write and getattr(asked, "tiny", False):
        parser.error("--tiny has no figures for docs/benchmarks.md: leave out --write, or --tiny")
    asked.seconds = devices[asked.device] if asked.seconds is None else asked.seconds

    import torch

    if asked.device == "cuda" and not torch.cuda.is_available() and not getattr(asked, "tiny", False):
        parser.error("--device cuda needs a GPU, and torch sees none: leave it out to measure on the CPU")
    warnings.simplefilter("ignore")
    if asked.device == "cpu":
        torch.set_num_threads(2)
    return asked
