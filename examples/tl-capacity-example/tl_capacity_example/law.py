"""A capacity law, to hold the others against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tl_capacity.interfaces import CapacityLaw


class Antipodal(CapacityLaw):
    """Two features in each dimension, pointing opposite ways: the first superposition that toy models learn (Elhage et
    al. 2022, arXiv:2209.10652).
    """

    name = "antipodal"
    summary = "two features per dimension, whatever the sparsity"
    caveat = "a lower bound, for comparison: sparser features share dimensions with more than one other"

    def features_per_dimension(self, alpha: float, importance: NDArray[np.float64]) -> float:
        return 2.0
