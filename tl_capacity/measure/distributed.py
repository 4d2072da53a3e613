"""Measuring on several processes, as `accelerate launch -m tl_capacity measure …` or `torchrun` starts them: each reads
its share of the documents, and one all-reduce at the end adds up what they saw.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import torch

from tl_capacity.errors import MeasurementError
from tl_capacity.measure.job import finished, measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.runtime.processes import Processes


def measure_together(settings: MeasureSettings) -> Measurement:
    """Measure, alone or together with the other processes of a launch; the first of them writes the result.

    Raises:
        CapacityError: on anything that the user can mend; what was saved before stays.
    """
    if Processes.of_launch().count == 1:
        return measure(settings)
    earlier = finished(settings)
    if earlier is not None:
        return earlier
    processes = Processes.of_launch().connected(settings.device)
    part = share(settings, processes)
    joined = add_up(measure(part), settings.shard, processes)
    if processes.first:
        joined.save(settings.out)
    processes.wait()
    shutil.rmtree(part.out)
    return joined


def share(settings: MeasureSettings, processes: Processes) -> MeasureSettings:
    """What this process measures: every n-th of the documents, its part of the tokens, with checkpoints in a folder of
    its own beside `out`.
    """
    index, of = settings.shard
    return replace(
        settings,
        shard=(index + of * processes.index, of * processes.count),
        tokens=-(-settings.tokens // processes.count),
        out=processes.own(settings.out),
        progress=settings.progress and processes.first,
    )


def add_up(mine: Measurement, shard: tuple[int, int], processes: Processes) -> Measurement:
    """The sums of all processes: one all-reduce of each array, exact for counts.

    Raises:
        MeasurementError: where the processes measured other models, SAEs or settings.
    """
    provenances = processes.gather(mine.provenance)
    measured = processes.gather([(h.hook, h.sae_digest, h.estimators) for h in mine])
    for other, theirs in zip(provenances, measured, strict=True):
        odd = mine.provenance.difference(other, may_differ=("shards", "shard_count"))
        if odd is not None:
            raise MeasurementError(
                f"the processes do not fit together: {odd.name} is {odd.mine!r} in one and {odd.theirs!r} in another;"
                " start all with one command"
            )
        if theirs != measured[0]:
            raise MeasurementError(
                "the processes do not fit together: they have other hook points, SAE weights or estimators; start all"
                " with one command"
            )
    hooks = []
    for hook in mine:
        arrays = {
            name: array if name == "decoder_norm" else processes.sum(torch.from_numpy(array.copy())).numpy()
            for name, array in hook.summary.arrays.items()
        }
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
