"""docs/benchmarks.md: a benchmark's tables are written between its marks. The text around them is written by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def marks(record: Mapping[str, Any]) -> tuple[str, str]:
    """The lines before and after the tables of a benchmark."""
    name = f"benchmark {record['benchmark']} on {record['device']}"
    return f"<!-- {name}: written by {command_of(record)} --write -->", f"<!-- end of {name} -->"


def command_of(record: Mapping[str, Any]) -> str:
    device = "" if record["device"] == "cpu" else f" --device {record['device']}"
    return f"python benchmarks/{record['benchmark']}.py{device}"


def read(path: Path) -> dict[str, Any]:
    """A result that `--out` wrote."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        tables(record)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise SystemExit(f"{path} is no result of a benchmark ({problem}): pass a file that --out wrote") from problem
    if record["settings"].get("tiny"):
        raise SystemExit(f"{path} was measured with --tiny, which has no figures for the page: measure without it")
    return dict(record)


def write(record: Mapping[str, Any], to: Path = PAGE) -> None:
    """Put a benchmark's tables between its marks."""
    write_whole(to, inserted(to.read_text(encoding="utf-8"), record))


def inserted(text: str, record: Mapping[str, Any]) -> str:
    """A page's text with a benchmark's tables between its marks. The marks must appear exactly once."""
    first, last = marks(record)
    if text.count(first) != 1 or text.count(last) != 1 or text.index(last) < text.index(first):
        raise SystemExit(f"the page has no place for {command_of(record)}: write {first} and {last} once each")
    before, rest = text.split(first)
    return f"{before}{first}\n\n{tables(record)}\n{last}{rest.split(last)[1]}"


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def tables(record: Mapping[str, Any]) -> str:
    """The paragraph on the machine, the rows, and the times, as Markdown."""
    lines = [f"{said(record)}\n", "| what | figure | 95% interval | runs | goal | holds |", "|---|---|---|---|---|---|"]
    for each in record["rows"]:
        lines.append(f"| {each['name']} | {' | '.join(_cells(each))} |")
    for title, figures in (("median seconds", record["seconds"]), ("memory, MB", record["sizes"])):
        if figures:
            lines += ["", f"| {title} | |", "|---|---|"]
            lines += [f"| {name} | {_size(value, title)} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in record["notes"])


def said(record: Mapping[str, Any]) -> str:
    """Where, when and at which commit it was measured, and whether the machine was busy."""
    machine, load = record["machine"], record["load"]
    where = f"{machine['cores']} cores of {machine['processor']}"
    if machine["instructions"]:
        where += f" with {' and '.join(machine['instructions'])}"
    if "gpu" in machine:
        where = f"{machine['gpu']} with {machine['gpu_memory_gb']} GB, CUDA {machine['cuda']}, {where}"
    libraries = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    busy = "was busy" if load["busy"] else "was quiet"
    return (
        f"Measured with `{command_of(record)}` on {record['date']} at commit {record['commit']}: {where}; {libraries}."
        f" The machine {busy}: others took {load['others']:.1%} of its processors' time and {load['steal']:.1%} was"
        f" stolen, over {load['seconds']:.0f} s; the load before was {load['load_before']:g}."
    )


def printed(record: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, record=False)
    with console.capture() as captured:
        for title, figures in (("median seconds", record["seconds"]), ("memory, MB", record["sizes"])):
            if figures:
                times = Table(title=f"{record['benchmark']}: {title}", title_justify="left")
                times.add_column("what")
                times.add_column(title, justify="right")
                for name, value in figures.items():
                    times.add_row(name, _size(value, title))
                console.print(times)
        shown = Table(title=record["benchmark"], title_justify="left")
        for column in ("what", "figure", "95% interval", "runs", "goal", "holds"):
            shown.add_column(column, justify="left" if column == "what" else "right")
        for each in record["rows"]:
            shown.add_row(each["name"], *_cells(each))
        console.print(shown)
        for note in (said(record), *record["notes"]):
            console.print(note)
    return captured.get()


def _cells(each: Mapping[str, Any]) -> list[str]:
    """A row's cells after its name."""
    holds = {True: "yes", False: "no", None: ""}[each["holds"]]
    value, low, high = each["value"], each["low"], each["high"]
    if value is None:
        return [each["note"], "", "", each["goal"], ""]
    if low is None:
        return [_figure(value), each["note"], str(each["runs"]), each["goal"], holds]
    if each["runs"] == 1:  # without chance
        return [_figure(value), "", "", each["goal"], holds]
    interval = f"{_figure(low)} to {_figure(high)}" + (f" ({each['note']})" if each["note"] else "")
    return [_figure(value), interval, str(each["runs"]), each["goal"], holds]


def _figure(value: float) -> str:
    """A figure as text: three decimals for a ratio, none for large figures."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}".rstrip("0").rstrip(".")


def _size(value: float, title: str) -> str:
    return f"{value:,.0f}" if "MB" in title else f"{value:.4g}"
