"""A model whose blocks are spread over several processes (FSDP): each holds a part of every block, and a forward pass
gathers one block at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from tl_capacity.errors import CapacityError
from tl_capacity.plugins import plugins


def spread_blocks(model: Any, device: torch.device, processes: int) -> None:
    """Leave this process a part of every block; embeddings and head stay whole. Weights that are mapped from a file are
    read as far as they are kept.

    Raises:
        CapacityError: where there is one process, or no family says where the blocks are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if processes == 1:
        raise CapacityError(
            "one process has nobody to share the teacher with: start several with accelerate launch, or leave the"
            " teacher whole"
        )
    family = plugins().family_of(model.config.model_type)
    if family is None:
        raise CapacityError(
            f"no model family says where {model.config.model_type!r} has its blocks: register one (docs/families.md),"
            " or leave the teacher whole"
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
    """Keeps processes in step that have parts of one model: each must run as many forward passes as the others, since
    every pass gathers its blocks from all. Of a model in one piece it does nothing.

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
        """Say that this process runs a pass."""
        self._one_runs(True)

    def another_runs(self) -> bool:
        """Say that this process has no pass to run any more; whether another has."""
        return self._one_runs(False)

    def release(self) -> None:
        """Give back the parts of others that a pass which was ended early has gathered."""
        for module in self._spread:
            module.reshard()

    def _one_runs(self, mine: bool) -> bool:
        if self._mesh is None:
            return False
        runs: Tensor = torch.tensor(int(mine), device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            distributed.all_reduce(runs, distributed.ReduceOp.MAX, group=self._mesh.get_group(dimension))
        return bool(runs)
