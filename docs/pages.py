"""What the scripts share that write parts of pages from the code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def with_parts(page: Path, script: str, parts: Mapping[str, Iterable[str]]) -> str:
    """A page with the lines of each named part between that part's two marks."""
    text = page.read_text(encoding="utf-8")
    for name, lines in parts.items():
        begin, end = f"<!-- {name}: written by docs/{script} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n" + "\n".join(lines).rstrip() + f"\n\n{end}{rest.split(end)[1]}"
    return text


def write_or_check(page: Path, script: str, source: str, wanted: Callable[[], str], arguments: list[str]) -> int:
    """Write the page, or with `--check` say whether it is stale.

    Args:
        page: the page.
        script: the script's file, which is to be run where the page is stale.
        source: what decides the page, as in "does not say what the code says".
        wanted: the page as it should be.
        arguments: of the command line.

    Returns:
        The exit code: 0; 1 where the page is stale; 2 where an argument is none.
    """
    if arguments not in ([], ["--check"]):
        print(f"{' '.join(arguments)!r} is no option: pass --check, or nothing to write {page.name}", file=sys.stderr)
        return 2
    content = wanted()
    if not arguments:
        page.write_text(content, encoding="utf-8")
    elif page.read_text(encoding="utf-8") != content:
        print(f"{page.name} does not say what {source}: run `python docs/{script}`", file=sys.stderr)
        return 1
    return 0
