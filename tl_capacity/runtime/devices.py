"""Devices: which one to use, and where to compute in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.errors import CapacityError
from tl_capacity.runtime.hub import reason_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AUTO = "auto"
DEVICE_HELP = "auto (the first available of cuda, mps and cpu), or one of these."
WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices without float64."""


def device_named(device: str) -> str:
    """The device that a name means. `auto` means CUDA if there is one, else MPS, else the CPU.

    Raises:
        CapacityError: where it cannot be used.
    """
    import torch

    if device == AUTO:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return next(name for name, available in there.items() if available)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise CapacityError(
            f"the device {device!r} cannot be used ({reason_of(problem)}): pass auto, cpu, or a device that torch"
            " reports"
        ) from problem
    return device


def exact_device(device: torch.device) -> torch.device:
    """Where to keep sums in float64 of a device's tensors: on it, or on the CPU if it has no float64."""
    import torch

    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def exact(values: Tensor) -> Tensor:
    """Values in float64, on their `exact_device`."""
    return values.to(exact_device(values.device)).double()


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes while the host continues, and can sum in float64."""
    return device.type != "cpu" and device.type not in WITHOUT_FLOAT64


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host copied to a device without waiting; for CUDA, from pinned memory. For MPS it is waited for,
    because PyTorch before 2.13 may free the memory that it still copies from (pytorch/pytorch#139550).
    """
    import torch

    device = torch.device(device)
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=device.type != "mps")
