"""Processes of a distillation: Accelerate's handle of this process, and its trackers."""

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


def new_accelerator(
    model: Any, settings: DistillSettings, shard_teacher: bool, trackers: Sequence[Any], folder: Path | None
) -> Any:
    """Accelerate's handle of this process, which runs alone or is one of several that `accelerate launch` started."""
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
            f"mixed_precision = {settings.mixed_precision!r} is not possible in this process, which began with"
            " another: start a new process"
        ) from problem
    device = own_device(model, accelerator)
    if device.type != accelerator.device.type and settings.mixed_precision != "no":
        raise CapacityError(
            f"mixed_precision = {settings.mixed_precision!r} is not possible on {device.type} in this process, which"
            f" began on {accelerator.device.type}: start a new process"
        )
    if trackers:
        accelerator.init_trackers("tl-capacity", config={name: str(value) for name, value in asdict(settings).items()})
    return accelerator


def own_device(model: Any, accelerator: Any) -> torch.device:
    """The device of this process.

    A process that runs alone computes where its model is, as Accelerate stays where the process began. One of several
    computes on the device that Accelerate gave it.
    """
    device: torch.device = accelerator.device if accelerator.num_processes > 1 else device_of(model)
    return device
