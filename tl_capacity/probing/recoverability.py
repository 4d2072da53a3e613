"""Recoverability: how many of the teacher's features each student kept, as `recoverability.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_capacity.errors import MeasurementError
from tl_capacity.probing.recovery_row import COUNTS, FIELDS, JSON_NAME, RecoveryRow
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.storage.files import file_in, read_json, save_into

FIELDS |= {"n_judged", "intervals", "overlap", "by_tau", "readouts", "tokens", "student_hook", "tried"}
"""Fields of a row that are no law's budget."""


@dataclass(frozen=True)
class Recoverability(ShownInNotebooks):
    """What students kept of the features at some hook points; what `recover` saves, and other stages load.

    Attributes:
        rows: one for each student and hook point.
    """

    rows: tuple[RecoveryRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """One object per row."""
        return [row.to_json() for row in self.rows]

    @classmethod
    def from_json(cls, content: Any) -> Recoverability:
        """What a `recoverability.json` holds, checked.

        Raises:
            MeasurementError: where it has no rows, is of a newer version, or a width or number is none that a row can
                have.
        """
        if not isinstance(content, list) or not content:
            raise MeasurementError(
                f"{JSON_NAME} has no rows, as it is no list of students: measure recoverability again"
            )
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
        """A pandas DataFrame with a row for each student: counts with their intervals, budgets, overlap and medians."""
        import pandas

        return pandas.DataFrame([_flat_with_parts(row) for row in self.rows])

    def plot(self) -> Any:
        """A plotly figure of the features kept against the student's width, a panel per hook point."""
        from tl_capacity.probing.figures import recoverability_figure

        hooks = dict.fromkeys(row.hook for row in self.rows)
        return recoverability_figure([[row for row in self.rows if row.hook == hook] for hook in hooks])


def _flat_with_parts(row: RecoveryRow) -> dict[str, Any]:
    """The numbers of a row, with intervals, overlap and what is typical of readouts as columns of their own."""
    cells, intervals = row.flat(), row.intervals()
    for readout, key in COUNTS.items():
        cells |= dict(zip((f"{key} low", f"{key} high"), intervals.get(readout) or (None, None), strict=True))
    cells |= {f"overlap {name}": value for name, value in row.shares().items()}
    return cells | {
        f"{name} {readout}": value for readout, values in row.typical().items() for name, value in values.items()
    }
