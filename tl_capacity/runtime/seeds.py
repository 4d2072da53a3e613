"""Random numbers that a seed decides, without changing the caller's random streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block, torch draws what the seed decides. Afterwards it continues as before, on the CPU and on every
    GPU.

    A GPU that this process has not used yet is not touched: seeding it would change what the caller draws there.
    """
    on_gpus = torch.cuda.is_initialized() or torch.get_default_device().type == "cuda"
    used = list(range(torch.cuda.device_count())) if on_gpus else []
    with torch.random.fork_rng(used):
        torch.default_generator.manual_seed(seed)
        if used:
            torch.cuda.manual_seed_all(seed)
        yield
