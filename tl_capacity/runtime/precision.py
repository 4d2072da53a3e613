"""Products of float32 matrices in lower precision, for devices on which that is much faster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDED = {"cpu": "bf16", "cuda": "tf32"}
"""What the inputs of products are rounded to, by kind of device."""

_SETTING = threading.Lock()
_INSIDE: dict[str, tuple[int, str]] = {}
"""How many blocks round the products of a kind of device now, and its setting before the first of them."""


def beneath_autocast(device: torch.device) -> bool:
    """Whether autocast lowers the precision of a device's products here."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def nearly_exact_product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """A product of float32 matrices; on CUDA several times as fast, of inputs rounded to TF32.

    They are rounded to the nearest here, as the device may cut off what it does not use, which would make every product
    smaller. So errors go either way, up to 2^-11 of each input, and what is squared and added up hardly changes.
    """
    if left.device.type != "cuda" or left.dtype != torch.float32:
        return left @ right
    with rounded_products(left.device):
        return rounded_to_tf32(left) @ rounded_to_tf32(right)


def rounded_to_tf32(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Values of float32 rounded to the nearest of TF32, which has ten bits after the first; of two, away from zero. NaN
    and infinite values stay.
    """
    bits = (values.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)
    return torch.where(values.isfinite(), bits.view(torch.float32), values)


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Inside the block, products of float32 matrices round their inputs, to bfloat16 on a CPU and to TF32 on CUDA. They
    still add up in float32, and their results are not rounded.

    PyTorch before 2.9 computes as outside. So do processors on which rounding would not be faster; oneDNN, which
    computes the products, needs AMX on x86. With PyTorch 2.11 it was seen to round some shapes there and not others.

    PyTorch has one setting for a whole process. Of several threads, the last to leave restores it, and what others
    multiply meanwhile is rounded too.
    """
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    products: Any = getattr(backends.get(device.type), "matmul", None)
    if not hasattr(products, "fp32_precision"):
        yield
        return
    with _SETTING:
        inside, before = _INSIDE.get(device.type, (0, products.fp32_precision))
        _INSIDE[device.type] = inside + 1, before
        products.fp32_precision = ROUNDED[device.type]
    try:
        yield
    finally:
        with _SETTING:
            inside, before = _INSIDE.pop(device.type)
            if inside > 1:
                _INSIDE[device.type] = inside - 1, before
            else:
                products.fp32_precision = before
