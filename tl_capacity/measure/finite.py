"""Finiteness: the error for a value that is not finite, noted without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_capacity.errors import CapacityError

SENTENCES = {
    "activations": "{hook} has NaN or infinite activations in batch {batch}: check the model's dtype and weights",
    "latents": "the SAE at {hook} gives NaN or infinite latents in batch {batch}: check its weights",
    "written": "the SAE at {hook} writes NaN or infinite values in batch {batch}: check its weights",
}
"""The message for each kind of value that can be not finite, in the order in which one causes the next."""
NEVER = 2**62
"""The number of a batch that never comes."""


def not_finite(kind: str, hook: str, batch: int) -> CapacityError:
    """The error for a NaN or infinite value at a hook point in a batch."""
    return CapacityError(SENTENCES[kind].format(hook=hook, batch=batch))


class FirstBad:
    """The first batch with a NaN or infinite value at a hook point. It is noted on the device, because asking after
    each batch would mean waiting each time.
    """

    def __init__(self, hook: str, device: torch.device) -> None:
        self._hook = hook
        self._first = {kind: torch.full((), NEVER, dtype=torch.int64, device=device) for kind in SENTENCES}

    def note(self, kind: str, bad: Tensor, batch: int) -> None:
        """Remember this batch if it is the first for which `bad`, a flag on the device, is set."""
        first = self._first[kind]
        first.copy_(torch.minimum(first, torch.where(bad, batch, NEVER)))

    def check(self) -> None:
        """Wait for the device once, and raise if a batch was noted.

        Raises:
            CapacityError: where something was not finite.
        """
        first = torch.stack(list(self._first.values())).cpu().tolist()
        if min(first) != NEVER:
            raise not_finite(list(SENTENCES)[first.index(min(first))], self._hook, min(first))
