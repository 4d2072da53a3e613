"""Probes: the result of a run of probes, as stored in probes.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_capacity.errors import MeasurementError
from tl_capacity.probing.fields import finite, object_of, objects_of
from tl_capacity.probing.rows import JSON_NAME, SCHEMA, ProbedConcept, ProbeRow, SparseRow
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.storage.files import check_any_schema, file_in, read_json, save_into


@dataclass(frozen=True)
class Probes(ShownInNotebooks):
    """How well each concept was told. `probe` saves it, and other stages load it.

    Attributes:
        concepts: what was probed for.
        rows: one for each concept and model or baseline.
        sparse: probes on few features of the teacher's SAE.
        settings, versions, seconds: what made them, with which libraries, and in which time.
    """

    concepts: tuple[ProbedConcept, ...]
    rows: tuple[ProbeRow, ...]
    sparse: tuple[SparseRow, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def titles(self) -> dict[str, str]:
        """What each concept tells apart, as `question or statement`, for concepts whose classes are known."""
        return {concept.name: " or ".join(concept.classes) for concept in self.concepts if concept.classes}

    def tables(self) -> dict[str, Any]:
        """Concepts and probes, without how they were made."""
        return {
            "concepts": [concept.to_json() for concept in self.concepts],
            "probes": [row.to_json() for row in self.rows],
            "sparse": [row.to_json() for row in self.sparse],
        }

    def to_json(self) -> dict[str, Any]:
        """The whole result, as the file has it."""
        made = {"settings": dict(self.settings), "versions": dict(self.versions), "seconds": self.seconds}
        return {"schema": SCHEMA, **made, **self.tables()}

    @classmethod
    def from_json(cls, content: Any) -> Probes:
        """The checked content of a `probes.json`. Rows without a number are left out: their probes could not be fitted.

        Raises:
            MeasurementError: where none is left, the file is of a newer version, or a width or number is none that a
                probe can have.
        """
        rows = content.get("probes") if isinstance(content, dict) else content
        check_any_schema(JSON_NAME, content, SCHEMA)
        probes = [ProbeRow.from_json(row) for row in (rows if isinstance(rows, list) else [])]
        if not any(probes):
            raise MeasurementError(f"{JSON_NAME} has no accuracy at any width: probe again")
        sparse = [SparseRow.from_json(row) for row in objects_of(content, "sparse")]
        about = content if isinstance(content, dict) else {}
        return cls(
            tuple(ProbedConcept.from_json(concept) for concept in objects_of(content, "concepts")),
            tuple(row for row in probes if row is not None),
            tuple(row for row in sparse if row is not None),
            object_of(about, "settings"),
            object_of(about, "versions"),
            finite(JSON_NAME, about.get("seconds")),
        )

    def save(self, folder: str | Path) -> Path:
        """Write `probes.json` into a folder, and return the folder.

        Raises:
            CapacityError: where it cannot be written.
        """
        return save_into(folder, JSON_NAME, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Read the file, or the one in a folder.

        Raises:
            MeasurementError: where it cannot be read, or is none, as in `from_json`.
        """
        return cls.from_json(read_json(file_in(path, JSON_NAME)))

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row for each concept and each model or baseline."""
        import pandas

        return pandas.DataFrame([row.to_json() for row in self.rows])

    def plot(self) -> Any:
        """A plotly figure of accuracy against width, one panel for each concept; see `figures.accuracy_figure`."""
        from tl_capacity.probing.figures import accuracy_figure

        return accuracy_figure(self.rows, self.concepts)
