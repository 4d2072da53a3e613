"""Measuring on several processes, started by `accelerate launch -m tl_capacity measure …` or `torchrun`. Each reads its
share of the documents, and one all-reduce at the end adds up the sums.

A launch that lost a process goes on with as many as there are: what the others have counted, and which documents that
was, is gathered up, and the rest is divided anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from numpy.typing import NDArray

from tl_capacity.dictionaries.adapter import dictionary_digest
from tl_capacity.errors import MeasurementError, NothingCountedError
from tl_capacity.measure.job import attached, check_settings, count, earlier_in, finished, measure
from tl_capacity.measure.launches import Earlier, Left, clear, gather_up, leave_out, left_behind
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.folder import write_folder
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.results.sums import merge_sums
from tl_capacity.runtime.logs import log
from tl_capacity.runtime.processes import Processes, of_process
from tl_capacity.storage.digests import digest
from tl_capacity.text.shares import Share
from tl_capacity.text.streams import TokenStream, documents

COMPARED_DOCUMENTS = 64
"""Documents at the beginning of the text that must be the same for all processes."""


def measure_together(settings: MeasureSettings) -> Measurement:
    """Measure alone, or together with the other processes of a launch. The first process writes the result.

    Raises:
        CapacityError: on anything that the user can mend; what was saved before stays.
    """
    launch, behind = Processes.of_launch(), left_behind(settings.out)
    if launch.count == 1 and not behind:
        return measure(settings)
    ended = finished(settings)
    if ended is not None:
        if launch.first:
            clear(settings.out)
        return ended
    for folder in behind:
        earlier_in(folder, settings.resume)  # refuses what is not to be gone on with
    processes = launch.connected(settings.device)
    _check_command(settings, processes)
    earlier = gather_up(settings, processes.count) if processes.first else Earlier()
    left = processes.of_first(earlier.left)
    mine = share(settings, processes, left)
    with attached(mine) as (capacity, stream):
        _check_alike(capacity, stream, processes)
        if earlier.measurement is not None:
            check_settings(earlier.measurement, capacity, stream)
        counted = _counted(capacity, stream, mine, left, left.tokens < settings.tokens)
        if earlier.measurement is not None:
            counted = counted.plus(_Counted.of(earlier.measurement))
        joined = _added_up(counted, capacity, processes)
    index, of = settings.shard
    joined = replace(joined, provenance=replace(joined.provenance, shards=(index,), shard_count=of))
    if processes.first:
        joined.save(settings.out)
    processes.wait()
    if processes.first:
        clear(settings.out)
    return joined


def share(settings: MeasureSettings, processes: Processes, left: Left | None = None) -> MeasureSettings:
    """The settings of this process: every n-th of the remaining documents, its part of the tokens, and checkpoints in
    its own folder beside `out`.
    """
    index, of = settings.shard
    left = left or Left()
    mine = replace(
        settings,
        tokens=max(1, -(-(settings.tokens - left.tokens) // processes.count)),
        out=of_process(settings.out, processes.index, processes.count),
        progress=settings.progress and processes.first,
    )
    if left.launches:
        return replace(mine, share=Share(processes.index, processes.count, left.launches))
    return replace(mine, shard=(index + of * processes.index, of * processes.count))


@dataclass(frozen=True)
class _Counted:
    """What one process has counted.

    Attributes:
        sums: for each tap.
        provenance: of them.
        remarks: for each tap, its notes and whether its SAE is linear.
    """

    sums: Sequence[dict[str, NDArray[Any]]]
    provenance: Provenance
    remarks: Sequence[tuple[tuple[str, ...], bool | None]]

    @classmethod
    def of(cls, measurement: Measurement) -> _Counted:
        """What a measurement has counted."""
        return cls(
            [dict(hook.summary.arrays) for hook in measurement],
            measurement.provenance,
            [(hook.notes, hook.linear) for hook in measurement],
        )

    def plus(self, other: _Counted) -> _Counted:
        """The sums of both, and the remarks on either."""
        sums = [merge_sums(mine, theirs) for mine, theirs in zip(self.sums, other.sums, strict=True)]
        cursor, seconds = (
            getattr(self.provenance, name) + getattr(other.provenance, name) for name in ("cursor", "seconds")
        )
        return _Counted(
            sums,
            replace(self.provenance, cursor=cursor, seconds=seconds),
            [_both(*remarks) for remarks in zip(self.remarks, other.remarks, strict=True)],
        )


def _both(*remarks: tuple[tuple[str, ...], bool | None]) -> tuple[tuple[str, ...], bool | None]:
    """The notes of all, and whether the SAE is linear, as the first process that knows it says."""
    notes = dict.fromkeys(note for notes, _ in remarks for note in notes)
    return tuple(notes), next((linear for _, linear in remarks if linear is not None), None)


def _added_up(counted: _Counted, capacity: CapacityHooks, processes: Processes) -> Measurement:
    """The sums of all processes by one all-reduce of each array; exact for counts.

    Raises:
        NothingCountedError: where no process has counted a token.
    """
    everywhere = processes.gather((counted.provenance, counted.remarks))
    total = [
        {
            name: array if name == "decoder_norm" else processes.sum(torch.from_numpy(array.copy())).numpy()
            for name, array in sums.items()
        }
        for sums in counted.sums
    ]
    joined = capacity.measurement_of(total)
    hooks = []
    for tap, hook in enumerate(joined):
        notes, linear = _both(*(remarks[tap] for _, remarks in everywhere))
        hooks.append(replace(hook, notes=notes, linear=linear))
    provenance = replace(
        joined.provenance,
        cursor=sum(provenance.cursor for provenance, _ in everywhere),
        tokens_digest="",
        seconds=max(provenance.seconds for provenance, _ in everywhere),
        settings={name: value for name, value in joined.provenance.settings.items() if name != "launches"},
    )
    return Measurement(tuple(hooks), provenance)


def _counted(capacity: CapacityHooks, stream: TokenStream, mine: MeasureSettings, left: Left, more: bool) -> _Counted:
    """What this process counts of its share, which may be empty. It stays in the process's folder until all have ended.

    Args:
        more: whether more tokens are wanted than earlier launches have counted.
    """
    there = earlier_in(mine.out, mine.resume)
    if there is not None:
        check_settings(there[0], capacity, stream)
        if there[0].complete:
            capacity.keep_step()
            return _Counted.of(there[0])
        capacity.resume(*there)
    leave_out(capacity, stream, left)
    if more:
        try:
            count(capacity, stream, mine)
        except NothingCountedError:
            log.warning(f"no token is left for this process ({mine.out}), so it adds nothing")
        else:
            measurement, extra = capacity.measurement(), capacity.checkpoint()[1]
            write_folder(mine.out, measurement.to_json(), measurement.arrays() | extra)
            return _Counted.of(measurement)
    else:
        capacity.keep_step()
    planned = replace(capacity.planned_provenance(stream), cursor=0, seconds=0.0)
    return _Counted(capacity.sums(), planned, [(tap.notes, tap.linear) for tap in capacity.taps])


def _check_command(settings: MeasureSettings, processes: Processes) -> None:
    """Refuse processes that were started with different settings.

    Raises:
        MeasurementError: where they were.
    """
    asked = processes.gather(asdict(settings))
    for other in asked:
        for name, value in other.items():
            if value != asked[0][name]:
                raise _odd(name, asked[0][name], value)


def _check_alike(capacity: CapacityHooks, stream: TokenStream, processes: Processes) -> None:
    """Before anything is counted, refuse processes with different models, SAEs or texts under the same names.

    Raises:
        MeasurementError: where they have.
    """
    mine = capacity.planned_provenance(stream)
    tapped = [(t.hook, dictionary_digest(t.sae), [e.name for e in t.estimators]) for t in capacity.taps]
    begins = _beginning(stream, processes)
    for provenance, others_tapped, text in processes.gather((mine, tapped, begins)):
        odd = mine.difference(provenance, may_differ=("shards", "shard_count"))
        if odd is not None:
            raise _odd(odd.name, odd.mine, odd.theirs)
        if others_tapped != tapped:
            raise _odd("hook points, SAE weights and estimators", tapped, others_tapped)
        if text != begins:
            raise MeasurementError(
                f"the processes do not fit together: {stream.name()} begins differently on different machines; copy "
                "the same text to all"
            )


def _beginning(stream: TokenStream, processes: Processes) -> str:
    """A digest of the first documents of a text."""
    if processes.count == 1 or not isinstance(stream.source, str):
        return ""
    return digest("\0".join(islice(documents(stream.source), COMPARED_DOCUMENTS)).encode("utf-8", "replace"))


def _odd(name: str, mine: Any, theirs: Any) -> MeasurementError:
    return MeasurementError(
        f"the processes do not fit together: {name} is {mine!r} in one and {theirs!r} in another; start all with the "
        "same command"
    )
