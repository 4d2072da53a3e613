"""DistillationRun: the students of one teacher, how they were trained, and their held-out losses during training.

It is JSON on disk, and is read without importing torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.storage import files as storage

SCHEMA = 2
"""The newest schema that is read.

Runs that trained their students are written as schema 1, which earlier versions read too.
"""
JSON_NAME = "distillation.json"


@dataclass(frozen=True)
class DistillationRun(ShownInNotebooks):
    """Students of one teacher, trained together. It is immutable; `save` writes it and `load` reads it.

    Attributes:
        teacher: name, folder or hub id of the teacher.
        teacher_width: d_T.
        fingerprint: of its weights.
        source, heldout_source: what text was read.
        heldout_tokens: predicted tokens of the held-out text.
        heldout_digest, train_digest: SHA-256 of the rows.
        distinct_tokens: predicted tokens of the training text; fewer than were trained on where it was repeated.
        settings: everything else that decides the result.
        versions: of the libraries.
        seconds: what it cost, in wall-clock seconds.
        complete: whether training ended.
    """

    students: tuple[StudentCurve, ...]
    teacher: str = "unnamed model"
    teacher_width: int = 0
    fingerprint: str = ""
    source: str = ""
    heldout_source: str = ""
    heldout_tokens: int = 0
    heldout_digest: str = ""
    train_digest: str = ""
    distinct_tokens: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    complete: bool = True

    def __iter__(self) -> Iterator[StudentCurve]:
        return iter(self.students)

    def __repr__(self) -> str:
        tokens = self.students[0].tokens[-1] if self.students and self.students[0].tokens else 0
        names = ", ".join(s.name for s in self.students)
        if self.observed:
            return f"DistillationRun({self.teacher} beside {names}; judged on {self.heldout_tokens:,} tokens)"
        return f"DistillationRun({self.teacher} into {names}; {tokens:,} tokens of {self.source})"

    def __getitem__(self, name: str) -> StudentCurve:
        by_name = {student.name: student for student in self.students}
        if name not in by_name:
            raise CapacityError(f"there is no student {name!r}: choose one of {', '.join(by_name)}")
        return by_name[name]

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the students, controls left out, in ascending order."""
        return tuple(sorted({s.width for s in self.students if s.start != "teacher"}))

    @property
    def observed(self) -> bool:
        """Whether all students were judged as they came, with none trained here."""
        return bool(self.students) and all(student.given for student in self.students)

    def place_of(self, name: str, folder: str | Path) -> str:
        """The folder or hub id of a student's weights.

        Args:
            name: of the student.
            folder: that the run was saved in.

        Raises:
            CapacityError: where there is no such student.
        """
        return self[name].place or str(Path(folder) / "students" / name)

    def plot(self) -> Any:
        """A plotly figure of the held-out curves with their asymptotes; see `report.figures.curves_figure`.

        For students that were judged as they came, it shows their losses.
        """
        from tl_capacity.distillation.figures import curves_figure

        return self.plot_floors() if self.observed else curves_figure(self)

    def plot_floors(self) -> Any:
        """A plotly figure of the observed floors against the student's width.

        `decompose(measurement, run).plot()` adds the predicted ones.
        """
        from tl_capacity.distillation.figures import observed_figure
        from tl_capacity.distillation.observed import observed_floors

        return observed_figure(observed_floors(self))

    def to_frame(self) -> Any:
        """The held-out curves as a pandas DataFrame, with one row for each evaluation of each student.

        Students that were judged as they came have one row, with its interval and the other figures.
        """
        import pandas

        rows = [
            {
                "student": s.name,
                "width": s.width,
                "seed": s.seed,
                "start": s.start,
                "tokens": tokens,
                "heldout_kl": kl,
                **({} if s.judged is None else s.judged.flat()),
            }
            for s in self.students
            for tokens, kl in zip(s.tokens, s.heldout_kl, strict=True)
        ]
        return pandas.DataFrame(rows)

    def _repr_html_(self) -> str:
        from tl_capacity.distillation.observed import floor_cells, judged_cells, observed_floors
        from tl_capacity.show.tables import html_table

        if self.observed:
            return html_table(*judged_cells(self))
        return html_table(*floor_cells(observed_floors(self)))

    def to_json(self) -> dict[str, Any]:
        """The whole run as a JSON object."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        students = [student.to_json() for student in self.students]
        return {"schema": SCHEMA if any(s.given for s in self.students) else 1, **content, "students": students}

    def save(self, folder: str | Path) -> Path:
        """Write `distillation.json` into a folder. The file is whole or not there.

        Raises:
            CapacityError: where the folder cannot be written.
        """
        storage.make_folder(Path(folder))
        storage.write_record(Path(folder) / JSON_NAME, self.to_json())
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> DistillationRun:
        """Read a run from its folder.

        Raises:
            MeasurementError: where it is missing, damaged, or of a newer schema.
        """
        path = Path(folder) / JSON_NAME
        if not path.is_file():
            raise MeasurementError(
                f"{folder} is not a distillation: it has no {JSON_NAME}; pass a folder that `tl-capacity run distill"
                " --out` or `tl-capacity observe --out` wrote"
            )
        try:
            return cls.from_json(storage.read_record(path, SCHEMA))
        except MeasurementError:
            raise
        except (ValueError, OSError, RecursionError, OverflowError, KeyError, TypeError, AttributeError) as problem:
            raise MeasurementError(f"{path} is truncated or was altered ({problem}): distil again") from problem

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DistillationRun:
        """The run that `to_json` wrote."""
        storage.check_schema("the distillation", content["schema"], SCHEMA)
        students = [StudentCurve.from_json(saved) for saved in content["students"]]
        if not students:
            raise ValueError("it has no students")
        return cls(
            **{name: value for name, value in content.items() if name not in ("schema", "students")},
            students=tuple(students),
        )
