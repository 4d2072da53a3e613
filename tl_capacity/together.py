"""Measuring on several processes, as `accelerate launch -m tl_capacity measure …` or `torchrun` starts them: each reads its share of the documents, and one
all-reduce at the end adds up what they saw.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import torch

from tl_capacity.errors import MeasurementError
from tl_capacity.measurement import Measurement, Provenance
from tl_capacity.measuring import MeasureSettings, finished, measure


def measure_together(settings: MeasureSettings) -> Measurement:
    """Measure, alone or together with the other processes of a launch; the first of them writes the result.

    Raises:
        CapacityError: on anything that the user can mend; what was saved before stays.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return measure(settings)
    earlier = finished(settings)
    if earlier is not None:
        return earlier
    from accelerate import PartialState

    state = PartialState(cpu=settings.device == "cpu")
    own = share(settings, state.process_index, state.num_processes)
    joined = add_up(measure(own), settings.shard, state)
    if state.is_main_process:
        joined.save(settings.out)
    state.wait_for_everyone()
    shutil.rmtree(own.out)
    return joined


def is_first() -> bool:
    """Whether this process is the one that speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def share(settings: MeasureSettings, process: int, processes: int) -> MeasureSettings:
    """What one of the processes measures: every n-th of the documents, its part of the tokens, with checkpoints in a folder of its own beside `out`."""
    index, of = settings.shard
    return replace(
        settings,
        shard=(index + of * process, of * processes),
        tokens=-(-settings.tokens // processes),
        out=settings.out.with_name(f"{settings.out.name}.process-{process}-of-{processes}"),
        progress=settings.progress and process == 0,
    )


def add_up(mine: Measurement, shard: tuple[int, int], state: Any) -> Measurement:
    """The sums of all processes: one all-reduce of each array, exact for counts.

    Raises:
        MeasurementError: where the processes measured other models, SAEs or settings.
    """
    provenances: list[Provenance] = [mine.provenance] * state.num_processes
    torch.distributed.all_gather_object(provenances, mine.provenance)
    measured: list[Any] = [None] * state.num_processes
    torch.distributed.all_gather_object(measured, [(h.hook, h.sae_digest, h.estimators) for h in mine])
    for other, hooks in zip(provenances, measured, strict=True):
        for name in ("model", "revision", "dtype", "source", "settings"):
            was, is_ = getattr(mine.provenance, name), getattr(other, name)
            if was != is_:
                raise MeasurementError(f"the processes do not fit together: {name} is {was!r} in one and {is_!r} in another; start all with one command")
        if hooks != measured[0]:
            raise MeasurementError("the processes do not fit together: they have other hook points, SAE weights or estimators; start all with one command")
    hooks = []
    for hook in mine:
        arrays = {name: array if name == "decoder_norm" else _sum(array, state.device) for name, array in hook.summary.arrays.items()}
        hooks.append(replace(hook, summary=replace(hook.summary, arrays=arrays)))
    joined = replace(
        mine.provenance,
        shards=(shard[0],),
        shard_count=shard[1],
        cursor=sum(p.cursor for p in provenances),
        tokens_digest="",
        seconds=max(p.seconds for p in provenances),
    )
    return Measurement(tuple(hooks), joined)


def _sum(array: Any, device: torch.device) -> Any:
    total = torch.from_numpy(array.copy()).to(device)
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()
