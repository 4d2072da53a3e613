"""Tokenizing: text as token ids. Special tokens that a text spells stay text, and a long document cut into pieces gets
the same tokens as the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tl_capacity.errors import SourceCutOffError, TokenSourceError

Number = TypeVar("Number")

DOCUMENTS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 2**16
"""A longer document is cut into pieces of this many characters, since a tokenizer holds about 200 bytes
for each token.
"""
GROUP_CHARACTERS = 2**20
OVERLAP = 2**11
"""Characters that two neighbouring pieces share."""
AGREEING = 24
"""Tokens on either side of a seam on which both of its pieces must agree."""


def bos_of(tokenizer: Any) -> int | None:
    """The id that begins a row: BOS, or EOS if a tokenizer has no BOS, as in TransformerLens; None without either. Id 0
    is valid (GPT-NeoX).
    """
    ids = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((int(token) for token in ids if token is not None), None)


def token_ids(tokenizer: Any, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
    """The ids of each text, without any that the tokenizer would add.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        special_tokens: read a special token that is spelled in a text, such as `<|endoftext|>`, as that token; by
            default it is text like any other.
    """
    ids: list[list[int]] = _encoded(tokenizer, texts, special_tokens)["input_ids"]
    return ids


def tokens_of_each(
    tokenizer: Any, texts: Iterable[tuple[Number, str]], special_tokens: bool = False
) -> Iterator[tuple[Number, Iterator[list[int]]]]:
    """The ids of each numbered text, in pieces. Short texts are tokenized together, and a long one while it is read."""
    for group in _groups(texts):
        if len(group) == 1 and len(group[0][1]) > CHARACTERS_AT_ONCE:
            [(number, text)] = group
            yield number, tokens_in_pieces(tokenizer, text, special_tokens)
            continue
        encoded = token_ids(tokenizer, [text for _, text in group], special_tokens)
        for (number, _), ids in zip(group, encoded, strict=True):
            yield number, iter([ids])


def tokens_in_pieces(
    tokenizer: Any,
    text: str,
    special_tokens: bool = False,
    size: int = CHARACTERS_AT_ONCE,
    overlap: int = OVERLAP,
) -> Iterator[list[int]]:
    """The ids of a text in pieces. Together they are the ids of the whole text, but only one piece is held at a time.

    Neighbouring pieces overlap. They are joined at a token that begins and ends at the same place in both, and around
    which both have the same tokens; where there is none, the piece is made longer. A tokenizer that is written in
    Python does not tell where its tokens are, and gets the text whole.

    Args:
        tokenizer, special_tokens: as for `token_ids`.
        text: the text.
        size: characters in a piece.
        overlap: characters that two pieces share.
    """
    if not getattr(tokenizer, "is_fast", False):
        yield from token_ids(tokenizer, [text], special_tokens)
        return
    start, end, first = 0, size, 0
    piece = _encoded(tokenizer, [text[:end]], special_tokens)
    while end < len(text):
        next_start, next_end = end - overlap, end - overlap + size
        following = _encoded(tokenizer, [text[next_start:next_end]], special_tokens)
        seam = _seam(text, piece, start, following, next_start, overlap)
        if seam is None:
            end = start + 2 * (end - start)
            piece = _encoded(tokenizer, [text[start:end]], special_tokens)
            continue
        yield piece["input_ids"][0][first : seam[0]]
        start, end, first, piece = next_start, next_end, seam[1], following
    yield piece["input_ids"][0][first:]


def _seam(text: str, left: Any, left_start: int, right: Any, right_start: int, overlap: int) -> tuple[int, int] | None:
    """The place of one token in each of two overlapping pieces. From there on, the right piece has the same tokens as
    the whole.
    """
    middle = range(right_start + overlap // 2, right_start + 3 * overlap // 4)
    word_starts = [place for place in middle if text[place - 1].isspace() and not text[place].isspace()]
    left_ids, right_ids = left["input_ids"][0], right["input_ids"][0]
    for place in (*word_starts, *middle):
        i, j = left.char_to_token(0, place - left_start), right.char_to_token(0, place - right_start)
        if i is None or j is None or min(i, j) < AGREEING:
            continue
        around = left_ids[i - AGREEING : i + AGREEING]
        if len(around) < 2 * AGREEING or around != right_ids[j - AGREEING : j + AGREEING]:
            continue
        spans = left.token_to_chars(0, i), right.token_to_chars(0, j)
        if (
            spans[0] is not None
            and spans[1] is not None
            and spans[0].start + left_start == spans[1].start + right_start
        ):
            return i, j
    return None


def _encoded(tokenizer: Any, texts: Sequence[str], special_tokens: bool) -> Any:
    # Half of a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark; tokenizers refuse it.
    return tokenizer(
        [text.encode("utf-8", "replace").decode("utf-8") for text in texts],
        add_special_tokens=False,
        split_special_tokens=not special_tokens,
        return_attention_mask=False,
        verbose=False,
    )


def _groups(texts: Iterable[tuple[Number, str]]) -> Iterator[list[tuple[Number, str]]]:
    """Texts to tokenize together; a long one is by itself."""
    group: list[tuple[Number, str]] = []
    characters = 0
    try:
        for number, text in texts:
            long = len(text) > CHARACTERS_AT_ONCE
            if group and (long or len(group) == DOCUMENTS_AT_ONCE or characters + len(text) > GROUP_CHARACTERS):
                yield group
                group, characters = [], 0
            group.append((number, text))
            characters += len(text)
            if long:
                yield group
                group, characters = [], 0
    except SourceCutOffError:
        if group:
            yield group  # what was read before is whole
        raise
    if group:
        yield group


def without_nulls(texts: Iterable[Any], giver: str, spec: str) -> Iterator[str]:
    """The texts without empty ones and nulls, such as None and a table's NaN. Their number is logged when the reading
    ends.

    Args:
        texts: what a source gives.
        giver, spec: what it is, and what it reads, in words.

    Raises:
        TokenSourceError: where something else than a text comes.
    """
    from tl_capacity.runtime.logs import log

    seen = nulls = 0
    try:
        for text in texts:
            seen += 1
            if text is None or text == "" or text != text:
                nulls += 1
            elif isinstance(text, str):
                yield text
            else:
                raise TokenSourceError(
                    f"{giver} gave a {type(text).__name__} of {spec}, not a text: make its documents strings"
                )
    finally:
        if nulls:
            log.warning(f"{nulls:,} of {seen:,} documents of {spec} have no text and were left out")
