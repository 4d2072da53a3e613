"""The processes of a distillation: Accelerate's handle of this one, its trackers, and a teacher spread over all."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tl_capacity.distillation.settings import DistillSettings
from tl_capacity.errors import CapacityError
from tl_capacity.models.forward import device_of
from tl_capacity.plugins import plugins


def new_accelerator(
    model: Any, settings: DistillSettings, shard_teacher: bool, trackers: Sequence[Any], folder: Path | None
) -> Any:
    """Accelerate's handle of this process: alone, or one of several that `accelerate launch` started."""
    from accelerate import Accelerator
    from accelerate.state import is_initialized
    from accelerate.tracking import get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    if missing := [name for name in trackers if isinstance(name, str) and name not in installed]:
        raise CapacityError(
            f"the tracker {missing[0]!r} is not installed: install it, or choose one of"
            f" {', '.join(installed) or 'none'}"
        )
    waits_for_gpus = shard_teacher and torch.cuda.is_available()
    on_cpu = device_of(model).type == "cpu" and not waits_for_gpus
    try:
        accelerator = Accelerator(
            cpu=on_cpu and not is_initialized(),  # an earlier run of this process may have been on a GPU
            mixed_precision=settings.mixed_precision,
            log_with=list(trackers) or None,
            project_dir=folder or tempfile.gettempdir(),
        )
    except ValueError as problem:
        raise CapacityError(
            f"mixed_precision = {settings.mixed_precision!r} cannot be had in this process, which began with another:"
            " start a new process"
        ) from problem
    device = own_device(model, accelerator)
    if device.type != accelerator.device.type and settings.mixed_precision != "no":
        raise CapacityError(
            f"mixed_precision = {settings.mixed_precision!r} cannot be had on {device.type} in this process, which"
            f" began on {accelerator.device.type}: start a new process"
        )
    if trackers:
        accelerator.init_trackers("tl-capacity", config={name: str(value) for name, value in asdict(settings).items()})
    return accelerator


def own_device(model: Any, accelerator: Any) -> torch.device:
    """Where this process computes: by itself where its model is, since Accelerate stays where the process began; among
    several on the device that Accelerate gave it.
    """
    device: torch.device = accelerator.device if accelerator.num_processes > 1 else device_of(model)
    return device


def shard(model: Any, accelerator: Any) -> None:
    """Leave each process a part of every block, which are gathered one at a time in a forward pass; embeddings and head
    stay whole.

    Raises:
        CapacityError: where there is one process, or no family says where the blocks are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    family = plugins().family_of(model.config.model_type)
    if accelerator.num_processes == 1:
        raise CapacityError(
            "one process has nobody to share the teacher with: start several with accelerate launch, or leave the"
            " teacher whole"
        )
    if family is None:
        raise CapacityError(
            f"no model family says where {model.config.model_type!r} has its blocks: register one (docs/families.md),"
            " or leave the teacher whole"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in model.get_submodule(family.blocks):
        fully_shard(block, mesh=mesh)
    model.to(accelerator.device)
