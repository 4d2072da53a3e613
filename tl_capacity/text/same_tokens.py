"""Same tokens: whether two tokenizers give the same ids, judged by their vocabularies and by their results
on a text.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from tl_capacity.errors import CapacityError
from tl_capacity.text.streams import TokenStream

COMPARED_BATCHES = 4
"""Batches of a text that both tokenizers read."""


def check_same_tokens(tokenizer: Any, other: Any, who: str, stream: Any = None) -> None:
    """Refuse a student whose tokenizer differs from its teacher's. If either has none, nothing is checked.

    Args:
        tokenizer, other: the teacher's and the student's.
        who: the student, in a sentence.
        stream: a `TokenStream` of text, of which both read the first rows.

    Raises:
        CapacityError: names what differs.
    """
    if tokenizer is None or other is None:
        return
    difference = token_difference(tokenizer, other)
    if difference is None and isinstance(stream, TokenStream) and stream.is_text:
        difference = reading_difference(stream, other)
    if difference is not None:
        raise CapacityError(
            f"{who} has a different tokenizer from the teacher ({difference}): choose a student with the teacher's "
            "tokenizer"
        )


def last_token(tokenizer: Any) -> int:
    """The largest id of a tokenizer's own vocabulary, without added tokens; −1 if there is none."""
    if tokenizer is None:
        return -1
    added = tokenizer.get_added_vocab()
    return max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=-1)


def token_difference(tokenizer: Any, other: Any) -> str | None:
    """How the vocabularies of two tokenizers differ, in words; None if every token has the same id in both.

    A token that one of them has and the other lacks is no difference where it was added to the vocabulary, as a padding
    token often is: no text is told by it.

    Args:
        tokenizer, other: Hugging Face tokenizers; of the sentence, the first is "the teacher" and the second "it".
    """
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    for token, number in sorted(mine.items(), key=lambda item: item[1]):
        if token in theirs and theirs[token] != number:
            return f"{token!r} is its token {theirs[token]:,}, and the teacher's {number:,}"
    for only, lacking, added, who in (
        (mine, theirs, tokenizer.get_added_vocab(), "the teacher"),
        (theirs, mine, other.get_added_vocab(), "it"),
    ):
        missing = [token for token in only if token not in lacking and token not in added]
        if missing:
            first = min(missing, key=only.__getitem__)
            more = "" if len(missing) == 1 else f" and {len(missing) - 1:,} more"
            return f"only {who} has the token {first!r}{more}"
    return None


def reading_difference(stream: TokenStream, other: Any) -> str | None:
    """Where another tokenizer gives other ids for the first texts of a stream, in words; None if it gives the same.

    Two tokenizers with one vocabulary may still cut words otherwise.
    """
    plain = replace(stream, prepend_bos=False)
    batches = zip(plain, replace(plain, tokenizer=other), strict=False)
    for mine, theirs in islice(batches, COMPARED_BATCHES):
        if mine.tokens.shape != theirs.tokens.shape or not np.array_equal(mine.tokens, theirs.tokens):
            rows = zip(mine.tokens.tolist(), theirs.tokens.tolist(), strict=False)
            row, other_row = next(((a, b) for a, b in rows if a != b), (mine.tokens[-1].tolist(), []))
            place = next((i for i, (a, b) in enumerate(zip(row, other_row, strict=False)) if a != b), 0)
            text = stream.tokenizer.decode([token for token in row[max(0, place - 2) : place + 3] if token >= 0])
            return f"it cuts {text!r} into other tokens"
    return None
