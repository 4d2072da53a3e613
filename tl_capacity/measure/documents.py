"""OpenDocuments: the features that each unfinished document has shown so far, kept from batch to batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.runtime.devices import uploaded


class OpenDocuments:
    """A row of flags [feature] for each open document.

    The rows stay in one place: memory that came and went with every batch would leave the heap in pieces too small for
    the model's activations.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        documents: Sequence[int] = (),
        seen: NDArray[np.bool_] | None = None,
    ) -> None:
        """
        Args:
            features: how many flags a row has.
            device: where they are.
            documents, seen: what is open already, as `arrays` gave it.
        """
        rows = torch.zeros(0, features, dtype=torch.bool) if seen is None else torch.from_numpy(seen.copy())
        self._seen = rows.to(device)
        self._row = {document: row for row, document in enumerate(documents)}
        self._counted: dict[int, Tensor] = {}

    def leave_out(self, documents: Sequence[int], seen: NDArray[np.bool_]) -> None:
        """From these documents, count only features that they have not shown before. Another process began to read
        them, and has counted the documents and their features [document, feature] so far.
        """
        flags = torch.from_numpy(seen.copy()).to(self._seen.device)
        self._counted = dict(zip(documents, flags, strict=True))

    def open(self, documents: Sequence[int]) -> None:
        """Give an empty row to each of these documents that has none."""
        new = [document for document in dict.fromkeys(documents) if document not in self._row]
        free = sorted(set(range(len(self._seen))) - set(self._row.values()))
        if len(new) > len(free):
            more = max(len(new) - len(free), len(self._seen))
            free += range(len(self._seen), len(self._seen) + more)
            self._seen = torch.cat([self._seen, self._seen.new_zeros(more, self._seen.shape[1])])
        for document, row in zip(new, free, strict=False):
            self._row[document] = row
            self._seen[row] = False

    def rows(self, documents: Sequence[int]) -> Tensor:
        """int64 [document]: the row of each document. The row of one that is not open has no meaning."""
        rows = torch.tensor([self._row.get(document, 0) for document in documents], dtype=torch.int64)
        return uploaded(rows, self._seen.device)

    def mark(self, rows: Tensor, features: Tensor) -> None:
        """Note that these documents, given by row [entry], have shown these features [entry]."""
        self._seen.view(-1)[rows * self._seen.shape[1] + features] = True

    def mark_where(self, rows: Tensor, features: Tensor, active: Tensor) -> None:
        """As `mark`, wherever `active` is set, for tensors of one shape."""
        places = (rows * self._seen.shape[1] + features).flatten()
        self._seen.view(torch.uint8).view(-1).scatter_reduce_(0, places, active.flatten().to(torch.uint8), "amax")

    def mark_block(self, rows: Tensor, features: slice, active: Tensor) -> None:
        """Note which features of a block each document has shown [row, feature]. Each document may appear once."""
        block = self._seen[:, features]
        block.index_copy_(0, rows, block.index_select(0, rows) | active)

    def end(self, statistics: FeatureStatistics, but: Collection[int] = ()) -> None:
        """Add every document but these to the document counts: they have ended."""
        ended = {document: row for document, row in self._row.items() if document not in but}
        if not ended:
            return
        self._row = {document: row for document, row in self._row.items() if document in but}
        self._add(statistics, list(ended), self._flags(list(ended.values())))

    def added_to(self, statistics: FeatureStatistics) -> None:
        """Add the open documents to the document counts, and keep them open here."""
        self._add(statistics, list(self._row), self._flags(list(self._row.values())))

    def _flags(self, rows: Sequence[int]) -> Tensor:
        return self._seen.index_select(0, uploaded(torch.tensor(rows, dtype=torch.int64), self._seen.device))

    def _add(self, statistics: FeatureStatistics, documents: Sequence[int], seen: Tensor) -> None:
        """Add documents and the features [document, feature] that they have shown."""
        if known := [place for place, document in enumerate(documents) if document in self._counted]:
            before = torch.stack([self._counted[documents[place]] for place in known])
            statistics.update_incidence(seen[known] & ~before)
            new = [place for place in range(len(documents)) if place not in known]
            documents, seen = [documents[place] for place in new], seen[new]
        statistics.update_documents(np.array(documents, dtype=np.int64), seen)

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The open documents' numbers [document] and flags [document, feature]."""
        return np.array(list(self._row), dtype=np.int64), self._seen[list(self._row.values())].cpu().numpy()

    @classmethod
    def from_arrays(cls, documents: NDArray[np.int64], seen: NDArray[np.bool_], device: torch.device) -> OpenDocuments:
        """The inverse of `arrays`."""
        return cls(seen.shape[1], device, documents.tolist(), seen)
