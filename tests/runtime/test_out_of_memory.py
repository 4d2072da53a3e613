"""A full device ends in one sentence, and what was on it is freed."""

from __future__ import annotations

import weakref

import pytest
import torch

from tl_capacity.errors import DeviceFullError
from tl_capacity.runtime.out_of_memory import within_device_memory

SAID = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is free."
    " Including non-PyTorch memory, this process has 78.08 GiB memory in use."
)


def full(held: torch.Tensor, said: str = SAID) -> None:
    raise torch.OutOfMemoryError(said)


def test_one_sentence_with_what_helps() -> None:
    with (
        pytest.raises(
            DeviceFullError,
            match=r"^a step of 8 rows does not fit into the memory of the device, where 2.50 GiB more were asked for:"
            r" choose a smaller --batch-rows$",
        ),
        within_device_memory("a step of 8 rows", "choose a smaller --batch-rows"),
    ):
        full(torch.zeros(1))
    with (
        pytest.raises(DeviceFullError, match=r"^this does not fit into the memory of the device: try less$"),
        within_device_memory("this", "try less"),
    ):
        full(torch.zeros(1), "no room")


def test_what_was_held_is_free() -> None:
    def work() -> None:
        held = torch.zeros(1)
        freed.append(weakref.ref(held))
        full(held)

    freed: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(DeviceFullError) as said, within_device_memory("this", "try less"):
        work()
    assert freed[0]() is None, said
    assert said.value.__suppress_context__


def test_other_faults_pass() -> None:
    with pytest.raises(ZeroDivisionError), within_device_memory("this", "try less"):
        _ = 1 / 0


def test_a_full_device(device: str) -> None:
    """More than any device has."""
    if device == "cpu":
        pytest.skip("the CPU's memory is the operating system's")
    with pytest.raises(DeviceFullError, match="of the device"), within_device_memory("this", "try less"):
        torch.empty(2**46, device=device)
