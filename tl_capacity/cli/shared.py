"""Options that several commands share, and how a command shows its result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_capacity.measure.settings import MAX_FVU
from tl_capacity.options import read, whole_numbers
from tl_capacity.show.tables import said_once
from tl_capacity.show.terminal import console, print_json, print_text

Widths = Annotated[str, typer.Option(help="Student widths, such as 128,256,512.")]
Importance = Annotated[
    str | None, typer.Option(help="Importance estimator; `tl-capacity plugins` lists them. Default: the paper's.")
]
Law = Annotated[str | None, typer.Option(help="Capacity law; `tl-capacity plugins` lists them. Default: the paper's.")]
Splice = Annotated[
    Path | None,
    typer.Option(
        help="The folder that `tl-capacity run splice` wrote, for floors in nats. Default: the splice beside the "
        "measurement."
    ),
]
MaxFvu = Annotated[float, typer.Option(help=MAX_FVU)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def widths_in(text: str) -> tuple[int, ...]:
    """The student widths in a text, each once."""
    return tuple(dict.fromkeys(read("--widths", text, whole_numbers)))


def show(result: Any, as_json: bool) -> None:
    """Print a result as a table, or as JSON."""
    if as_json:
        print_json(result.to_json())
    else:
        console().print(result)


def print_notes(notes: Iterable[str]) -> None:
    """Print each note on a line."""
    for note in said_once(notes):
        print_text(f"note: {note}")
