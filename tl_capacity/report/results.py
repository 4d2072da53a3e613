"""The results that a report is made of, read from folders and JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_capacity.distillation.run import JSON_NAME as DISTILLATION_JSON
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import MeasurementError
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.splices import splice_of
from tl_capacity.placement.result import JSON_NAME as PLACEMENT_JSON
from tl_capacity.predict.spliced import JSON_NAME as SPLICE_JSON
from tl_capacity.predict.spliced import Spliced
from tl_capacity.probing.recovery_row import JSON_NAME as RECOVERABILITY_JSON
from tl_capacity.probing.rows import JSON_NAME as PROBES_JSON
from tl_capacity.report.parts import sentence
from tl_capacity.storage.files import read_json

FILES = (MEASUREMENT_JSON, DISTILLATION_JSON, PROBES_JSON, RECOVERABILITY_JSON, PLACEMENT_JSON, SPLICE_JSON)


@dataclass(frozen=True)
class Results:
    """The results that a report is made of. All but the measurement may be missing.

    Attributes:
        folder: of the measurement, for the commands that the page suggests.
        probes, recoverability, placement: the JSON that their recipes wrote, which their sections check.
        run_folder: of the distillation, for the same commands.
        spliced: of the measurement.
        splice_note: why there is none, where several could be meant.
        beside: other measurements to compare it with, by the folders that they came from.
    """

    measurement: Measurement
    folder: str = "runs/measurement"
    run: DistillationRun | None = None
    probes: Any = None
    recoverability: Any = None
    placement: Any = None
    run_folder: str = "runs/students"
    spliced: Spliced | None = None
    splice_note: str = ""
    beside: Mapping[str, Measurement] = field(default_factory=dict)

    @classmethod
    def load(cls, paths: Sequence[Path], splice: Path | None = None) -> Results:
        """Read results from folders or JSON files, in any order.

        A folder may hold them itself or one level deeper, as `pythia-floor` writes them. The page is about the first
        measurement; further ones stand beside it.

        Args:
            splice: of the measurement; None for one among the paths, or else the one that lies beside the measurement.

        Raises:
            MeasurementError: where there is no measurement, something is given twice or cannot be read, or a path holds
                nothing that is known.
        """
        files: dict[str, Path] = {}
        further: dict[str, Measurement] = {}
        for path in paths:
            here = _results_in(path)
            if not here:
                raise MeasurementError(f"{path} holds no result: pass a folder with one of {', '.join(FILES)} in it")
            for name, file in here.items():
                if name == MEASUREMENT_JSON and files.get(name, file) != file:
                    further[str(file.parent)] = Measurement.load(file.parent)
                    continue
                if name in files and files[name] != file:
                    raise MeasurementError(
                        f"{files[name]} and {file} are both given, but a report shows one {name}: leave one out"
                    )
                files[name] = file
        if MEASUREMENT_JSON not in files:
            raise MeasurementError(
                f"there is no measurement in {', '.join(map(str, paths))}: pass a folder that `tl-capacity measure"
                " --out` wrote"
            )
        folder = files[MEASUREMENT_JSON].parent
        measurement = Measurement.load(folder)
        spliced, said = splice_of(measurement, folder, splice or files.get(SPLICE_JSON))
        return cls(
            measurement,
            str(folder),
            DistillationRun.load(files[DISTILLATION_JSON].parent) if DISTILLATION_JSON in files else None,
            read_json(files[PROBES_JSON]) if PROBES_JSON in files else None,
            read_json(files[RECOVERABILITY_JSON]) if RECOVERABILITY_JSON in files else None,
            read_json(files[PLACEMENT_JSON]) if PLACEMENT_JSON in files else None,
            **({"run_folder": str(files[DISTILLATION_JSON].parent)} if DISTILLATION_JSON in files else {}),
            spliced=spliced,
            splice_note="".join(map(sentence, said)) if spliced is None else "",
            beside=further,
        )


def _results_in(path: Path) -> dict[str, Path]:
    """The known files at a path, in it, or one folder deeper; nearer ones go first."""
    if path.is_file():
        return {path.name: path} if path.name in FILES else {}
    files: dict[str, Path] = {}
    for folder in (path, *sorted(p for p in path.glob("*") if p.is_dir())):
        for name in FILES:
            if (folder / name).is_file():
                files.setdefault(name, folder / name)
    return files
