"""Scratch: memory that is kept between uses, because the first touch of fresh memory costs as much
as a pass over it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Memory for one large block at a time; whatever works one after the other shares it, so that it need not grow with
    their number.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, elements: int, like: Tensor) -> Tensor:
        """So many elements of a tensor's dtype and device, which whoever takes them next overwrites."""
        kept = self._kept
        if kept is None or len(kept) < elements or (kept.dtype, kept.device) != (like.dtype, like.device):
            self.release()
            kept = None  # not both at once
            self._kept = kept = torch.empty(elements, dtype=like.dtype, device=like.device)
        return kept[:elements]

    def release(self) -> None:
        """Give the memory back until it is needed again."""
        self._kept = None
