"""Scratch: memory that is kept between uses. The first touch of fresh memory costs as much as a pass over it."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Memory for one large block at a time, shared by users that work one after the other. It need not grow with their
    number.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, elements: int, like: Tensor) -> Tensor:
        """A block of so many elements, of a tensor's dtype and device. The next `take` overwrites it."""
        kept = self._kept
        if kept is None or len(kept) < elements or (kept.dtype, kept.device) != (like.dtype, like.device):
            self.release()
            kept = None  # not both at once
            self._kept = kept = torch.empty(elements, dtype=like.dtype, device=like.device)
        return kept[:elements]

    def release(self) -> None:
        """Free the memory until it is needed again."""
        self._kept = None
