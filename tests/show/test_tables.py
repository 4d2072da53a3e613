"""Notes of results in a terminal and a notebook: names in them are text, whatever their brackets."""

from __future__ import annotations

import pytest
from rich.console import Console

from tl_capacity.show.tables import html_notes, said_once, table, terminal_notes

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


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_a_table_never_breaks_a_hook_name_into_pieces(width: int) -> None:
    """Nor does it cut a number, which rich alone would."""
    hooks = [f"blocks.{layer}.attn.hook_result_post" for layer in (3, 12)]
    rows = [[hook, hook, "1,234,567 [1,234,000, 1,235,000]", "a sentence of some words"] for hook in hooks]
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table("A table", ["hook", "the same", "figure", "what it says"], rows))
    lines = [line for line in captured.get().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    for column in (0, 1):
        shown = [row[column] for row in cells if row[column]]
        assert len(shown) == len(hooks), "a name takes one line"
        for name, hook in zip(shown, hooks, strict=True):
            start, _, end = name.partition("…")
            assert name == hook or (start and end and hook.startswith(start) and hook.endswith(end))
            assert len(name) >= 6
    assert "".join(row[2] for row in cells).replace(" ", "") == 2 * "1,234,567[1,234,000,1,235,000]"
    if width >= 140:
        assert [row[0] for row in cells] == hooks
