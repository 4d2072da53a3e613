"""The text of a distillation: rows of tokens to train on, in a seeded order, and whole documents held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.errors import TokenSourceError
from tl_capacity.runtime.devices import uploaded
from tl_capacity.storage.digests import digest
from tl_capacity.text.streams import PADDING, Fillers, as_batches

HELDOUT_EVERY = 16
"""If no held-out text is given, one document in this many is held out, until there is enough."""

SHOWN_ROWS = 16
"""Rows of training text from which the directions of a teacher's stream are computed."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, padded at the end with `PADDING`. All are in memory, at 4 bytes a token.

    Attributes:
        tokens: token ids [row, position].
        documents: number of the document that each row is from [row], where it is known.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int64] | None = None

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted tokens of each row: all but the first."""
        return predicted_of(self.tokens)

    def in_parts(self, rows: int) -> list[int]:
        """Predicted tokens of each block of this many consecutive rows."""
        return [int(self.predicted[start : start + rows].sum()) for start in range(0, len(self.tokens), rows)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows."""
        return digest(np.ascontiguousarray(self.tokens).tobytes())

    def batch(self, step: int, batch_rows: int, seed: int) -> NDArray[np.int64]:
        """The rows of a step [row, position].

        Each epoch takes all rows, in an order that depends only on the seed and the epoch.
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
        """Some rows, cut to the length of the longest of them."""
        chosen = self.tokens[rows]
        return chosen[:, : int((chosen != PADDING).sum(1).max())].astype(np.int64)

    def steps(self, tokens: int, batch_rows: int) -> int:
        """The number of steps that predict about this many tokens."""
        return max(1, round(tokens / (batch_rows * float(self.predicted.mean()))))


def read(
    stream: Any, heldout: Any, tokens: int, heldout_tokens: int, repeat: bool, special_ids: Sequence[int] = ()
) -> tuple[Rows, Rows]:
    """Rows to train on, with about `tokens` predicted tokens, and held-out rows.

    Args:
        stream: a `TokenStream`, or whatever `as_batches` takes.
        heldout: another one; None holds out documents of the stream.
        repeat: whether a stream that is shorter than asked may be read several times.
        special_ids: ids that may be padding in rows without an attention mask, which is warned of.

    Raises:
        TokenSourceError: where the stream is shorter than asked, or nothing is held out.
    """
    fillers = Fillers(special_ids, special_ids)
    train: list[NDArray[np.int32]] = []
    held: list[NDArray[np.int32]] = []
    n_train, n_held, last_held = 0, 0, -1
    for batch in as_batches(stream, fillers=fillers):
        for document, row in zip(batch.documents, batch.tokens.astype(np.int32), strict=True):
            predicted = int((row != PADDING).sum()) - 1
            if predicted < 1:
                continue
            if heldout is None and document % HELDOUT_EVERY == 0 and (n_held < heldout_tokens or document == last_held):
                held.append(row)
                n_held, last_held = n_held + predicted, document
            elif n_train < tokens:
                train.append(row)
                n_train += predicted
        if n_train >= tokens and (heldout is not None or n_held >= heldout_tokens):
            break
    if heldout is not None:
        held = [row for _, row in first_rows(heldout, heldout_tokens, fillers=fillers)]
        n_held = sum(int((row != PADDING).sum()) - 1 for row in held)
    if n_held < 1:
        raise TokenSourceError(
            "there is no held-out text to judge the students on: pass some, or a stream with several documents"
        )
    if not n_train:
        raise TokenSourceError(
            "all of the text was held out, so none is left to train on: pass a stream with several documents, or"
            " separate held-out text"
        )
    if n_train < tokens and not repeat:
        raise TokenSourceError(
            f"the stream holds {n_train:,} tokens to train on, fewer than the {tokens:,} asked for: ask for fewer, or"
            " allow it to be repeated"
        )
    return Rows(_table(train)), Rows(_table(held))


def first_rows(
    stream: Any, tokens: int, every: int = 1, fillers: Fillers | None = None
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """`(document, token ids)` of the first rows of a stream, until they have enough predicted tokens.

    Args:
        every: read only documents whose number is a multiple of this, and the last of them whole; with `HELDOUT_EVERY`
            they are those that `read` holds out. With 1 whole batches are read.
    """
    seen, last = 0, -1
    for batch in as_batches(stream, fillers=fillers):
        for document, row in zip(batch.documents.tolist(), batch.tokens.astype(np.int32), strict=True):
            predicted = int((row != PADDING).sum()) - 1
            if every > 1 and (document % every or predicted < 1 or (seen >= tokens and document != last)):
                continue
            seen, last = seen + predicted, document
            yield document, row
        if seen >= tokens and (every == 1 or int(batch.documents[-1]) > last):
            return


def read_to_judge(stream: Any, tokens: int, every: int = 1, special_ids: Sequence[int] = ()) -> Rows:
    """Rows to judge students by, with their documents; see `first_rows`.

    Raises:
        TokenSourceError: where no document has two tokens.
    """
    rows = list(first_rows(stream, tokens, every, Fillers(special_ids, special_ids)))
    kept = [(document, row) for document, row in rows if int((row != PADDING).sum()) > 1]
    if not kept:
        raise TokenSourceError("the text has no token to predict: pass documents of at least two tokens")
    return Rows(_table([row for _, row in kept]), np.array([document for document, _ in kept], dtype=np.int64))


def first_whole_rows(text: Rows) -> Int[Tensor, "row position"]:
    """Full rows from the beginning of a text, for computing the directions of a teacher's stream."""
    whole = text.tokens[(text.tokens != PADDING).all(1)]
    return torch.from_numpy((whole if len(whole) else text.trimmed(slice(0, 1)))[:SHOWN_ROWS].astype(np.int64))


def predicted_of(tokens: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Predicted tokens of each row [row, position] that is padded at its end: all but the first."""
    return np.asarray(np.maximum((tokens != PADDING).sum(1) - 1, 0), dtype=np.int64)


def model_inputs(
    rows: NDArray[np.int64], device: torch.device
) -> tuple[Int[Tensor, "row position"], Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Token ids [row, position], the places in all rows together of those that have a next token, and those next
    tokens. What is made of a mask on the host need not be waited for on a device.
    """
    counted = np.zeros(rows.shape, dtype=bool)
    counted[:, :-1] = rows[:, 1:] != PADDING
    places, labels = np.flatnonzero(counted), rows[:, 1:][counted[:, :-1]]
    tokens, places_there, labels_there = (
        uploaded(torch.from_numpy(part), device) for part in (rows.clip(min=0), places, labels)
    )
    return tokens, places_there, labels_there


def _table(rows: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int32)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return table
