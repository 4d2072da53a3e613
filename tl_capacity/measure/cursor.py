"""Cursor: how far counting has come in its text, and which batches are still to be counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tl_capacity.errors import CapacityError
from tl_capacity.storage.digests import digest
from tl_capacity.text.shares import Place
from tl_capacity.text.streams import Fillers, TokenBatch, as_batches


@dataclass(frozen=True)
class Cursor:
    """How far counting has come.

    Attributes:
        rows: rows consumed.
        digest: a running hash of their tokens: two measurements with the same one saw the same tokens.
        place: the last document that they are of, and how many of them are of it.
    """

    rows: int = 0
    digest: str = ""
    place: Place = Place()

    def after(self, batch: TokenBatch, rows_go_on: bool = False) -> Cursor:
        """The cursor after one more batch. The batch's rows may continue rows that were already consumed."""
        if not len(batch.documents):
            return self
        content = self.digest.encode() + batch.tokens.tobytes() + batch.documents.tobytes()
        last = int(batch.documents[-1])
        elsewhere = np.flatnonzero(batch.documents != last)
        of_it = len(batch.documents) - 1 - int(elsewhere[-1]) if len(elsewhere) else len(batch.documents)
        if not len(elsewhere) and self.place.document == last:
            of_it += self.place.rows
        return Cursor(self.rows + (0 if rows_go_on else len(batch.tokens)), digest(content), Place(last, of_it))


def batches_after(
    stream: Any, cursor: Cursor, again: bool, fillers: Fillers | None = None
) -> Iterator[tuple[TokenBatch, Cursor]]:
    """The batches of a stream that are still to be counted, each with the cursor after it.

    Args:
        stream: whatever `as_batches` takes.
        cursor: how far counting has come.
        fillers: ids that may be padding in rows without a mask, which is warned of.
        again: go over the stream that was counted before, up to the cursor; else the stream adds to what was counted.

    Raises:
        CapacityError: where a stream that is gone over again does not begin with what was counted.
    """
    place = Cursor() if again else cursor
    for batch in as_batches(stream, place.rows, fillers):
        before, place = place, place.after(batch)
        if again and before.rows < cursor.rows:
            if place.rows > cursor.rows or (place.rows == cursor.rows and place.digest != cursor.digest):
                raise CapacityError(
                    "the stream does not begin with the tokens counted before: resume with the same source,"
                    " tokenizer and batches, or start anew"
                )
            continue
        yield batch, place
    if again and place.rows < cursor.rows:
        raise CapacityError(
            f"the stream ends after {place.rows:,} rows, but {cursor.rows:,} were counted before: resume with the same"
            " source, or start anew"
        )
