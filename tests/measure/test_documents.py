"""Open documents against a plain table of sets: which features each document has shown, over any order of batches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.text.documents import document_groups

brisk = settings(max_examples=60, deadline=None)
FEATURES = 7
CPU = torch.device("cpu")

batches = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, FEATURES - 1))), max_size=6), max_size=8
)
"""In each batch some documents, and the features that each shows there; one that comes back after it has ended is
another document.
"""


def statistics() -> FeatureStatistics:
    return FeatureStatistics.empty(FEATURES, 2, torch.ones(FEATURES), CPU)


def read(documents: OpenDocuments, sums: FeatureStatistics, batch: list[tuple[int, set[int]]]) -> None:
    numbers = [number for number, _ in batch]
    documents.end(sums, but=numbers)
    documents.open(numbers)
    for row, (_, shown) in zip(documents.rows(numbers), batch, strict=True):
        features = torch.tensor(sorted(shown), dtype=torch.int64)
        documents.mark(row.expand(len(features)), features)


@brisk
@given(batches, st.integers(0, 8))
def test_incidence_is_that_of_sets(read_batches: list[list[tuple[int, set[int]]]], restored_before: int) -> None:
    documents, sums = OpenDocuments(FEATURES, CPU), statistics()
    open_sets: dict[int, set[int]] = {}
    ended: list[tuple[int, set[int]]] = []
    for i, batch in enumerate(read_batches):
        if i == restored_before:
            documents = OpenDocuments.from_arrays(*documents.arrays(), CPU)
        read(documents, sums, batch)
        numbers = {number for number, _ in batch}
        ended += [(number, shown) for number, shown in open_sets.items() if number not in numbers]
        open_sets = {number: shown for number, shown in open_sets.items() if number in numbers}
        for number, shown in batch:
            open_sets[number] = open_sets.get(number, set()) | shown
    numbers, seen = documents.arrays()
    assert {int(n): set(np.flatnonzero(row).tolist()) for n, row in zip(numbers, seen, strict=True)} == open_sets
    documents.end(sums)
    ended += open_sets.items()
    assert sums.incidence.tolist() == [sum(feature in shown for _, shown in ended) for feature in range(FEATURES)]
    groups = document_groups(np.array([number for number, _ in ended], dtype=np.int64))
    assert sums.documents.tolist() == np.bincount(groups, minlength=len(sums.documents)).tolist()
    assert documents.arrays()[1].shape == (0, FEATURES)


def test_rows_of_ended_documents_are_used_again() -> None:
    documents, sums = OpenDocuments(FEATURES, CPU), statistics()
    documents.open(range(4))
    kept = documents.rows(range(4)).max()
    for first in range(4, 100, 4):
        documents.end(sums)
        documents.open(range(first, first + 4))
        assert documents.rows(range(first, first + 4)).max() == kept
