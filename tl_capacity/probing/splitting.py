"""The split of the documents: some fit the readouts, some choose their ridge penalty, and some judge them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import TokenSourceError
from tl_capacity.runtime.logs import ended_early, log
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.documents import document_groups
from tl_capacity.text.streams import PADDING, TokenBatch, as_batches

FIT, VALIDATION, HELD_OUT = "fit", "validation", "held-out"
TENTHS = (HELD_OUT,) * 3 + (VALIDATION,) + (FIT,) * 6
"""The part of each tenth of the documents."""
SPLIT_SALT = 2**41
"""Added to a document's number, so that the split is independent of the bootstrap's document groups."""


def split(stream: Any, parts: Sequence[str], max_tokens: int | None = None) -> Iterator[tuple[str, TokenBatch]]:
    """Batches of the documents of some parts. Each batch is of one part, with as many rows as the stream's own."""
    waiting: dict[str, list[tuple[NDArray[np.int64], int]]] = {part: [] for part in parts}
    seen, rows = 0, 1
    for batch in as_batches(stream):
        rows = max(rows, len(batch.tokens))
        for row, document, part in zip(batch.tokens, batch.documents.tolist(), parts_of(batch.documents), strict=True):
            if part in waiting:
                waiting[part].append((row, document))
        for part, some in waiting.items():
            while len(some) >= rows:
                yield part, _stacked(some[:rows])
                del some[:rows]
        seen += int((batch.tokens != PADDING).sum())
        if max_tokens is not None and seen >= max_tokens:
            break
    for part, some in waiting.items():
        if some:
            yield part, _stacked(some)
    if max_tokens is not None and seen < max_tokens and FIT in parts:  # said once, of all readings of the text
        log.warning(ended_early(seen, max_tokens))


def check_parts(stream: Any, rule: CountingRule, max_tokens: int | None = None, option: str = "--tokens") -> None:
    """Refuse text that leaves a part without a token that counts.

    No model is run. Text is read only until every part has such a token.

    Args:
        option: that `max_tokens` was given by, for the sentence.

    Raises:
        TokenSourceError: where one gets none; says how many tokens are enough.
    """
    missing, short = set(TENTHS), set[str]()
    seen, few, documents = 0, 0, set[int]()
    for batch in as_batches(stream):
        counted = [bool(row.any()) for row in rule.counted(batch.tokens)]
        documents |= set(batch.documents.tolist())
        missing -= {part for part, some in zip(parts_of(batch.documents), counted, strict=True) if some}
        seen += int((batch.tokens != PADDING).sum())
        if max_tokens is not None and seen >= max_tokens and missing and not short:
            short, few = set(missing), len(documents)
        if not missing:
            break
    part = next((part for part in (FIT, VALIDATION, HELD_OUT) if part in (missing or short)), None)
    if part is None:
        return
    halves = "6 fit, 1 chooses the ridge and 3 judge"
    if missing:
        raise TokenSourceError(
            f"no document is left for {part} (the text has {len(documents):,} documents; of every ten, {halves}): pass"
            " more documents"
        )
    raise TokenSourceError(
        f"no document is left for {part} ({option} {max_tokens} reads {few:,} documents; of every ten, {halves}): ask"
        f" for {option} {seen} or more"
    )


def parts_of(documents: NDArray[np.int64]) -> list[str]:
    """The part of each document, by a hash of its number."""
    return [TENTHS[tenth] for tenth in document_groups(documents + SPLIT_SALT, len(TENTHS)).tolist()]


def _stacked(rows: Sequence[tuple[NDArray[np.int64], int]]) -> TokenBatch:
    """Rows of any length as one batch."""
    tokens = np.full((len(rows), max(len(row) for row, _ in rows)), PADDING, dtype=np.int64)
    for place, (row, _) in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return TokenBatch(
        tokens[:, : max(1, int((tokens != PADDING).sum(1).max()))],
        np.array([document for _, document in rows], dtype=np.int64),
    )
