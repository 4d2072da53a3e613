"""Products of float32 matrices in lower precision, for devices on which that is much faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROUNDED = {"cpu": "bf16", "cuda": "tf32"}
"""What the inputs of products are rounded to, by kind of device."""


def beneath_autocast(device: torch.device) -> bool:
    """Whether autocast lowers the precision of a device's products here."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Inside the block, products of float32 matrices round their inputs, to bfloat16 on a CPU and to TF32 on CUDA. They
    still add up in float32, and their results are not rounded.

    PyTorch before 2.9 computes as outside. So do processors on which rounding would not be faster; oneDNN, which
    computes the products, needs AMX on x86. With PyTorch 2.11 it was seen to round some shapes there and not others.
    """
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    products: Any = getattr(backends.get(device.type), "matmul", None)
    if not hasattr(products, "fp32_precision"):
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = ROUNDED[device.type]
    try:
        yield
    finally:
        products.fp32_precision = before
