"""Rivals: floors computed with the model itself without any features, and a bound that no student can beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.rivals.bound import rank_bound as rank_bound
    from tl_capacity.rivals.projection import pca_splice as pca_splice
    from tl_capacity.rivals.start import truncated_start as truncated_start

__getattr__, __all__ = lazily(__name__, __file__)
