"""Devices: which one is meant, and where figures in float64 are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.errors import CapacityError
from tl_capacity.runtime.hub import reason_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AUTO = "auto"
DEVICE_HELP = "auto (the first of cuda, mps and cpu that there is), or one of these."
WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices that have no float64."""


def device_named(device: str) -> str:
    """The device that is meant: for `auto` CUDA where there is one, else MPS, else the CPU.

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
    """Where sums in float64 over tensors of a device are kept: there, or on the CPU where the device has no float64."""
    import torch

    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def exact(values: Tensor) -> Tensor:
    """Values in float64, on their `exact_device`."""
    return values.to(exact_device(values.device)).double()


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes while the host goes on, and sums in float64."""
    return device.type != "cpu" and device.type not in WITHOUT_FLOAT64


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, which nobody waits for: from pinned memory where CUDA copies."""
    import torch

    device = torch.device(device)
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
