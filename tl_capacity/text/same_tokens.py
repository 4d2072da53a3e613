"""Same tokens: whether two tokenizers make the same ids of a text, by what they contain and by what they do."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from tl_capacity.text.streams import TokenStream

COMPARED_BATCHES = 4
"""Of a text, which both tokenizers read."""


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
