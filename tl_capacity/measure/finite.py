"""Finiteness: what is said where something was not finite, and how that is noted without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_capacity.errors import CapacityError

SENTENCES = {
    "activations": "{hook} has NaN or infinite activations in batch {batch}: check the model's dtype and weights",
    "latents": "the SAE at {hook} gives NaN or infinite latents in batch {batch}: check its weights",
    "written": "the SAE at {hook} writes NaN or infinite values in batch {batch}: check its weights",
}
"""By what was not finite, in the order in which one makes the next so."""
NEVER = 2**62
"""A batch that does not come."""


def not_finite(kind: str, hook: str, batch: int) -> CapacityError:
    """The error that something at a hook point was NaN or infinite in a batch."""
    return CapacityError(SENTENCES[kind].format(hook=hook, batch=batch))


class FirstBad:
    """The first batch in which something at a hook point was NaN or infinite, noted on the device: to ask each time
    would be to wait for it each time.
    """

    def __init__(self, hook: str, device: torch.device) -> None:
        self._hook = hook
        self._first = {kind: torch.full((), NEVER, dtype=torch.int64, device=device) for kind in SENTENCES}

    def note(self, kind: str, bad: Tensor, batch: int) -> None:
        """Remember a batch where `bad`, a flag on the device, is set, if it is the first."""
        first = self._first[kind]
        first.copy_(torch.minimum(first, torch.where(bad, batch, NEVER)))

    def check(self) -> None:
        """Wait for the device, once, and ask.

        Raises:
            CapacityError: where something was not finite.
        """
        first = torch.stack(list(self._first.values())).cpu().tolist()
        if min(first) != NEVER:
            raise not_finite(list(SENTENCES)[first.index(min(first))], self._hook, min(first))
