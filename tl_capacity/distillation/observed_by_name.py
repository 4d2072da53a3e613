"""`observe` from names, as `tl-capacity observe` runs it: models and text are loaded, and nothing is written but the
result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tl_capacity.distillation.observation import check_new, observe
from tl_capacity.distillation.observing import ObserveSettings
from tl_capacity.distillation.run import JSON_NAME, DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.models.defaults import USUAL_CONTEXT, longest_row
from tl_capacity.models.loading import LoadedModel, hub_revision, load_model
from tl_capacity.runtime.processes import Processes
from tl_capacity.text.streams import TokenStream


@dataclass(frozen=True)
class StudentName:
    """Where a student lies.

    Attributes:
        place: a folder, a hub id, or a name that a plugin registered.
        revision: branch, tag or commit of a hub id.
    """

    place: str
    revision: str | None = None

    def load(self, device: str, dtype: str = "float32") -> LoadedModel:
        """The student with its tokenizer.

        Raises:
            CapacityError: where it cannot be loaded.
        """
        return load_model(self.place, device=device, dtype=dtype, revision=self.revision)


def observe_named(settings: ObserveSettings) -> DistillationRun:
    """Judge the students that the settings name.

    Raises:
        CapacityError: where a model or the text cannot be loaded, or on whatever `observe` refuses.
    """
    check_new(settings.out)
    names = students_named(settings.students)
    processes = Processes.of_launch().connected(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    teacher = load_model(settings.teacher, device=settings.device, dtype=settings.dtype, revision=settings.revision)
    students = {name: student.load(settings.device, settings.dtype) for name, student in names.items()}
    stream = TokenStream(
        settings.source,
        teacher.tokenizer,
        _context(settings.context, {"the teacher": teacher, **students}),
        settings.batch_rows,
        settings.prepend_bos,
        special_tokens=settings.special_tokens,
    )
    return observe(
        teacher,
        students,
        stream,
        tokens=settings.tokens,
        held_out=settings.held_out,
        batch_rows=settings.batch_rows,
        out=settings.out,
        processes=processes,
    )


def students_named(specs: Iterable[str]) -> dict[str, StudentName]:
    """Students by short names that differ: a folder's or a hub id's last part, with the part before it where two have
    the same. The folder of a distillation stands for its students, controls left out.

    Raises:
        CapacityError: where one is named twice.
    """
    places: dict[str, StudentName] = {}
    for spec in specs:
        if (Path(spec) / JSON_NAME).is_file():
            run = DistillationRun.load(spec)
            for student in run:
                if student.start != "teacher":
                    place = run.place_of(student.name, spec)
                    places.setdefault(place, StudentName(place, hub_revision(place, student.revision)))
        elif spec in places:
            raise CapacityError(f"the student {spec!r} is named twice: name each once")
        else:
            place, at, revision = spec.rpartition("@")
            known = Path(spec).expanduser().exists() or not at
            places[spec] = StudentName(spec) if known else StudentName(place, revision)
    return dict(zip(_short(list(places)), places.values(), strict=True))


def _short(places: list[str]) -> list[str]:
    """The last parts of some places, as many of each as tell it from the others."""
    parts = [[part for part in place.split("/") if part not in ("", ".", "..")] or [place] for place in places]
    shown = [1] * len(places)
    while True:
        names = ["/".join(own[-count:]) for own, count in zip(parts, shown, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1 and shown[i] < len(parts[i])]
        if not alike:
            return names if len(set(names)) == len(names) else places
        for i in alike:
            shown[i] += 1


def _context(asked: int | None, models: Mapping[str, LoadedModel]) -> int:
    """Positions in a row: those asked for, else as many as all models take, at most the usual ones.

    Raises:
        CapacityError: where one takes fewer than are asked for.
    """
    limits = {name: longest_row(loaded.model.config) for name, loaded in models.items()}
    shortest = min(limits, key=limits.__getitem__)
    if asked is not None and asked > limits[shortest]:
        raise CapacityError(
            f"--context {asked} is longer than the {limits[shortest]} positions of {shortest}: choose at most that"
        )
    return min(USUAL_CONTEXT, limits[shortest]) if asked is None else asked
