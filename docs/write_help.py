"""Writes docs/help.md from the command line's own help, so that both always agree: `python docs/write_help.py
[--check]`.

With `--check` nothing is written, and the exit code is 1 where the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tl_capacity import recipe
from tl_capacity.cli import app
from tl_capacity.plugins import plugins

PAGE = Path(__file__).with_name("help.md")
COLUMNS = 100
HEADER = """# The command line

Written by `python docs/write_help.py` from the commands themselves; do not edit.
"""


def sections() -> Iterator[tuple[str, str]]:
    """`(command, help)` of the root, of each of its commands, and of each recipe in the package."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="tl-capacity", terminal_width=COLUMNS)
    yield "tl-capacity", root.get_help(context)
    for name, command in root.commands.items():
        yield (
            f"tl-capacity {name}",
            command.get_help(command.context_class(command, info_name=name, parent=context, terminal_width=COLUMNS)),
        )
    for built_in in plugins().recipes:
        if str(built_in.target).startswith("tl_capacity."):
            title = f"tl-capacity run {built_in.name}"
            command = recipe.command_of(recipe.load(built_in))
            yield title, command.get_help(command.context_class(command, info_name=title, terminal_width=COLUMNS))


def page() -> str:
    """The whole page."""
    return HEADER + "".join(f"\n## {title}\n\n```text\n{help.rstrip()}\n```\n" for title, help in sections())


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(f"{PAGE} does not say what the command line says: run `python docs/write_help.py`", file=sys.stderr)
        return 1
    if arguments:
        print(f"{' '.join(arguments)!r} is no option: pass --check, or nothing to write {PAGE}", file=sys.stderr)
        return 2
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
