"""Tables, by rich in a terminal and as HTML in a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table


NAME_LETTERS, FEWEST_LETTERS = 16, 6
"""Letters of a name that a table leaves room for, and letters that stay even in the narrowest terminal."""


def shortened(text: str, longest: int) -> str:
    """`text` with its middle left out if it is longer than `longest`. Hook points and paths differ at their beginning
    and end.
    """
    if len(text) <= longest:
        return text
    end = longest // 2
    return f"{text[: longest - end - 1]}…{text[-end:]}"


@dataclass(frozen=True)
class TableText:
    """Text of a table's cell. It is wrapped between words. A name wider than its column is cut in the middle, while
    rich would break it into pieces. No number is cut.
    """

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        whole = max((len(line) for line in self.text.splitlines()), default=0)
        words = self.text.split()
        least = max((min(len(word), NAME_LETTERS) if _is_name(word) else len(word) for word in words), default=0)
        return Measurement(least, whole)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = max(FEWEST_LETTERS, options.max_width)
        words = (shortened(word, width) if _is_name(word) else word for word in re.split(r"(\s+)", self.text))
        yield Text("".join(words))


def _is_name(word: str) -> bool:
    """Whether a word is a name that may be cut, such as a hook point's."""
    return len(word) > NAME_LETTERS and any(letter.isalpha() for letter in word)


def table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], right: bool = True) -> Table:
    """A rich table. All columns but the first are aligned to the right if they hold figures."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        shown.add_column(TableText(name), justify="right" if right and i else "left", overflow="fold")
    for row in body:
        shown.add_row(*map(TableText, row))
    return shown


def html_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for a notebook, with every cell escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        f"<table><thead>{line('th', header)}</thead><tbody>{''.join(line('td', row) for row in body)}</tbody></table>"
    )


def plain(text: str) -> str:
    """Text for a terminal, whose brackets are not read as markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


def said_once(notes: Iterable[str]) -> list[str]:
    """Notes without repetitions. What several notes of the form `hook: what` share becomes one note, with all their
    names in front.
    """
    subjects: dict[str, dict[str, None]] = {}
    for note in notes:
        subject, colon, what = note.partition(": ")
        subjects.setdefault(what if colon else note, {})[subject if colon else ""] = None
    return [", ".join(names) + ": " + what if any(names) else what for what, names in subjects.items()]


def terminal_notes(notes: Iterable[str]) -> Iterator[str]:
    """What a reader must know, one line each in a terminal. Brackets in a note are not read as markup."""
    for note in said_once(notes):
        yield f"[yellow]note:[/yellow] {plain(note)}"


def html_notes(notes: Iterable[str]) -> str:
    """The same as paragraphs for a notebook, escaped."""
    return "".join(f"<p>note: {escape(note)}</p>" for note in said_once(notes))
