"""Students by name: folders, hub ids and distillations under short names, and how to load each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.run import JSON_NAME, DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.models.loading import LoadedModel, hub_revision, load_model


@dataclass(frozen=True)
class NamedStudent:
    """Where a student is stored, and what is known of it.

    Attributes:
        place: a folder, a hub id, or a name that a plugin registered.
        revision: branch, tag or commit of a hub id.
        curve: what a distillation says of it, where it was named by one.
    """

    place: str
    revision: str | None = None
    curve: StudentCurve | None = None

    @property
    def distilled(self) -> StudentCurve | None:
        """The student's curve in its distillation; None if somebody else trained it."""
        return None if self.curve is None or self.curve.given else self.curve

    def load(self, device: str, dtype: str = "float32") -> LoadedModel:
        """The student and its tokenizer.

        Raises:
            CapacityError: where it cannot be loaded, or has other weights than when it was judged.
        """
        loaded = load_model(self.place, device=device, dtype=dtype, revision=self.revision)
        if self.curve is not None and self.curve.revision not in (None, loaded.revision):
            raise CapacityError(
                f"the weights of {self.place} have changed since `tl-capacity observe` judged it: judge it again"
            )
        return loaded


def is_run(spec: str | Path) -> bool:
    """Whether a name is the folder of a distillation."""
    return (Path(spec) / JSON_NAME).is_file()


def students_named(specs: Iterable[str]) -> dict[str, NamedStudent]:
    """Students by short names that differ.

    The short name is the last part of a folder or hub id. If two share it, the part before is added. The folder of a
    distillation stands for its students, without the controls.

    Raises:
        CapacityError: where one is named twice.
    """
    students: dict[str, NamedStudent] = {}
    for spec in specs:
        if is_run(spec):
            run = DistillationRun.load(spec)
            named = [(run.place_of(curve.name, spec), curve) for curve in run if curve.start != "teacher"]
            new = {place: NamedStudent(place, hub_revision(place, curve.revision), curve) for place, curve in named}
        else:
            place, at, revision = spec.rpartition("@")
            as_it_is = not at or Path(spec).expanduser().exists()
            new = {spec: NamedStudent(spec) if as_it_is else NamedStudent(place, revision)}
        if twice := students.keys() & new.keys():
            raise CapacityError(f"{min(twice)!r} is named twice: name each student once")
        students |= new
    return dict(zip(_short(list(students)), students.values(), strict=True))


def _short(places: list[str]) -> list[str]:
    """The last parts of each path, as many as are needed to tell the paths apart."""
    parts = [[part for part in place.split("/") if part not in ("", ".", "..")] or [place] for place in places]
    shown = [1] * len(places)
    while True:
        names = ["/".join(own[-count:]) for own, count in zip(parts, shown, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1 and shown[i] < len(parts[i])]
        if not alike:
            return names if len(set(names)) == len(names) else places
        for i in alike:
            shown[i] += 1
