"""Processes that cannot work together are told so before they wait for each other."""

from __future__ import annotations

import pytest
import torch
from torch import distributed

from tl_capacity import CapacityError
from tl_capacity.runtime.processes import Processes, check_gpus, check_kinds


def test_a_mixed_set_of_devices() -> None:
    store = distributed.HashStore()
    store.set("tl_capacity/device/1", "cuda")
    with pytest.raises(CapacityError, match="a mixed set of devices, cpu in process 0 and cuda in process 1"):
        check_kinds(store, "cpu", Processes(0, 2))
    check_kinds(store, "cuda", Processes(0, 2))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(CapacityError, match="of this machine has no GPU, as there are"):
        check_gpus("cuda")
    check_gpus("cpu")


def test_another_process_that_cannot_be_reached() -> None:
    with pytest.raises(CapacityError, match="another process of this launch has ended or cannot be reached"):
        Processes(0, 2).sum(torch.zeros(1))
