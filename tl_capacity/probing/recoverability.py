"""Recoverability: how many of the teacher's features each student kept, as stored in `recoverability.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_capacity.errors import MeasurementError
from tl_capacity.probing.recovery_row import COUNTS, JSON_NAME, RecoveryRow
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.storage.files import file_in, read_json, save_into


@dataclass(frozen=True)
class Recoverability(ShownInNotebooks):
    """How many features each student kept at some hook points. `recover` saves it, and other stages load it.

    Attributes:
        rows: one for each student and hook point.
    """

    rows: tuple[RecoveryRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """One object per row."""
        return [row.to_json() for row in self.rows]

    @classmethod
    def from_json(cls, content: Any) -> Recoverability:
        """The checked content of a `recoverability.json`.

        Raises:
            MeasurementError: where it has no rows, is of a newer version, or a width or number is none that a row can
                have.
        """
        if not isinstance(content, list) or not content:
            raise MeasurementError(f"{JSON_NAME} is not a list of students: measure recoverability again")
        return cls(tuple(RecoveryRow.from_json(row) for row in content))

    def save(self, folder: str | Path) -> Path:
        """Write `recoverability.json` into a folder, and return the folder.

        Raises:
            CapacityError: where it cannot be written.
        """
        return save_into(folder, JSON_NAME, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Recoverability:
        """Read the file, or the one in a folder.

        Raises:
            MeasurementError: where it cannot be read, or is none, as in `from_json`.
        """
        return cls.from_json(read_json(file_in(path, JSON_NAME)))

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each student: counts with intervals, budgets, overlap and medians."""
        import pandas

        return pandas.DataFrame([_flat_with_parts(row) for row in self.rows])

    def plot(self) -> Any:
        """A plotly figure of the features kept against the student's width, one panel for each hook point."""
        from tl_capacity.probing.figures import recoverability_figure

        hooks = dict.fromkeys(row.hook for row in self.rows)
        return recoverability_figure([[row for row in self.rows if row.hook == hook] for hook in hooks])


def _flat_with_parts(row: RecoveryRow) -> dict[str, Any]:
    """The numbers of a row in one level: intervals, overlap and figures of readouts have columns of their own."""
    cells, intervals = row.flat(), row.intervals()
    for readout, key in COUNTS.items():
        cells |= dict(zip((f"{key} low", f"{key} high"), intervals.get(readout) or (None, None), strict=True))
    cells |= {f"overlap {name}": value for name, value in row.shares().items()}
    return cells | {
        f"{name} {readout}": value for readout, values in row.typical().items() for name, value in values.items()
    }
