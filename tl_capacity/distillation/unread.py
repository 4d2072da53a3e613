"""What steps of training said of themselves, left on the device until it is read: reading waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tl_capacity.runtime.devices import exact

AT_ONCE = 16
"""Steps that a GPU may be ahead of what was read of it."""


class Unread:
    """Losses and gradient norms of the students in the steps since the last reading.

    Attributes:
        at_once: steps after which they should be read; 1 on the CPU, which nobody waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self.at_once = 1 if device.type == "cpu" else AT_ONCE
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, step: int, losses: Tensor, norms: Sequence[Tensor]) -> None:
        """A step's losses and norms [student], over all processes: nothing may be asked of these at a reading, whose
        time each chooses by its own clock.
        """
        self._steps.append(step)
        self._losses.append(losses.detach())
        self._norms.append(torch.stack(list(norms)).detach())

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._steps) >= self.at_once

    def read(self) -> Iterator[tuple[int, list[float], list[float]]]:
        """`(step, losses, norms)` of each step; then there is nothing unread."""
        if not self._steps:
            return
        losses, norms = torch.stack(self._losses), exact(torch.stack(self._norms))
        rows = torch.stack([losses, norms.to(losses)]).tolist()
        steps, self._steps, self._losses, self._norms = self._steps, [], [], []
        yield from zip(steps, *rows, strict=True)
