"""Checks that the pages are easy to read: `python docs/check_reading.py [PAGE…]`.

On each page the median sentence has at most 18 words, and 95% of the sentences have at most 35. Code, tables, headings
and the parts that a script writes are left out.

No page has more than 1,500 words, unless the contents page lists it under Reference or Results. Code and tables count,
and the parts that a script writes do not.

The exit code is 1 if a page breaks a rule. Its longest sentences are shown, or its number of words.
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
LONGEST = 1_500
"""Words of a page."""
MAY_BE_LONG = ("Reference", "Results")
"""Kinds of pages that a reader looks something up in."""
GENERATED = re.compile(r"<!-- ([^:,>]+)[:,] [^>]* -->.*?<!-- end of \1 -->", re.DOTALL)
END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?][)”\"]?\s+(?=[^\sa-z])")
"""Where a sentence ends. The next one does not begin with a small letter."""
WORD = re.compile(r"\w[\w.,'’/-]*")
LINK = re.compile(r"\]\(([^)\s#]+)")


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def kinds(contents: Path = ROOT / "docs" / "index.md") -> dict[Path, str]:
    """The kind of each page: the heading under which the contents page lists it."""
    _, *sections = re.split(r"^## ", contents.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        (contents.parent / link).resolve(): section.partition("\n")[0].strip()
        for section in sections
        for link in LINK.findall(section)
    }


def plain(inline: Token) -> str:
    """The text of a paragraph. A piece of code counts as one word, and a picture as none."""
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
    """What makes a page hard to read, with its longest sentences; None if nothing does."""
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


def words(markdown: str) -> int:
    """Words of a page, in text, tables and code. A piece without a letter or digit, such as a table's rule, is none."""
    return sum(WORD.search(piece) is not None for piece in GENERATED.sub("", markdown).split())


def too_long(page: Path, kind: str | None) -> str | None:
    """That a page is too long for its kind, and what to do; None if it is not."""
    n = words(page.read_text(encoding="utf-8"))
    if kind in MAY_BE_LONG or n <= LONGEST:
        return None
    return (
        f"{page.name} has {n:,} words (at most {LONGEST:,}): cut it, split it, or list it in docs/index.md under"
        f" {' or '.join(MAY_BE_LONG)} if it is such a page"
    )


def main(arguments: Sequence[str]) -> int:
    """Print the faults of some pages, or of all. Returns the exit code."""
    chosen = [Path(argument) for argument in arguments] or pages()
    if missing := [str(page) for page in chosen if not page.is_file()]:
        print(f"there is no page {', '.join(missing)}: pass paths of Markdown files, or nothing", file=sys.stderr)
        return 2
    kind = kinds()
    faults = [
        said for page in chosen for said in (fault(page), too_long(page, kind.get(page.resolve()))) if said is not None
    ]
    for said in faults:
        print(said, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
