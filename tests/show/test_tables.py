"""Notes of results in a terminal and a notebook: names in them are text, whatever their brackets."""

from __future__ import annotations

from rich.console import Console

from tl_capacity.show.tables import html_notes, terminal_notes

NOTES = ("the SAE [red]mine[/] fits", "of [/yellow] nothing is known", "<b>& [1.0, 2.0]")


def test_brackets_in_a_terminal_are_no_markup() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        for line in terminal_notes(NOTES):
            console.print(line)
    assert shown.get().splitlines() == [f"note: {note}" for note in NOTES]


def test_a_notebook_escapes_them() -> None:
    assert html_notes(NOTES[2:]) == "<p>note: &lt;b&gt;&amp; [1.0, 2.0]</p>"
