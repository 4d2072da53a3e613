"""A model whose blocks are spread over several processes (FSDP). Each process holds a part of every block, and a
forward pass gathers one block at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from tl_capacity.errors import CapacityError
from tl_capacity.plugins import plugins


def spread_blocks(model: Any, device: torch.device, processes: int) -> None:
    """Leave this process a part of every block. Embeddings and head stay whole. Of weights mapped from a file, only the
    kept part is read.

    Raises:
        CapacityError: where there is one process, or no family says where the blocks are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if processes == 1:
        raise CapacityError(
            "a single process has nobody to share the teacher with: start several with accelerate launch, or do not "
            "shard the teacher"
        )
    family = plugins().family_of(model.config.model_type)
    if family is None:
        raise CapacityError(
            f"no model family says where {model.config.model_type!r} has its blocks: register a family "
            "(docs/families.md), or do not shard the teacher"
        )
    mesh = init_device_mesh(device.type, (processes,))
    for block in model.get_submodule(family.blocks):
        # By default a module with none around it keeps what it gathered: the model would be whole after one pass.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(device)


def is_spread(model: Any) -> bool:
    """Whether a process holds only a part of a model."""
    return isinstance(model, nn.Module) and bool(Pace(model).together)


class Pace:
    """Keeps processes in step that hold parts of one model. Each must run as many forward passes as the others, since
    every pass gathers its blocks from all. With a whole model it does nothing.

    Attributes:
        together: whether there are such processes.
    """

    def __init__(self, model: nn.Module) -> None:
        # What nobody has imported shards no model.
        sharded = getattr(distributed, "fsdp", None)
        self._spread = [m for m in model.modules() if sharded is not None and isinstance(m, sharded.FSDPModule)]
        meshes = (getattr(parameter, "device_mesh", None) for parameter in model.parameters())
        self._mesh: Any = next((mesh for mesh in meshes if mesh is not None), None) if self._spread else None
        self.together = bool(self._spread)

    def step(self) -> None:
        """Announce that this process runs a pass."""
        self._one_runs(True)

    def another_runs(self) -> bool:
        """Announce that this process has no pass left. Returns whether another process has."""
        return self._one_runs(False)

    def release(self) -> None:
        """Free the parts of other processes that a pass gathered before it ended early."""
        for module in self._spread:
            module.reshard()

    def _one_runs(self, mine: bool) -> bool:
        if self._mesh is None:
            return False
        runs: Tensor = torch.tensor(int(mine), device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            distributed.all_reduce(runs, distributed.ReduceOp.MAX, group=self._mesh.get_group(dimension))
        return bool(runs)
