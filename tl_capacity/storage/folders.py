"""Folders that other libraries write to. They appear complete, or what was there before stays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_capacity.errors import NotWrittenError
from tl_capacity.runtime.hub import reason_of
from tl_capacity.runtime.paths import named
from tl_capacity.storage.files import make_folder

FULL_BYTES = 2**16
"""A disk with less free space than this counts as full."""


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Turn what other libraries raise on a full or read-only disk into the sentence of `storage.write_bytes`.

    Raises:
        NotWrittenError: from an OSError, or from what safetensors and torch make of one.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as problem:
        # Of a disk that is full, torch says only that its file has not the length that it should have.
        full = shutil.disk_usage(place.parent).free < FULL_BYTES
        reason = "No space left on device" if full else getattr(problem, "strerror", None) or reason_of(problem)
        raise NotWrittenError(
            f"{place} cannot be written ({reason}): free space or choose another folder; what was there before is whole"
        ) from problem


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to write to. It becomes `place`, replacing what was there, once the block has ended and its files are on
    disk. If the block fails, `place` is unchanged.

    A process that was killed meanwhile leaves it, and the next that writes to `place` begins it anew.

    Raises:
        NotWrittenError: where the disk is full or the folder cannot be written.
    """
    place = named(place)
    unfinished = place.with_name(f".writing-{place.name}")
    make_folder(place.parent)
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished)
    try:
        yield unfinished
        with written(place):
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
            if place.exists():
                shutil.rmtree(place)
            os.rename(unfinished, place)
            _sync(place.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
