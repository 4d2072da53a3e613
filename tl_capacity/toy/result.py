"""The result of a sweep: every trained model, the floor it reached, and a table of its measures."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_capacity import theory
from tl_capacity.errors import CapacityError
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import check_schema, make_folder, read_record, write_bytes, write_record
from tl_capacity.toy import measures
from tl_capacity.toy.features import zipf_importance
from tl_capacity.toy.sweep import Family, Stream, SweepSettings
from tl_capacity.toy.training import EVALUATION, Objective, Stack, generator, teacher_of, train, worker_threads

SCHEMA = 1
THRESHOLDS = (0.25, 0.5, 0.75)
"""The values of τ at which kept features are counted."""


@dataclass(frozen=True)
class SweepResult(ShownInNotebooks):
    """All models of a sweep and their floors.

    Attributes:
        tensors: `FAMILY.weights`, `FAMILY.bias`, `FAMILY.floor`, `FAMILY.floor_error`, and `FAMILY.teacher_floor` of
            distilled students, with the axes (stream, student, …) of `Stack`.
        seconds: how long each stage took.
        versions, machine: of the libraries, and what it ran on.
    """

    settings: SweepSettings
    tensors: dict[str, Tensor]
    seconds: dict[str, float]
    versions: dict[str, str]
    machine: str

    @cached_property
    def students(self) -> Any:
        """A pandas DataFrame with one row per student.

        Columns: `kind` (direct or distilled), `n`, `alpha`, `teacher_width` (0 where trained on the data), `width`,
        `seed`; `achieved_floor` on the data and its Monte-Carlo `floor_error`; `teacher_floor`, the loss against the
        teacher's output; `nothing`, the loss of keeping nothing Σ Iᵢ·E[xᵢ²]; `diverged`; `kept` and `kept_τ`, numbers
        of features; `kept_set`, which ones, as a boolean array; `total_capacity` Σᵢ Cᵢ; `overlap` with the theory's
        set; `ordered`, the share of the kept set that is most important; `contained`, the share of it that the teacher
        keeps as well.
        """
        import pandas

        rows = [
            row
            for kind in self.settings.kinds
            for family in self.settings.families(kind)
            for row in self._rows(kind, family)
        ]
        return pandas.DataFrame(rows)

    @property
    def diverged(self) -> Any:
        """The students whose training diverged. They enter no average.

        Their floor is not finite, or is more than three standard errors above the loss of keeping nothing.
        """
        return self.students[self.students.diverged]

    def stack(self, family: Family) -> Stack:
        return Stack(self.tensors[f"{family.name}.weights"], self.tensors[f"{family.name}.bias"])

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row per student; see `students`."""
        return self.students

    def plot(self) -> Any:
        """A plotly figure of the achieved floors against the student's width, one panel for each n and α."""
        from tl_capacity.toy.achieved import achieved_figure

        return achieved_figure(self.students)

    def save(self, folder: str | Path) -> Path:
        """Write the result as a new folder, and return its path. Tensors are safetensors; the rest is JSON.

        Raises:
            CapacityError: where the folder exists or cannot be written.
        """
        from safetensors.torch import save

        folder = Path(folder)
        if folder.exists():
            raise CapacityError(f"{folder} exists already: choose another folder, or delete it first")
        make_folder(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            whole = Path(temporary) / "sweep"
            whole.mkdir()
            data = save({name: tensor.contiguous() for name, tensor in self.tensors.items()})
            write_bytes(whole / "students.safetensors", data)
            content = {
                "settings": self.settings.to_json(),
                "seconds": self.seconds,
                "versions": self.versions,
                "machine": self.machine,
            }
            write_record(whole / "sweep.json", {"schema": SCHEMA, "students_sha256": digest(data), **content})
            os.rename(whole, folder)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SweepResult:
        """Read the result that `save` wrote.

        Raises:
            CapacityError: where the folder holds no sweep, a damaged one, or one of another schema.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = Path(folder)
        try:
            content = read_record(folder / "sweep.json", SCHEMA)
            check_schema(folder, content["schema"], SCHEMA)
            settings = SweepSettings.from_json(content["settings"])
            data = (folder / "students.safetensors").read_bytes()
            if content.get("students_sha256", sha256 := digest(data)) != sha256:
                raise ValueError("the SHA-256 of its tensors is not the recorded one")
            result = cls(settings, load(data), content["seconds"], content["versions"], content["machine"])
            missing = {f"{family.name}.floor" for kind in settings.kinds for family in settings.families(kind)} - set(
                result.tensors
            )
        except CapacityError:
            raise
        except (
            OSError,
            SafetensorError,
            RecursionError,
            OverflowError,
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
        ) as problem:
            raise CapacityError(
                f"{folder} does not hold a whole toy sweep ({problem}): pass the folder that `tl-capacity run"
                " toy-sweep` wrote"
            ) from problem
        if missing:
            raise CapacityError(
                f"{folder} lacks the floors of {', '.join(sorted(missing))}: it is damaged, run the sweep again"
            )
        return result

    def _rows(self, kind: str, family: Family) -> list[dict[str, Any]]:
        streams = self.settings.streams(family.n)
        importance = zipf_importance(family.n, self.settings.slope)
        stack, values = self.stack(family), self.tensors
        norms = measures.squared_norms(stack.weights).numpy()
        capacity = measures.fractional_capacity(stack.weights).sum(-1)
        teacher = teacher_of(
            family, self.settings, {f"n{n}.direct": self.stack(Family(n, (), None)) for n in self.settings.features}
        )
        teacher_kept = None if teacher is None else measures.kept_features(teacher.weights)[:, 0].numpy()
        rows = []
        for i, stream in enumerate(streams):
            alpha, nothing = stream.distribution.alpha, float(importance.sum() * stream.distribution.second_moment)
            for j, width in enumerate(family.widths):
                floor, floor_error = (float(values[f"{family.name}.{name}"][i, j]) for name in ("floor", "floor_error"))
                kept = norms[i, j] > measures.KEPT_THRESHOLD
                against_teacher = (
                    float(values[f"{family.name}.teacher_floor"][i, j]) if teacher is not None else float("nan")
                )
                rows.append(
                    {
                        "kind": kind,
                        "n": family.n,
                        "alpha": alpha,
                        "teacher_width": family.teacher_width or 0,
                        "width": width,
                        "seed": stream.seed,
                        "achieved_floor": floor,
                        "floor_error": floor_error,
                        "teacher_floor": against_teacher,
                        "nothing": nothing,
                        "diverged": not floor - 3 * floor_error <= nothing,  # NaN is not
                        "kept": int(kept.sum()),
                        **{f"kept_{t:g}": int((norms[i, j] > t).sum()) for t in THRESHOLDS},
                        "kept_set": kept,
                        "total_capacity": float(capacity[i, j]),
                        "overlap": measures.overlap(kept, theory.kept_features(width, alpha, family.n)),
                        "ordered": measures.ordered_share(kept),
                        "contained": (
                            float("nan") if teacher_kept is None else measures.containment(kept, teacher_kept[i])
                        ),
                    }
                )
        return rows


def run(
    settings: SweepSettings, checkpoint: Path | None = None, advance: Callable[[int], None] = lambda steps: None
) -> SweepResult:
    """Train all models of a sweep and measure the floors that they reach.

    Args:
        checkpoint: a file to keep the state of the training in; where it exists, training goes on from it to the same
            last bit.
        advance: called with the training steps done so far, out of `settings.total_steps`.

    Raises:
        CapacityError: as `train`.
    """
    from tl_capacity.runtime.versions import library_versions

    stacks, seconds = train(settings, checkpoint, advance)
    started = time.monotonic()
    tensors = {f"{name}.{part}": getattr(stack, part) for name, stack in stacks.items() for part in ("weights", "bias")}
    with worker_threads() as workers:
        families = [family for kind in settings.kinds for family in settings.families(kind)]
        for floors in workers.map(lambda family: _floors(family, stacks, settings), families):
            tensors |= floors
    seconds = seconds | {"evaluation": round(time.monotonic() - started, 1)}
    return SweepResult(settings, tensors, seconds, library_versions(), _machine())


def _floors(family: Family, stacks: dict[str, Stack], settings: SweepSettings) -> dict[str, Tensor]:
    """The floors of one family, on held-out samples that all seeds of one sparsity share."""
    streams, stack, teacher = settings.streams(family.n), stacks[family.name], teacher_of(family, settings, stacks)
    against_data, against_teacher = [], []
    for first in range(0, len(streams), settings.seeds):
        same = slice(first, first + settings.seeds)
        distribution = streams[first].distribution
        x = torch.from_numpy(
            distribution.sample_nonzero(settings.evaluation_rows, generator(Stream(distribution, 0), EVALUATION))
        ).to(stack.bias.dtype)
        objective = Objective.for_streams(family.n, streams[same], settings.slope, stack.bias.dtype)
        against_data.append(measures.floors(stack.chunk(same), objective, x))
        if teacher is not None:
            against_teacher.append(measures.floors(stack.chunk(same), objective, x, teacher.chunk(same)))
    floors = {
        "floor": torch.cat([f.mean for f in against_data]),
        "floor_error": torch.cat([f.error for f in against_data]),
    }
    if against_teacher:
        floors["teacher_floor"] = torch.cat([f.mean for f in against_teacher])
    return {f"{family.name}.{name}": value for name, value in floors.items()}


def _machine() -> str:
    """Processor and threads, on which the seconds depend."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
