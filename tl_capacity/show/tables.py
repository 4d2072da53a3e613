"""Tables: as rich shows them in a terminal, and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], right: bool = True) -> Table:
    """A rich table, with all columns but the first to the right where they hold figures."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        shown.add_column(Text(name), justify="right" if right and i else "left", overflow="fold")
    for row in body:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def html_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for a notebook, every cell escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        f"<table><thead>{line('th', header)}</thead><tbody>{''.join(line('td', row) for row in body)}</tbody></table>"
    )


def plain(text: str) -> str:
    """Text for a terminal, in which no bracket is markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


def said_once(notes: Iterable[str]) -> list[str]:
    """Notes without repetitions: what is said of several hook points, as `hook: what`, names them all in front."""
    subjects: dict[str, dict[str, None]] = {}
    for note in notes:
        subject, colon, what = note.partition(": ")
        subjects.setdefault(what if colon else note, {})[subject if colon else ""] = None
    return [", ".join(names) + ": " + what if any(names) else what for what, names in subjects.items()]


def terminal_notes(notes: Iterable[str]) -> Iterator[str]:
    """What a reader must know, a line of a terminal each, in which no bracket of a note is markup."""
    for note in said_once(notes):
        yield f"[yellow]note:[/yellow] {plain(note)}"


def html_notes(notes: Iterable[str]) -> str:
    """The same as paragraphs for a notebook, escaped."""
    return "".join(f"<p>note: {escape(note)}</p>" for note in said_once(notes))
