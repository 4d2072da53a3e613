"""A concept: whether a sentence asks or states, in pairs that hold the same words."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tl_capacity.interfaces import Concept, LabelledText

WHO = (
    "my sister",
    "the old sailor",
    "our teacher",
    "a stranger",
    "the baker",
    "his uncle",
    "the captain",
    "her neighbour",
)
WHERE = (
    "in the garden",
    "on the bridge",
    "at the market",
    "near the river",
    "behind the church",
    "under the oak",
    "by the sea",
    "at the gate",
)
WHEN = ("today", "again", "alone", "tonight")


def sentences() -> Iterator[LabelledText]:
    """256 pairs; a pair is one document, so that it is never torn between training and test."""
    for who, where, when in product(WHO, WHERE, WHEN):
        pair = f"{who} {where} {when}"
        yield LabelledText(f"Is {pair}?", "question", document=pair)
        yield LabelledText(f"{who[0].upper()}{who[1:]} is {where} {when}.", "statement", document=pair)


ASKS = Concept(
    "asks",
    ("question", "statement"),
    sentences,
    summary="asks or states, in the same words",
    collection="example",
    licence="MIT",
)
