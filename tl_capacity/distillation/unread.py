"""Losses and gradient norms of training steps, left on the device until they are read, because reading waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tl_capacity.runtime.devices import exact

AT_ONCE = 16
"""How many steps a GPU may be ahead of the last reading."""


class Unread:
    """Losses and gradient norms of the students since the last reading.

    Attributes:
        at_once: steps after which they should be read; 1 on the CPU, which nobody waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self.at_once = 1 if device.type == "cpu" else AT_ONCE
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, step: int, losses: Tensor, norms: Sequence[Tensor]) -> None:
        """Add a step's losses and norms [student], summed over all processes.

        Reading must not communicate, as each process reads by its own clock.
        """
        self._steps.append(step)
        self._losses.append(losses.detach())
        self._norms.append(torch.stack(list(norms)).detach())

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._steps) >= self.at_once

    def read(self) -> Iterator[tuple[int, list[float], list[float]]]:
        """`(step, losses, norms)` of each step since the last reading."""
        if not self._steps:
            return
        losses, norms = torch.stack(self._losses), exact(torch.stack(self._norms))
        rows = torch.stack([losses, norms.to(losses)]).tolist()
        steps, self._steps, self._losses, self._norms = self._steps, [], [], []
        yield from zip(steps, *rows, strict=True)
