"""What a whole measurement would take: time, memory and disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tl_capacity.dictionaries.adapter import NamedDictionary
from tl_capacity.doctor.finding import OK, STOP, Finding
from tl_capacity.doctor.running import Trial
from tl_capacity.measure.memory import COPIES_OF_SUMS, sums_of
from tl_capacity.runtime.progress import peak_memory
from tl_capacity.runtime.units import show_bytes, show_seconds

FILES_AT_ONCE = 3
"""Copies on disk at once: the last checkpoint, the one before it, and the one being written."""


def cost_findings(trial: Trial, dictionaries: Sequence[NamedDictionary]) -> Iterator[Finding]:
    """Time, memory and disk that the whole run will take. They are estimated from a second run over the text, in which
    nothing is loaded or compiled any more.
    """
    settings = trial.settings
    if not dictionaries:
        yield disk(settings.out, 0)
        return
    with trial.attached(dictionaries, settings.fvu_every) as capacity:
        started = time.monotonic()
        capacity.run(trial.batches, progress=False)
        seconds = time.monotonic() - started
    sums = sums_of(capacity)
    rate = capacity.n_tokens / seconds
    took = show_seconds(settings.tokens / rate)
    yield Finding("duration", OK, f"{settings.tokens:,} tokens at {rate:,.0f} tokens/s: about {took}")
    yield memory(int(COPIES_OF_SUMS * sums))
    yield disk(settings.out, FILES_AT_ONCE * sums)


def memory(further: int, available: int | None = None) -> Finding:
    """Whether there is memory for what a run will take beyond what is already taken, in bytes."""
    import psutil

    free = psutil.virtual_memory().available if available is None else available
    says = (
        f"about {show_bytes(peak_memory() + further)} at the peak, {show_bytes(further)} of it for the sums and for "
        f"saving them; {show_bytes(free)} are free"
    )
    return (
        Finding("memory", OK, says)
        if further <= free
        else Finding("memory", STOP, f"{says}: measure fewer SAEs at once")
    )


def disk(out: Path, needed: int) -> Finding:
    """Whether a folder can be written, and has room for `needed` bytes."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir():
        return Finding("disk", STOP, f"{place} is a file, so {out} cannot be a folder: choose another --out")
    if not os.access(place, os.W_OK):
        return Finding("disk", STOP, f"{place} cannot be written: choose another --out")
    free = shutil.disk_usage(place).free
    if free < needed:
        return Finding(
            "disk",
            STOP,
            f"{show_bytes(needed)} are needed at {out}, and {show_bytes(free)} are free: free space, or choose another"
            " --out",
        )
    return Finding("disk", OK, f"{show_bytes(needed)} are needed at {out}, and {show_bytes(free)} are free")
