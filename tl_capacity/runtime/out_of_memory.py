"""One sentence for a device that runs out of memory, with the option that helps."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from tl_capacity.errors import DeviceFullError

MPS_FULL = "MPS backend out of memory"
"""What PyTorch says of a full MPS device, in a RuntimeError without a class of its own."""


@contextmanager
def within_device_memory(what: str, help: str) -> Iterator[None]:
    """Turn a device's lack of memory into one sentence. Memory that the failed call held is freed, so that a notebook
    can continue.

    Args:
        what: the work that does not fit, such as "a step of 8 rows".
        help: what the user can do about it.

    Raises:
        DeviceFullError: where the device's memory is full.
    """
    import torch

    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and MPS_FULL not in str(problem):
            raise
        asked = re.search(r"[Tt]ried to allocate (?:about )?([\d.]+ \w+)", str(problem))
        needed = f", where {asked[1]} more were asked for" if asked else ""
        traceback.clear_frames(problem.__traceback__)
        raise DeviceFullError(f"{what} does not fit into the memory of the device{needed}: {help}") from None
