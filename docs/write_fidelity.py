"""Writes the table of docs/fidelity.md from the marks of the tests: `python docs/write_fidelity.py [--check]`.

A test that shows how something a dictionary says of itself is obeyed bears `@pytest.mark.fidelity(source=…, says=…,
obeyed=…)`. The marks are read and not run. With `--check` nothing is written, and the exit code is 1 where the page is
stale.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pages import write_or_check

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ROOT = Path(__file__).parent.parent
PAGE, TESTS = ROOT / "docs" / "fidelity.md", ROOT / "tests"
BEGIN, END = "<!-- written by docs/write_fidelity.py -->\n", "<!-- to here -->\n"
FIELDS = ("source", "says", "obeyed")
ANY = "any"
"""The source of a mark that holds for every format. Its rows come last."""


@dataclass(frozen=True, order=True)
class Mark:
    """What one test shows: the format, what it says of itself, how the tool obeys it, and the name of the test."""

    source: str
    says: str
    obeyed: str
    file: str
    test: str


class MarkError(Exception):
    """A mark that cannot be read without running the test."""


def marks_of(file: Path, root: Path = ROOT) -> Iterator[Mark]:
    """The marks of a file of tests, on functions and on classes.

    Raises:
        MarkError: where a mark stands elsewhere, or has other arguments than its three texts.
    """
    text = file.read_text(encoding="utf-8")
    if "mark.fidelity" not in text:
        return
    tree, name = ast.parse(text), file.relative_to(root).as_posix()
    elsewhere = {id(node): node.lineno for node in ast.walk(tree) if _is_mark(node)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for decorator in filter(_is_mark, node.decorator_list):
                del elsewhere[id(decorator)]
                yield Mark(**_texts(decorator, name), file=name, test=node.name)
    for line in elsewhere.values():
        raise MarkError(f"{name}:{line} has a fidelity mark that stands on no test: write it above a function or class")


def _is_mark(node: ast.AST) -> TypeIs[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.fidelity")


def _texts(mark: ast.Call, file: str) -> dict[str, str]:
    values = {keyword.arg: keyword.value for keyword in mark.keywords}
    texts = {
        str(name): value.value
        for name, value in values.items()
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip()
    }
    if mark.args or set(values) != set(FIELDS) or set(texts) != set(FIELDS):
        raise MarkError(f"{file}:{mark.lineno} has no mark that can be read: write {', '.join(FIELDS)}, each a text")
    return texts


def all_marks(tests: Path = TESTS) -> list[Mark]:
    """Every mark, in the order of the table.

    Raises:
        MarkError: where one cannot be read.
    """
    marks = (mark for file in sorted(tests.rglob("*.py")) for mark in marks_of(file, tests.parent))
    return sorted(marks, key=lambda mark: (mark.source == ANY, mark.source.lower(), mark))


def table(marks: list[Mark]) -> str:
    """The part of the page between its two marks: a row for each statement of a format and how the tool obeys it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for mark in marks:
        shown = f"[`{mark.test}`](../{mark.file})"
        tests = rows.setdefault((mark.source, mark.says, mark.obeyed), [])
        if shown not in tests:
            tests.append(shown)
    head = "| source | what its files say | what the tool does | shown by |\n|---|---|---|---|\n"
    return head + "".join(
        f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} | {', '.join(tests)} |\n"
        for row, tests in rows.items()
    )


def page() -> str:
    """The page with its table written from the marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}{table(all_marks())}{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> int:
    try:
        return write_or_check(PAGE, "write_fidelity.py", "the tests show", page, arguments)
    except MarkError as problem:
        print(problem, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
