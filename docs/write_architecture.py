"""Writes the parts of ARCHITECTURE.md that follow from the code: `python docs/write_architecture.py [--check]`.

They stand between markers: the layers, from the import contract in pyproject.toml, and the modules of each room, from
their docstrings. With `--check` nothing is written, and the exit code is 1 where the page is stale.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from pages import with_parts, write_or_check

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
OUTSIDE = {"hooks": "hooks", "recipes": "recipes"}
"""Rooms beside the package that are installed into it."""


def layers() -> list[list[str]]:
    """The rooms of each layer, from the top down."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return [re.split(r" [|:] ", layer) for layer in contract["contracts"][0]["layers"]]


def path_of(room: str) -> Path:
    """The folder or the file of a room."""
    if room in OUTSIDE:
        return ROOT / OUTSIDE[room]
    folder = ROOT / "tl_capacity" / room
    return folder if folder.is_dir() else folder.with_suffix(".py")


def summary(file: Path) -> str:
    """The first paragraph of a module's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def layer_table() -> Iterator[str]:
    """A row for each layer."""
    yield "| layer | rooms | what they are for |"
    yield "|---|---|---|"
    rooms_by_layer = layers()
    for number, rooms in enumerate(rooms_by_layer):
        for room in rooms:
            path = path_of(room)
            place = f"{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}"
            said = summary(path / "__init__.py" if path.is_dir() else path)
            yield f"| {len(rooms_by_layer) - number} | [`{room}`]({place}) | {said} |"


def module_lists() -> Iterator[str]:
    """The modules of each room of the core that has several."""
    for room in (room for rooms in layers() for room in rooms):
        folder = path_of(room)
        if not folder.is_dir() or room in OUTSIDE:
            continue
        yield f"### {room}"
        yield ""
        for file in sorted(folder.rglob("*.py")):
            if file.name != "__init__.py":
                yield f"- [`{file.relative_to(folder).with_suffix('')}`]({file.relative_to(ROOT)}): {summary(file)}"
        yield ""


def page() -> str:
    """The page with its parts written from the code."""
    return with_parts(PAGE, "write_architecture.py", {"layers": layer_table(), "modules": module_lists()})


def main(arguments: list[str]) -> int:
    return write_or_check(PAGE, "write_architecture.py", "the code says", page, arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
