"""Layout: the tokens of a batch in pieces of equal length, made on the host and copied to the device once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.runtime.devices import uploaded
from tl_capacity.text.counting import CountedTokens
from tl_capacity.text.documents import document_groups

LENGTHS = (256, 128, 64, 32, 16)
"""Tokens of a piece. The first length that leaves at most `ROOM` of the places empty is taken, or else the last."""
ROOM = 1 / 16


@dataclass(frozen=True)
class Layout:
    """The counted tokens of a batch in pieces of one length, each piece from one document. Those of checked documents
    come first.

    Attributes:
        length: tokens of a piece.
        documents: their numbers.
        checked: how many pieces are of checked documents.
        checked_groups: int64 [token] document group of each checked token, on the host.
        padding_before: [piece + 1] on the host, how many empty places there are in front of each piece.
        kind: int64 [row, position], 1 where a token counts, 2 where it is there and does not, 0 elsewhere.
        token: int64 [place], the flat place of the token in [row, position]; where none is left, one of the same
            document.
        padding: int64, the places where none is left.
        document: int64 [piece], which of `documents`.
        groups: int64 [document].
        checked_place, checked_token, checked_group: int64 [token] of checked tokens: the place, the flat place in
            [row, position], the document group.
    """

    length: int
    documents: list[int]
    checked: int
    checked_groups: Tensor
    padding_before: NDArray[np.int64]
    kind: Tensor
    token: Tensor
    padding: Tensor
    document: Tensor
    groups: Tensor
    checked_place: Tensor
    checked_token: Tensor
    checked_group: Tensor

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return len(self.document)

    @classmethod
    def of(cls, tokens: CountedTokens, fvu_every: int, device: torch.device) -> Layout:
        """The layout of a batch's counted tokens, on a device.

        Args:
            tokens: which count.
            fvu_every: the reconstruction is checked on one document in this many.
            device: where it is needed.
        """
        rows, positions = tokens.row_of_token.numpy(), tokens.position_of_token.numpy()
        is_checked = tokens.checked(fvu_every).numpy()[rows]
        of_token = tokens.documents.numpy()[rows]
        order = np.lexsort((np.arange(len(rows)), of_token, ~is_checked))
        documents, first, counts = _runs(of_token[order])
        length = _length(counts)
        pieces = -(-counts // length)
        starts = np.cumsum(pieces * length) - pieces * length
        flat = (rows * tokens.counted.shape[1] + positions)[order]
        place = np.repeat(starts - first, counts) + np.arange(len(flat))
        token = np.repeat(flat[first], pieces * length)
        token[place] = flat
        empty = np.ones(len(token), dtype=bool)
        empty[place] = False
        checked_tokens = int(is_checked.sum())
        groups = document_groups(documents)
        checked_groups = np.repeat(groups, counts)[:checked_tokens]
        arrays = [
            tokens.valid.numpy().astype(np.int64).ravel() + tokens.unwanted.numpy().ravel(),
            token,
            np.flatnonzero(empty),
            np.repeat(np.arange(len(documents)), pieces),
            groups,
            place[:checked_tokens],
            flat[:checked_tokens],
            checked_groups,
        ]
        there = uploaded(torch.from_numpy(np.concatenate(arrays)), device).split([len(array) for array in arrays])
        checked = int(pieces[np.cumsum(counts) <= checked_tokens].sum())
        before = np.concatenate([[0], np.cumsum(empty.reshape(-1, length).sum(1))])
        kind = there[0].view(tokens.counted.shape)
        return cls(
            length,
            documents.tolist(),
            checked,
            torch.from_numpy(checked_groups),
            before,
            kind,
            *there[1:],
        )


def _runs(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Runs of equal numbers: the number, where the run begins, and how long it is."""
    first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.zeros(0, int)
    return values[first], first, np.diff(np.concatenate([first, [len(values)]]))


def _length(counts: NDArray[np.int64]) -> int:
    tokens = int(counts.sum())
    for length in LENGTHS:
        if int((-(-counts // length) * length).sum()) - tokens <= ROOM * tokens:
            return length
    return LENGTHS[-1]
