"""The check that pages are easy to read: what counts as a sentence, and which page is too hard."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_reading import LONGEST, fault, kinds, length, main, pages, sentences, too_long, words

EASY = "# Title\n\nThe teacher is wide. The student is narrow.\n"
PAGE = """# A heading is no sentence

A width of 0.5 is asked for, e.g. by `plan --keep 0.5`, as in Elhage et al. (2022). See [the
page](page.md)! Is it short?

| a table | is none |
|---|---|
| neither. Is this | one |

- An item is a sentence
- Another: "so it is." Then a third

<!-- floors: written by docs/x.py -->

A script wrote this.

<!-- end of floors -->

```sh
code  # is none. Truly.
```
"""


def test_what_a_sentence_is() -> None:
    assert list(sentences(PAGE)) == [
        "A width of 0.5 is asked for, e.g. by Code, as in Elhage et al. (2022)",
        "See the page",
        "Is it short?",
        "An item is a sentence",
        'Another: "so it is',
        "Then a third",
    ]
    assert length("d* = 84.5 [80, 90], isn’t it?") == 6


@pytest.mark.parametrize(
    ("sentence", "says"),
    [
        ("word " * 19 + ". ", "page.md: the median sentence has 19 words (at most 18)"),
        ("It is so. " * 4 + "word " * 50 + ". ", "95% have up to "),
    ],
)
def test_a_page_that_is_hard_to_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sentence: str, says: str
) -> None:
    page, easy = tmp_path / "page.md", tmp_path / "easy.md"
    page.write_text(f"# Title\n\n{sentence}\n", encoding="utf-8")
    easy.write_text(EASY, encoding="utf-8")
    assert fault(easy) is None
    assert main([str(easy)]) == 0
    assert main([str(page), str(easy)]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "word word word" in said, "the longest sentences are shown"
    assert "easy.md" not in said


CODE = """```sh
make
```

<!-- floors: written by docs/x.py -->
A script wrote this.
<!-- end of floors -->
"""


def test_words_of_a_page() -> None:
    assert words("# A title\n\n| a | b |\n|---|---|\n| one | d* = 0.5 |\n\nTwo words.\n" + CODE) == 11


@pytest.mark.parametrize(
    ("kind", "allowed"), [("How to", False), ("Reference", True), ("Results", True), (None, False)]
)
def test_a_page_that_is_too_long(tmp_path: Path, kind: str | None, allowed: bool) -> None:
    page = tmp_path / "page.md"
    page.write_text("It is so. " * (LONGEST // 3) + CODE.replace("make", ""), encoding="utf-8")
    assert too_long(page, kind) == (
        None
        if allowed
        else "page.md has 1,501 words (at most 1,500): cut it, split it, or"
        " list it in docs/index.md under Reference or Results if it is such a page"
    )


def test_a_long_page_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("It is so. " * LONGEST, encoding="utf-8")
    assert main([str(page)]) == 1
    assert "page.md has 4,500 words" in capsys.readouterr().err


def test_the_kind_of_a_page_is_its_heading_in_the_contents(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(
        "# Contents\n\n## How to\n\n### First\n\n| [a](a.md) | A |\n\n## Reference\n\n| [b](deep/b.md#c) | B |\n",
        encoding="utf-8",
    )
    assert kinds(tmp_path / "index.md") == {tmp_path / "a.md": "How to", tmp_path / "deep" / "b.md": "Reference"}
    assert {"Tutorial", "How to", "Concepts", "Reference", "Results"} == set(kinds().values())


def test_a_page_without_sentences(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```sh\nmake\n```\n", encoding="utf-8")
    assert fault(page) is None


def test_a_page_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs/none.md"]) == 2
    assert "there is no page docs/none.md: pass paths of Markdown files, or nothing" in capsys.readouterr().err


def test_readme_and_every_page_are_checked() -> None:
    names = {page.name for page in pages()}
    assert {"README.md", "predict.md", "embedded_floor.md"} <= names
