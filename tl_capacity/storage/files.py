"""Files: written beside their final name and renamed, so that a reader finds the old file or the new one, never half of
one. Of checkpoints, the previous one is kept in case the last is damaged.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tl_capacity.errors import CapacityError, MeasurementError, NotWrittenError
from tl_capacity.runtime.logs import log
from tl_capacity.storage.digests import digest

Content = TypeVar("Content")
SEAL = "sha256_of_the_rest"


def write_bytes(path: Path, data: bytes, keep_previous: bool = False) -> None:
    """Write `data` to `path` atomically and durably. With `keep_previous`, the old file stays under the name that
    `previous` gives.

    Raises:
        NotWrittenError: where the disk is full or the folder cannot be written; whatever was at `path` stays.
    """
    if keep_previous and path.exists():
        write_bytes(previous(path), path.read_bytes())
    temporary = path.with_name(f".{path.name}{_unfinished()}")
    _remove_unfinished(path.parent, glob.escape(path.name))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        _discard(temporary)
        raise NotWrittenError(
            f"{path} cannot be written ({problem.strerror}): free space or choose another folder; what was there before"
            " is whole"
        ) from problem


def write_json(path: Path, content: Any, keep_previous: bool = False) -> None:
    """Write `content` as indented JSON, atomically. NaN is refused."""
    write_bytes(
        path,
        (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8", "replace"),
        keep_previous,
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        MeasurementError: where it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise MeasurementError(f"{path} cannot be read ({problem}): write it again") from problem


def write_record(path: Path, content: Mapping[str, Any], keep_previous: bool = False) -> None:
    """Write a JSON object with the SHA-256 of everything else in it, so that `read_record` notices a single changed
    bit.
    """
    # As a reader will see it: keys are strings, tuples are lists, and what UTF-8 cannot hold was replaced.
    written = json.loads(json.dumps(content, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace"))
    write_json(path, {**written, SEAL: _seal(written)}, keep_previous)


def read_record(path: Path, schema: int) -> dict[str, Any]:
    """What `write_record` wrote, without the hash. A file without a hash, such as one written by hand, is not checked.

    Raises:
        MeasurementError: where its `schema` is newer than the one given, or is no version.
        ValueError, OSError, RecursionError: where the file cannot be read, is no JSON object, or was altered.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    json.dumps(content, allow_nan=False)  # Python reads NaN and infinity, which are no JSON and were never written
    check_any_schema(path, content, schema)
    seal = content.pop(SEAL, None)
    if seal is not None and seal != _seal(content):
        raise ValueError("the SHA-256 of its content is not the recorded one")
    return content


def read_result(file: Path, schema: int, again: str, failed: str = "cannot be read") -> dict[str, Any]:
    """What `read_record` reads, with everything that can be wrong with the file in one sentence.

    Args:
        again: what makes the file anew, for the error.
        failed: what the error says of the file.

    Raises:
        MeasurementError: where `read_record` raises anything.
    """
    try:
        return read_record(file, schema)
    except MeasurementError:
        raise
    except (OSError, ValueError, RecursionError) as problem:
        raise MeasurementError(f"{file} {failed} ({problem}): {again}") from problem


def check_any_schema(file: str | Path, content: Any, newest: int) -> None:
    """Refuse a JSON object that a newer version wrote. What has no `schema` passes.

    Raises:
        MeasurementError: as `check_schema` does.
    """
    if isinstance(content, dict) and content.get("schema") is not None:
        check_schema(file, content["schema"], newest)


def check_schema(file: str | Path, schema: Any, newest: int) -> None:
    """Refuse the `schema` of a JSON object that a newer version wrote.

    Args:
        file: how the error names it.

    Raises:
        MeasurementError: where it is newer than `newest`, or is not a whole number.
    """
    text = repr(schema)
    shown = text if len(text) <= 24 else f"{text[:20]}…"
    if type(schema) is not int:
        raise MeasurementError(
            f"{file} has schema {shown}, which is not a whole number: it was altered, write it again"
        )
    if schema > newest:
        raise MeasurementError(f"{file} has schema {shown}, and this version reads up to {newest}: upgrade tl-capacity")


def remove_stale(record: Path, names: str, pattern: str, keep_previous: bool) -> None:
    """Delete files beside a record that match `pattern`, except the one named in its field `names` and the one that the
    previous record names. Without `keep_previous`, delete the previous record too.
    """
    if not keep_previous:
        _discard(previous(record))
    named = [_field(path, names) for path in (record, previous(record)) if path.exists()]
    for path in record.parent.glob(pattern):
        if path.name not in named:
            _discard(path)
    _remove_unfinished(record.parent, pattern)


def _remove_unfinished(folder: Path, pattern: str) -> None:
    """Delete what another process left when it was killed while writing. Each file has one writer, which overwrites its
    own.
    """
    for path in folder.glob(f".{pattern}.*.writing"):
        if not path.name.endswith(_unfinished()):
            _discard(path)


def _discard(path: Path) -> None:
    """Delete a file that is no longer needed. If it cannot be deleted, as in a read-only folder, nothing happens."""
    with suppress(OSError):
        path.unlink()


def _unfinished() -> str:
    return f".{os.getpid()}.writing"


def _field(record: Path, name: str) -> Any:
    try:
        return json.loads(record.read_bytes())[name]
    except (ValueError, LookupError, TypeError):
        return None  # the record before the last may have been damaged since it was read


def _seal(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def last_whole(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """What `read` returns for the checkpoint at `path`. If that is damaged, the previous one is read and takes its
    place. None if there is neither.

    Raises:
        CapacityError: what `read` raises, where both are damaged.
    """
    before = previous(path)
    if not path.exists():
        return None
    try:
        return read(path)
    except CapacityError as problem:
        try:
            content = read(before)
        except (CapacityError, OSError):
            raise problem from None
        os.replace(before, path)
        log.warning(f"the last checkpoint cannot be used, so the run continues from the one before it: {problem}")
        return content


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        NotWrittenError: where a file is in the way or the parent cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise NotWrittenError(
            f"the folder {path} cannot be created ({problem.strerror}): choose another --out"
        ) from problem


def save_into(folder: str | Path, name: str, content: Any, write: Callable[[Path, Any], None] = write_json) -> Path:
    """Write a result's file into its folder, which is created. Returns the folder.

    Raises:
        CapacityError: where it cannot be written.
    """
    make_folder(Path(folder))
    write(Path(folder) / name, content)
    return Path(folder)


def file_in(path: str | Path, name: str) -> Path:
    """The file of a result, given as the file or as its folder."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def read_kept(path: Path) -> dict[str, Any]:
    """The JSON object that a recipe keeps beside its results.

    Raises:
        CapacityError: where it is damaged.
    """
    try:
        return read_record(path, 1)
    except CapacityError:
        raise
    except (ValueError, OSError, RecursionError) as problem:
        raise CapacityError(
            f"{path} is truncated or was altered ({problem}): delete its folder, or choose another --out"
        ) from problem
