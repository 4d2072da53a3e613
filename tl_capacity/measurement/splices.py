"""Splices of a measurement: the one named, or the one beside it, checked to belong to the measurement."""

from __future__ import annotations

from pathlib import Path

from tl_capacity.errors import MeasurementError
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.spliced import JSON_NAME, Spliced
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import read_json


def splice_of(measurement: Measurement, folder: Path, named: Path | None) -> tuple[Spliced | None, list[str]]:
    """The splice of a measurement, and a note on where it was found; None if none was named and none lies beside it.

    Args:
        folder: the measurement's. Its own splice.json counts as beside it, and those of its folders and of the folders
            next to it, where they say that they are of this measurement's file.
        named: the splice's folder or file.

    Raises:
        MeasurementError: where the one that was named cannot be read, or is of another measurement.
    """
    if named is not None:
        spliced = Spliced.load(named)
        check_splice(spliced, measurement)
        return spliced, []
    beside = splices_beside(folder)
    if not beside:
        return None, []
    if len(beside) > 1:
        return None, [
            f"{len(beside)} splices of this measurement lie beside it, so none is read: choose one with --splice "
            f"({', '.join(str(path.parent) for path in beside)})"
        ]
    spliced = Spliced.load(beside[0])
    check_splice(spliced, measurement)
    return spliced, [f"floors in nats come from {beside[0].parent}, a splice of this measurement"]


def splices_beside(folder: Path) -> list[Path]:
    """The splices in a measurement's folder, one folder deeper, or in a neighbouring folder, that name the hash of the
    measurement's file.
    """
    measured = folder / MEASUREMENT_JSON
    if not measured.is_file():
        return []
    near = [folder / JSON_NAME, *sorted(folder.glob(f"*/{JSON_NAME}"))]
    near += sorted(folder.absolute().parent.glob(f"*/{JSON_NAME}"))
    files = {path.resolve(): path for path in reversed(near) if path.is_file()}
    of_this = digest(measured.read_bytes())
    return [path for path in reversed(files.values()) if _measured(path) == of_this]


def check_splice(spliced: Spliced, measurement: Measurement) -> None:
    """Refuse a splice of another teacher than was measured, or with none of its dictionaries.

    Raises:
        MeasurementError: says which.
    """
    here = measurement.provenance
    for name, mine in (("model", here.model), ("revision", here.revision)):
        theirs = spliced.about.get(name)
        if theirs and mine and theirs != mine:
            raise MeasurementError(
                f"the splice is of the {name} {theirs!r} and the measurement of {mine!r}: splice this measurement"
                " (tl-capacity run splice)"
            )
    known = {(hook.hook, hook.sae_digest) for hook in measurement}
    if not any((curve.hook, curve.sae_digest) in known for curve in spliced):
        spliced_at = ", ".join(dict.fromkeys(f"{curve.sae} at {curve.hook}" for curve in spliced))
        raise MeasurementError(
            f"the splice is of other dictionaries ({spliced_at or 'none'}) than the measurement: splice this "
            "measurement (tl-capacity run splice)"
        )


def _measured(path: Path) -> str | None:
    """The hash of the measurement that a splice belongs to."""
    try:
        content = read_json(path)
        return str(content["about"]["measured"])
    except (MeasurementError, KeyError, TypeError):
        return None
