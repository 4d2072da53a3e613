"""Checks that the pages are easy to read: `python docs/check_reading.py [PAGE…]`.

On each page the median sentence has at most 18 words, and 95% of the sentences have at most 35. Code, tables, headings
and the parts that a script writes are left out. The exit code is 1 where a page is harder than that, and its longest
sentences are shown.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
MEDIAN, MOST = 18, 35
"""Words of the median sentence, and of all but the longest 5% of the sentences."""
GENERATED = re.compile(r"<!-- ([^:,>]+)[:,] [^>]* -->.*?<!-- end of \1 -->", re.DOTALL)
END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?][)”\"]?\s+(?=[^\sa-z])")
"""Where a sentence ends. What follows it begins with no small letter."""
WORD = re.compile(r"\w[\w.,'’/-]*")


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def plain(inline: Token) -> str:
    """The text of a paragraph. A piece of code counts as one word, a picture as none."""
    parts = inline.children or []
    read = {"code_inline": "Code", "softbreak": " "}
    return "".join(part.content if part.type == "text" else read.get(part.type, "") for part in parts)


def sentences(markdown: str) -> Iterator[str]:
    """The sentences of a page's paragraphs and list items."""
    opened: list[str] = []
    for token in MarkdownIt().enable("table").parse(GENERATED.sub("", markdown)):
        if token.nesting > 0:
            opened.append(token.type)
        elif token.nesting < 0:
            opened.pop()
        elif token.type == "inline" and opened[-1] == "paragraph_open":
            yield from (sentence for sentence in END.split(plain(token)) if WORD.search(sentence))


def length(sentence: str) -> int:
    """Words of a sentence."""
    return len(WORD.findall(sentence))


def fault(page: Path) -> str | None:
    """What makes a page hard to read, with its longest sentences; None where nothing does."""
    found = sorted(sentences(page.read_text(encoding="utf-8")), key=length, reverse=True)
    if not found:
        return None
    lengths = [length(sentence) for sentence in found]
    median, most = np.median(lengths), np.quantile(lengths, 0.95)
    if median <= MEDIAN and most <= MOST:
        return None
    longest = "".join(f"\n    {words} words: {sentence}" for words, sentence in zip(lengths, found, strict=True))
    shown = "\n".join(longest.strip("\n").split("\n")[: max(3, len(found) // 20)])
    return (
        f"{page.name}: the median sentence has {median:.0f} words (at most {MEDIAN}) and 95% have up to {most:.0f} (at"
        f" most {MOST}); cut the longest:\n{shown}"
    )


def main(arguments: Sequence[str]) -> int:
    """Prints the faults of some pages, or of all; returns the exit code."""
    chosen = [Path(argument) for argument in arguments] or pages()
    if missing := [str(page) for page in chosen if not page.is_file()]:
        print(f"there is no page {', '.join(missing)}: pass paths of Markdown files, or nothing", file=sys.stderr)
        return 2
    faults = [said for page in chosen if (said := fault(page))]
    for said in faults:
        print(said, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
