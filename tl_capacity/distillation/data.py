"""The text of a distillation: rows of tokens read once, some whole documents held out, and the order in which the
others are trained on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import TokenSourceError
from tl_capacity.text.streams import PADDING, as_batches

HELDOUT_EVERY = 16
"""Where no held-out text is given, every so many-th document is held out until there is enough."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids [row, position], `PADDING` behind their ends; 4 bytes a token, all in memory."""

    tokens: NDArray[np.int32]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted tokens of each row: all but the first."""
        return np.asarray(np.maximum((self.tokens != PADDING).sum(1) - 1, 0), dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest()

    def batch(self, step: int, batch_rows: int, seed: int) -> NDArray[np.int64]:
        """The rows of a step [row, position]: each epoch takes all rows in an order of its own, which depends on the
        seed and the epoch alone.
        """
        places = np.arange(step * batch_rows, (step + 1) * batch_rows)
        epochs = places // len(self.tokens)
        order = {
            int(epoch): np.random.default_rng([seed, int(epoch)]).permutation(len(self.tokens))
            for epoch in np.unique(epochs)
        }
        return self.trimmed(
            np.array([order[int(epoch)][place % len(self.tokens)] for epoch, place in zip(epochs, places, strict=True)])
        )

    def trimmed(self, rows: slice | NDArray[np.int64]) -> NDArray[np.int64]:
        """Some rows, as long as the longest of them."""
        chosen = self.tokens[rows]
        return chosen[:, : int((chosen != PADDING).sum(1).max())].astype(np.int64)

    def steps(self, tokens: int, batch_rows: int) -> int:
        """How many steps predict about so many tokens."""
        return max(1, round(tokens / (batch_rows * float(self.predicted.mean()))))


def read(stream: Any, heldout: Any, tokens: int, heldout_tokens: int, repeat: bool) -> tuple[Rows, Rows]:
    """Rows to train on, for `tokens` predicted tokens, and rows held out.

    Args:
        stream: a `TokenStream`, or whatever `tokens.as_batches` takes.
        heldout: another one; None holds out documents of the stream.
        repeat: whether a stream that is shorter than asked may be read several times.

    Raises:
        TokenSourceError: where the stream is shorter than asked, or nothing is held out.
    """
    train: list[NDArray[np.int32]] = []
    held: list[NDArray[np.int32]] = []
    found, found_held, last_held = 0, 0, -1
    for batch in as_batches(stream):
        for document, row in zip(batch.documents, batch.tokens.astype(np.int32), strict=True):
            predicted = int((row != PADDING).sum()) - 1
            if predicted < 1:
                continue
            if (
                heldout is None
                and document % HELDOUT_EVERY == 0
                and (found_held < heldout_tokens or document == last_held)
            ):
                held.append(row)
                found_held, last_held = found_held + predicted, document
            elif found < tokens:
                train.append(row)
                found += predicted
        if found >= tokens and (heldout is not None or found_held >= heldout_tokens):
            break
    if heldout is not None:
        for batch in as_batches(heldout):
            rows = batch.tokens.astype(np.int32)
            held.extend(rows)
            found_held += int((rows != PADDING).sum()) - len(rows)
            if found_held >= heldout_tokens:
                break
    if found_held < 1:
        raise TokenSourceError(
            "there is no held-out text to judge the students by: give some, or a stream of several documents"
        )
    if not found:
        raise TokenSourceError(
            "all of the text was held out and none is left to train on: give a stream of several documents, or held-out"
            " text of its own"
        )
    if found < tokens and not repeat:
        raise TokenSourceError(
            f"the stream holds {found:,} tokens to train on, fewer than the {tokens:,} asked for: ask for fewer, or"
            " allow it to be repeated"
        )
    return Rows(_table(train)), Rows(_table(held))


def _table(rows: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int32)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return table
