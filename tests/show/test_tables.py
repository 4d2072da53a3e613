"""Notes of results in a terminal and a notebook: names in them are text, whatever their brackets."""

from __future__ import annotations

from rich.console import Console

from tl_capacity.show.tables import html_notes, said_once, terminal_notes

NOTES = ("the SAE [red]mine[/] fits", "of [/yellow] nothing is known", "<b>& [1.0, 2.0]")


def test_brackets_in_a_terminal_are_no_markup() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        for line in terminal_notes(NOTES):
            console.print(line)
    assert shown.get().splitlines() == [f"note: {note}" for note in NOTES]


def test_a_notebook_escapes_them() -> None:
    assert html_notes(NOTES[2:]) == "<p>note: &lt;b&gt;&amp; [1.0, 2.0]</p>"


def test_what_holds_of_several_hook_points_is_said_once() -> None:
    notes = [
        "a: few tokens",
        "as it is",
        "b: few tokens",
        "b: other",
        "as it is",
        "a: few tokens",
        "x: y: z",
        "w: y: z",
    ]
    assert said_once(notes) == ["a, b: few tokens", "as it is", "b: other", "x, w: y: z"]
    assert html_notes(notes[:3]) == "<p>note: a, b: few tokens</p><p>note: as it is</p>"
