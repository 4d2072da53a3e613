"""Written: what a dictionary wrote for the tokens whose reconstruction is checked, and what it should have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_capacity.measure.layout import Layout


@dataclass(frozen=True)
class Written:
    """What was written for some tokens.

    Attributes:
        reconstruction: [token, width].
        groups: int64 [token] document groups.
        layout: where the tokens are, if that was laid out for a device.
    """

    reconstruction: Tensor
    groups: Tensor
    layout: Layout | None = None

    @property
    def known_groups(self) -> Tensor | None:
        """The document groups on the host, if it has them."""
        return None if self.layout is None else self.layout.checked_groups


def joined_writing(written: Sequence[Written]) -> Written:
    """What was written for all tokens of some parts, at least one."""
    if len(written) == 1:
        return written[0]
    return Written(
        torch.cat([part.reconstruction for part in written]), torch.cat([part.groups for part in written]), None
    )
