"""Document groups: each document belongs to one of 64 groups. Sums over groups can be merged and resampled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DOCUMENT_GROUPS = 64


def document_groups(documents: NDArray[np.int64], groups: int = DOCUMENT_GROUPS) -> NDArray[np.int64]:
    """The group of each document number. A hash (splitmix64) spreads neighbours and shards evenly,
    whatever the order.
    """
    x = documents.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(groups)).astype(np.int64)
