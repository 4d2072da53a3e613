"""The processes of one launch, as `accelerate launch` or `torchrun` starts them: which of them this is, what its share
is, and sums and lists over all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from tl_capacity.runtime.devices import device_named

Item = TypeVar("Item")
Found = TypeVar("Found")


def is_first() -> bool:
    """Whether this process is the one that speaks for all; also before they are connected."""
    return Processes.of_launch().first


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch. All must ask for the same sums and lists in the same order; a process by
    itself answers at once.

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
        """Those that were started together with this one, not connected yet: what any of them refuses by itself is
        refused before.
        """
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def connected(self, device: str = "cpu") -> Processes:
        """The same, able to add up.

        Args:
            device: where they compute; each takes a GPU of its own for "cuda".
        """
        if self.count == 1:
            return self
        from accelerate import PartialState

        state = PartialState(cpu=device_named(device) == "cpu")
        return Processes(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks for all."""
        return self.index == 0

    def own(self, path: Path) -> Path:
        """A place beside `path` for what this process keeps; by itself it keeps it at `path`."""
        return path if self.count == 1 else path.with_name(f"{path.name}.process-{self.index}-of-{self.count}")

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What of some items this process takes: every n-th."""
        return items[self.index :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, exact for whole numbers, where `tensor` is; it may be overwritten."""
        if self.count == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        distributed.all_reduce(sent)
        return sent.to(tensor.device)

    def gather(self, mine: Item) -> list[Item]:
        """What each process has, in their order."""
        gathered = [mine] * self.count
        if self.count > 1:
            distributed.all_gather_object(gathered, mine)
        return gathered

    def map(self, function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`function` of each item, in their order; each is computed in one process and known in all."""
        gathered: list[list[Any]] = self.gather([function(item) for item in self.share(items)])
        return [gathered[number % self.count][number // self.count] for number in range(len(items))]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            distributed.barrier()


ALONE = Processes()
