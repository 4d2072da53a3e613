"""Earlier launches: their processes left sums beside the folder of a measurement. The sums are gathered, so that any
number of processes can continue.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.job import earlier_in
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.measurement.folder import JSON_NAME, read_folder, remove_folder, write_folder
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.results.sums import merge_sums
from tl_capacity.runtime.logs import log
from tl_capacity.runtime.paths import beside, named
from tl_capacity.text.shares import Place, Share
from tl_capacity.text.streams import TokenStream

Launches = tuple[tuple[Place, ...], ...]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Left:
    """What a process must know of earlier launches to continue from them.

    Attributes:
        launches: of each, the places of its processes.
        tokens: counted so far.
        seen: of each document that was begun, and has a token that counts: for each tap, the features that it has shown
            so far, [feature].
    """

    launches: Launches = ()
    tokens: int = 0
    seen: Mapping[int, Sequence[NDArray[np.bool_]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Earlier:
    """Everything that earlier launches have counted; None and nothing if there were none."""

    measurement: Measurement | None = None
    left: Left = Left()


@dataclass(frozen=True)
class Part:
    """What one process of a launch has left on disk.

    Attributes:
        folder: where.
        index, count: the process, and how many there were.
        measurement: what it counted.
        extra: its open documents and its place.
    """

    folder: Path
    index: int
    count: int
    measurement: Measurement
    extra: Arrays

    @property
    def launches(self) -> Launches:
        """The launches before its own."""
        return launches_of(self.measurement.provenance)

    @property
    def place(self) -> Place:
        """How far it has come, counted in rows of whole documents."""
        document, rows = self.extra["resume/place"].tolist()
        return Share(self.index, self.count, self.launches).place(Place(document, rows))

    def open(self, tap: int) -> tuple[list[int], NDArray[np.bool_]]:
        """The documents that it was reading, and the features that they have shown it at a tap."""
        return self.extra[f"resume/{tap}/open_documents"].tolist(), self.extra[f"resume/{tap}/open_seen"]


def left_behind(out: Path) -> list[Path]:
    """The folders that launches have left beside a measurement."""
    whole = named(out)
    parts = whole.parent.glob(f"{escape(whole.name)}.process-*-of-*")
    there = [path for path in parts if (path / JSON_NAME).exists() and _numbers(path)]
    return sorted(there) + ([_gathered(out)] if (_gathered(out) / JSON_NAME).exists() else [])


def clear(out: Path) -> None:
    """Delete what launches have left beside a measurement, once the measurement is complete."""
    for folder in left_behind(out):
        shutil.rmtree(folder, ignore_errors=True)


def launches_of(provenance: Provenance) -> Launches:
    """The launches before the one that a provenance describes."""
    return Share.recorded(0, 1, provenance.settings.get("launches", ())).launches


def gather_up(settings: MeasureSettings, count: int) -> Earlier:
    """What earlier launches have counted, in one folder. If as many processes run now, the parts stay for them to
    continue. Otherwise the parts are added up, and the unread documents are divided anew.

    Raises:
        MeasurementError: where the parts do not fit together, or do not say how far they came.
    """
    earlier, parts = _read(settings.out), _parts(settings)
    live = []
    for part in parts:
        if part.launches == earlier.left.launches:
            live.append(part)
        elif part.launches == earlier.left.launches[: len(part.launches)]:
            _remove(part, settings.out)  # its sums are in those that were gathered
        else:
            raise MeasurementError(
                f"{part.folder} continues from {_gathered(settings.out)}, which was deleted or replaced: delete "
                "both, and start again"
            )
    counts = sorted({part.count for part in live})
    if len(counts) > 1:
        raise MeasurementError(
            f"{settings.out} has checkpoints of launches of {' and of '.join(map(str, counts))} processes, which may "
            "have counted the same documents: delete those of one launch"
        )
    if counts in ([], [count]) and not any(part.folder == settings.out for part in live):
        return earlier
    joined = added_up(earlier, live, settings.shard)
    assert joined.measurement is not None
    write_folder(
        _gathered(settings.out), joined.measurement.to_json(), joined.measurement.arrays() | _to_arrays(joined.left)
    )
    for part in live:
        _remove(part, settings.out)
    log.info(f"{count} processes continue from {joined.left.tokens:,} tokens of {counts[0]} processes")
    return joined


def leave_out(capacity: CapacityHooks, stream: TokenStream, left: Left) -> None:
    """From documents that earlier launches began, count only what those launches have not counted."""
    if begun := [document for document in stream.share.begun if document in left.seen]:
        by_tap = zip(*(left.seen[document] for document in begun), strict=True)
        capacity.leave_out(begun, [np.stack(flags) for flags in by_tap])


def added_up(earlier: Earlier, parts: Sequence[Part], shard: tuple[int, int]) -> Earlier:
    """The sums of a launch, added to those of the launches before it. Unfinished documents are counted. What they have
    shown is kept, so that a process that continues one counts only new features.

    Args:
        shard: of the whole launch.

    Raises:
        MeasurementError: where a part is of something else, or does not say how far it came.
    """
    first, before = parts[0], earlier.left
    places = [Place()] * first.count
    for part in parts:
        odd = first.measurement.provenance.difference(part.measurement.provenance, ("shards", "shard_count"))
        if odd is not None:
            raise MeasurementError(
                f"{first.folder} and {part.folder} do not fit together: {odd.name} is {odd.mine!r} in one and"
                f" {odd.theirs!r} in the other; delete one, and start again"
            )
        if "resume/place" not in part.extra:
            raise MeasurementError(
                f"{part.folder} was written by an earlier version and does not say which documents it has read: "
                f"continue with {first.count} processes, or delete it"
            )
        places[part.index] = part.place
    launches = (*before.launches, tuple(places))
    hooks, seen = [], {document: list(flags) for document, flags in before.seen.items()}
    for tap, hook in enumerate(first.measurement):
        sums = [_closed(part, tap, before) for part in parts]
        if earlier.measurement is not None:
            sums.append(dict(earlier.measurement.hooks[tap].summary.arrays))
        total = dict(sums[0])
        for more in sums[1:]:
            total = merge_sums(total, more)
        hooks.append(replace(hook, summary=replace(hook.summary, arrays=total)))
        for part in parts:
            for document, flags in zip(*part.open(tap), strict=True):
                known = seen.setdefault(document, [])
                if tap < len(known):
                    known[tap] = known[tap] | flags
                else:
                    known.append(flags)
    begun = Share(launches=launches).all_begun
    provenance = replace(
        first.measurement.provenance,
        shards=(shard[0],),
        shard_count=shard[1],
        cursor=sum(part.measurement.provenance.cursor for part in parts) + _cursor(earlier),
        tokens_digest="",
        settings={**first.measurement.provenance.settings, "launches": Share(launches=launches).to_json()},
        seconds=max(part.measurement.provenance.seconds for part in parts) + _seconds(earlier),
    )
    measurement = Measurement(tuple(hooks), provenance, complete=False)
    left = Left(launches, hooks[0].summary.n_tokens, {d: flags for d, flags in seen.items() if d in begun})
    return Earlier(measurement, left)


def _closed(part: Part, tap: int, before: Left) -> dict[str, NDArray[Any]]:
    """The sums of a part, with its unfinished documents counted."""
    arrays = dict(part.measurement.hooks[tap].summary.arrays)
    if part.measurement.complete:
        return arrays
    documents, seen = part.open(tap)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    statistics = FeatureStatistics.from_tensors(tensors)
    still_open = OpenDocuments(seen.shape[1], torch.device("cpu"), documents, seen)
    known = list(before.seen)
    if known:
        still_open.leave_out(known, np.stack([before.seen[document][tap] for document in known]))
    still_open.added_to(statistics)
    return {name: tensor.numpy() for name, tensor in statistics.tensors().items()}


def _parts(settings: MeasureSettings) -> list[Part]:
    """What the processes of launches have left, and what a single process outside any launch has left."""
    parts = []
    for folder in (settings.out, *left_behind(settings.out)):
        index, count = _numbers(folder) or (0, 1)
        there = earlier_in(folder, settings.resume) if folder != _gathered(settings.out) else None
        if there is not None and not (folder == settings.out and there[0].complete):
            parts.append(Part(folder, index, count, *there))
    return parts


def _read(out: Path) -> Earlier:
    """What was gathered before."""
    folder = _gathered(out)
    if not (folder / JSON_NAME).exists():
        return Earlier()
    measurement = Measurement.load(folder)
    arrays = read_folder(folder)[1]
    seen = {
        document: [arrays[f"begun/{tap}"][row] for tap in range(len(measurement.hooks))]
        for row, document in enumerate(arrays["begun/documents"].tolist())
    }
    left = Left(launches_of(measurement.provenance), measurement.hooks[0].summary.n_tokens, seen)
    return Earlier(measurement, left)


def _to_arrays(left: Left) -> dict[str, NDArray[Any]]:
    """What the unfinished documents have shown, as arrays to store."""
    arrays: dict[str, NDArray[Any]] = {"begun/documents": np.array(list(left.seen), dtype=np.int64)}
    for tap, flags in enumerate(zip(*left.seen.values(), strict=True)):
        arrays[f"begun/{tap}"] = np.stack(flags)
    return arrays


def _remove(part: Part, out: Path) -> None:
    if part.folder == out:
        remove_folder(out)  # the user's own, in which there may be other files
    else:
        shutil.rmtree(part.folder, ignore_errors=True)


def _gathered(out: Path) -> Path:
    """The folder where the sums of earlier launches are kept."""
    return beside(out, "earlier-launches")


def _numbers(folder: Path) -> tuple[int, int] | None:
    """The index of the process that a folder belongs to, and the number of processes."""
    match = re.fullmatch(r".*\.process-(\d+)-of-(\d+)", folder.name)
    return None if match is None else (int(match[1]), int(match[2]))


def _cursor(earlier: Earlier) -> int:
    return 0 if earlier.measurement is None else earlier.measurement.provenance.cursor


def _seconds(earlier: Earlier) -> float:
    return 0.0 if earlier.measurement is None else earlier.measurement.provenance.seconds
