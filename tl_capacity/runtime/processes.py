"""The processes of one launch, as `accelerate launch` or `torchrun` starts them: which one this is, what its share is,
and sums and lists over all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from tl_capacity.errors import CapacityError
from tl_capacity.runtime.devices import device_named
from tl_capacity.runtime.hub import reason_of
from tl_capacity.runtime.paths import beside

Item = TypeVar("Item")
Found = TypeVar("Found")
CONNECTING = timedelta(minutes=15)
"""How long a process waits for the others at the start."""
TOGETHER_BYTES = 2**22
"""Larger tensors are sent alone, because copying them together would cost more than a message."""
WAITING = timedelta(days=1)
"""How long a process waits at the end for others with longer documents. A process that died is noticed at once."""


def is_first() -> bool:
    """Whether this process is the first, which reports for all. Works before they are connected."""
    return Processes.of_launch().first


def of_process(path: Path, index: int, count: int) -> Path:
    """A place beside `path` where one of several processes keeps its files."""
    return beside(path, f"process-{index}-of-{count}")


@dataclass(frozen=True)
class Processes:
    """This process and the others of its launch. All must ask for the same sums and lists in the same order. A process
    by itself answers at once.

    Attributes:
        index: of this process.
        count: of all.
        device: where tensors are sent from.
    """

    index: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of_launch(cls) -> Processes:
        """The processes that were started together with this one, not connected yet. A process can then refuse its
        input before the others wait for it.
        """
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def connected(self, device: str = "cpu") -> Processes:
        """The same, connected and able to add up.

        Args:
            device: where they compute; each takes a GPU of its own for "cuda".

        Raises:
            CapacityError: where they compute on different kinds of devices, a machine has fewer GPUs than processes, or
                one of them cannot be reached.
        """
        if self.count == 1:
            return self
        from accelerate import PartialState

        kind = device_named(device).partition(":")[0]
        check_gpus(kind)
        with _others_needed():
            if not distributed.is_initialized():
                store, *_ = next(rendezvous("env://", timeout=CONNECTING))
                check_kinds(store, kind, self)
                if kind == "cuda":
                    torch.cuda.set_device(_local_index())
                distributed.init_process_group(
                    "nccl" if kind == "cuda" else "gloo",
                    store=store,
                    rank=self.index,
                    world_size=self.count,
                    timeout=WAITING,
                )
            state = PartialState(cpu=kind != "cuda")  # on MPS nothing adds up over processes
        return Processes(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        """Whether this process is the first, which reports for all."""
        return self.index == 0

    def own(self, path: Path) -> Path:
        """A place beside `path` where this process keeps its files; `path` itself if it is alone."""
        return path if self.count == 1 else of_process(path, self.index, self.count)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this process takes: every n-th."""
        return items[self.index :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, exact for whole numbers, on the device of `tensor`. `tensor`
        may be overwritten.
        """
        if self.count == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        with _others_needed():
            distributed.all_reduce(sent)
        return sent.to(tensor.device)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all processes, on its device. Small ones of one type are sent together. They may
        be overwritten.
        """
        if self.count == 1:
            return list(tensors)
        summed = dict[int, Tensor]()
        together = defaultdict[torch.dtype, list[int]](list)
        for place, tensor in enumerate(tensors):
            if tensor.nbytes > TOGETHER_BYTES:
                summed[place] = self.sum(tensor)
            else:
                together[tensor.dtype].append(place)
        for places in together.values():
            flat = self.sum(torch.cat([tensors[place].flatten() for place in places]))
            pieces = flat.split([tensors[place].numel() for place in places])
            for place, piece in zip(places, pieces, strict=True):
                summed[place] = piece.view(tensors[place].shape).to(tensors[place].device)
        return [summed[place] for place in range(len(tensors))]

    def gather(self, mine: Item) -> list[Item]:
        """What each process has, in their order."""
        gathered = [mine] * self.count
        if self.count > 1:
            with _others_needed():
                distributed.all_gather_object(gathered, mine)
        return gathered

    def of_first(self, mine: Item) -> Item:
        """What the first process has, known to all."""
        held = [mine]
        if self.count > 1:
            with _others_needed():
                distributed.broadcast_object_list(held)
        return held[0]

    def map(self, function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`function` of each item, in order. Each is computed in one process and known to all."""
        gathered: list[list[Any]] = self.gather([function(item) for item in self.share(items)])
        return [gathered[number % self.count][number // self.count] for number in range(len(items))]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            with _others_needed():
                distributed.barrier()


@contextmanager
def _others_needed() -> Iterator[None]:
    """Turn the loss of another process into one sentence."""
    try:
        yield
    except CapacityError:
        raise
    except (RuntimeError, ValueError) as problem:
        raise CapacityError(
            f"another process of this launch has ended or cannot be reached ({reason_of(problem)}): what was saved"
            " stays, start again with --resume"
        ) from problem


def check_kinds(store: Any, kind: str, processes: Processes) -> None:
    """Refuse processes on different kinds of devices, which would wait for each other forever.

    Raises:
        CapacityError: where there are such.
    """
    store.set(f"tl_capacity/device/{processes.index}", kind)
    kinds = {index: store.get(f"tl_capacity/device/{index}").decode() for index in range(processes.count)}
    if others := {index: other for index, other in kinds.items() if other != kind}:
        index, other = next(iter(others.items()))
        raise CapacityError(
            f"the processes compute on a mixed set of devices, {kind} in process {processes.index} and {other} in "
            f"process {index}: pass to all the same --device, one that all machines have"
        )


def check_gpus(kind: str) -> None:
    """Refuse more processes on a machine than it has GPUs.

    Raises:
        CapacityError: where there are.
    """
    if kind == "cuda" and _local_index() >= torch.cuda.device_count():
        raise CapacityError(
            f"process {_local_index()} of this machine has no GPU, as there are {torch.cuda.device_count()}: start as"
            " many processes on it as it has GPUs"
        )


def _local_index() -> int:
    """The index of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


ALONE = Processes()
