"""Same tokens: whether two tokenizers make the same ids of a text, by what they contain and by what they do."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from tl_capacity.errors import CapacityError
from tl_capacity.text.streams import TokenStream

COMPARED_BATCHES = 4
"""Of a text, which both tokenizers read."""


def check_same_tokens(tokenizer: Any, other: Any, who: str, stream: Any = None) -> None:
    """Refuse a student whose tokenizer is another than its teacher's; nothing is known where either has none.

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
            f"{who} needs other tokens than the teacher ({difference}): judge a student that has the teacher's"
            " tokenizer"
        )


def last_token(tokenizer: Any) -> int:
    """The largest id of a tokenizer's own vocabulary, without tokens that were added; −1 where there is none."""
    if tokenizer is None:
        return -1
    added = tokenizer.get_added_vocab()
    return max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=-1)


def token_difference(tokenizer: Any, other: Any) -> str | None:
    """What the vocabularies of two tokenizers differ in, in words; None where every token has the same id in both.

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
    """Where another tokenizer makes other ids of the first texts of a stream, in words; None where it makes the same.

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
            return f"it makes other tokens of {text!r}"
    return None
