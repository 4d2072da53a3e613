"""A measurement on disk: a JSON file, and a safetensors file that it names by its hash."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError
from tl_capacity.storage import files as storage
from tl_capacity.storage.digests import digest

SCHEMA = 1
JSON_NAME = "measurement.json"


def write_folder(
    folder: Path, content: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], keep_previous: bool = False
) -> Path:
    """Write JSON and arrays. The JSON is renamed into place last, so it always names complete arrays. With
    `keep_previous`, the earlier files stay too.
    """
    from safetensors.numpy import save

    storage.make_folder(folder)
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    sha = digest(data)
    tensors_name = f"statistics-{sha[:16]}.safetensors"
    storage.write_bytes(folder / tensors_name, data)
    record = {"schema": SCHEMA, "statistics": tensors_name, "statistics_sha256": sha, **content}
    storage.write_record(folder / JSON_NAME, record, keep_previous)
    remove_leftovers(folder, keep_previous)
    return folder


def remove_leftovers(folder: Path, keep_previous: bool = False) -> None:
    """Delete files that a measurement's record does not name. Without `keep_previous`, delete the earlier checkpoint
    too.
    """
    storage.remove_stale(folder / JSON_NAME, "statistics", "statistics-*.safetensors", keep_previous)


def remove_folder(folder: Path) -> None:
    """Delete a measurement or a checkpoint, and its folder if nothing else is in it."""
    record = folder / JSON_NAME
    for path in (storage.previous(record), record, *folder.glob("statistics-*.safetensors")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def read_folder(folder: Path, name: str = JSON_NAME) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The JSON and the arrays of a measurement folder, checked.

    Raises:
        MeasurementError: where something is missing, truncated, altered, or of a newer schema.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = folder / name
    if not path.is_file():
        raise MeasurementError(
            f"{folder} is not a measurement, as it has no {JSON_NAME}: pass a folder that `tl-capacity measure "
            "--out` wrote"
        )
    content = storage.read_result(path, SCHEMA, "measure again", "is truncated, altered or no JSON")
    if not isinstance(content.get("schema"), int):
        raise MeasurementError(
            f"{path} has no schema version: it was altered or not written by this tool, so measure again"
        )
    tensors_name, sha = content.get("statistics"), content.get("statistics_sha256")
    if not isinstance(tensors_name, str) or Path(tensors_name).name != tensors_name:
        raise MeasurementError(f"{path} names no statistics file: it was altered, so measure again")
    try:
        data = (folder / tensors_name).read_bytes()
    except (OSError, ValueError) as problem:
        raise MeasurementError(
            f"{folder / tensors_name} cannot be read ({problem}): copy the whole measurement folder, or measure again"
        ) from problem
    if digest(data) != sha:
        raise MeasurementError(
            f"{folder / tensors_name} is truncated or altered (its SHA-256 is not the recorded one): copy it again, or"
            " measure again"
        )
    try:
        return content, load(data)
    except SafetensorError as problem:
        raise MeasurementError(
            f"{folder / tensors_name} is not a safetensors file ({problem}): measure again"
        ) from problem
