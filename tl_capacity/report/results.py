"""What a report is made of: results read from folders and JSON files, those that recipes wrote checked row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from tl_capacity.distillation.run import JSON_NAME as DISTILLATION_JSON
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import MeasurementError
from tl_capacity.measurement.folder import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.results.estimate import Estimate

PROBES_JSON, RECOVERABILITY_JSON = "probes.json", "recoverability.json"
FILES = (MEASUREMENT_JSON, DISTILLATION_JSON, PROBES_JSON, RECOVERABILITY_JSON)
RECOVERED = {
    "kept": "kept by the student",
    "kept_teacher": "in the teacher",
    "kept_random": "with random weights",
    "kept_pca": "in the teacher's leading components",
    "budget": "budget d·g(α)",
    "equilibrium": "budget by the equilibrium law",
}
"""The numbers of a recoverability row that the page shows."""
INTERVALS = {"kept": "student", "kept_teacher": "teacher", "kept_random": "random", "kept_pca": "pca"}
"""Under which names their intervals are saved."""
READOUTS = {"random": "random weights", "student": "student", "teacher": "teacher"}
"""Readouts whose medians the page shows, from the floor to the ceiling."""
SCHEMA = 1
"""The newest of either file that is understood."""
LARGEST = 10**15
"""No count, width or score comes near it."""
TAU_KEY = re.compile(r"0\.\d{1,9}")


@dataclass(frozen=True)
class Results:
    """What a report is made of; all but the measurement may be missing.

    Attributes:
        folder: of the measurement, for the commands that the page suggests.
        probes, recoverability: as their recipes wrote them.
        run_folder: of the distillation, for the same commands.
    """

    measurement: Measurement
    folder: str = "runs/measurement"
    run: DistillationRun | None = None
    probes: Any = None
    recoverability: Any = None
    run_folder: str = "runs/students"

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Results:
        """Read results from folders or JSON files, in any order; a folder may hold them itself or one folder deeper, as
        `pythia-floor` writes them.

        Raises:
            MeasurementError: where there is no measurement, something is given twice or cannot be read, or a path holds
                nothing that is known.
        """
        files: dict[str, Path] = {}
        for path in paths:
            here = _results_in(path)
            if not here:
                raise MeasurementError(f"{path} holds no result: pass a folder with one of {', '.join(FILES)} in it")
            for name, file in here.items():
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
        return cls(
            Measurement.load(files[MEASUREMENT_JSON].parent),
            str(files[MEASUREMENT_JSON].parent),
            DistillationRun.load(files[DISTILLATION_JSON].parent) if DISTILLATION_JSON in files else None,
            _json(files[PROBES_JSON]) if PROBES_JSON in files else None,
            _json(files[RECOVERABILITY_JSON]) if RECOVERABILITY_JSON in files else None,
            **({"run_folder": str(files[DISTILLATION_JSON].parent)} if DISTILLATION_JSON in files else {}),
        )


@dataclass(frozen=True)
class ProbeRow:
    """One probe of a `probes.json`.

    Attributes:
        concept: what it tells apart.
        kind: what it reads: the trained model or student, or a baseline.
        model: the model's or student's name.
        baseline: whether it is one.
        width: of the model, or of the student that the baseline stands beside.
        accuracy: on the test split, with its 95% interval.
        majority: accuracy of always saying the commoner class.
        auroc: on the test split, with its 95% interval; None where a file lacks it.
        control: accuracy on the control task; None where there was none.
        selectivity: accuracy above that of the control task; None where there was none.
    """

    concept: str
    kind: str
    model: str
    baseline: bool
    width: int
    accuracy: Estimate
    auroc: Estimate | None
    majority: float | None
    control: float | None
    selectivity: Estimate | None


def probe_rows(content: Any) -> list[ProbeRow]:
    """The rows of a `probes.json`; those without a number, as of a probe that could not be fitted, are left out.

    Raises:
        MeasurementError: where none is left, the file is of a newer version, or a width or number is none that a probe
            can have.
    """
    rows = content.get("probes") if isinstance(content, dict) else content
    _check_schema(PROBES_JSON, content)
    found = []
    for row in rows if isinstance(rows, list) else []:
        accuracy = (
            _estimate(PROBES_JSON, row, "accuracy", "low", "high") if isinstance(row, dict) and "width" in row else None
        )
        if accuracy is None:
            continue
        found.append(
            ProbeRow(
                concept=str(row.get("concept", "")),
                kind=str(row.get("kind", "probe")),
                model=str(row.get("model", "")),
                baseline=bool(row.get("baseline")),
                width=_width(PROBES_JSON, row),
                accuracy=accuracy,
                auroc=_estimate(PROBES_JSON, row, "auroc", "auroc_low", "auroc_high"),
                majority=_finite(PROBES_JSON, row.get("majority")),
                control=_finite(PROBES_JSON, row.get("control_accuracy")),
                selectivity=_estimate(PROBES_JSON, row, "selectivity", "selectivity_low", "selectivity_high"),
            )
        )
    if not found:
        raise MeasurementError(f"{PROBES_JSON} has no accuracy at any width: probe again")
    return found


def concept_titles(content: Any) -> dict[str, str]:
    """What each concept of a `probes.json` tells apart, as `question or statement`; those whose classes it does not
    name are left out.
    """
    concepts = content.get("concepts") if isinstance(content, dict) else None
    found = {}
    for each in concepts if isinstance(concepts, list) else []:
        classes = each.get("classes") if isinstance(each, dict) else None
        if isinstance(classes, list) and classes:
            found[str(each.get("name", ""))] = " or ".join(map(str, classes))
    return found


@dataclass(frozen=True)
class RecoveryRow:
    """One student at one hook point, as `recoverability.json` has it.

    Attributes:
        n_features, n_judged: alive features, and those that fired often enough in the held-out text to be judged.
        counts: those numbers of `RECOVERED` that are there.
        overlap: shares of the predicted and of all judged features that are kept, as `Recovery.overlap` names them.
        medians: over judged features, of `average_precision` and `r2`, by readout.
        by_tau: at each τ, how many features each readout finds.
    """

    student: str
    width: int
    hook: str
    tau: float
    n_features: int
    n_judged: int
    counts: Mapping[str, Estimate]
    overlap: Mapping[str, float] = field(default_factory=dict)
    medians: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    by_tau: Mapping[float, Mapping[str, float]] = field(default_factory=dict)


def recoverability_rows(content: Any) -> list[RecoveryRow]:
    """The rows of a `recoverability.json`, checked.

    Raises:
        MeasurementError: where they are none, the file is of a newer version, or a width or number is none that a row
            can have.
    """
    if not isinstance(content, list) or not content:
        raise MeasurementError(
            f"{RECOVERABILITY_JSON} has no rows, as it is no list of students: measure recoverability again"
        )
    found = []
    for row in content:
        _check_schema(RECOVERABILITY_JSON, row)
        row = row if isinstance(row, dict) else {}
        numbers = _numbers(RECOVERABILITY_JSON, row)
        if "width" not in row or "kept" not in numbers:
            raise MeasurementError(
                f"{RECOVERABILITY_JSON} has a row without width and kept: it was altered, measure recoverability again"
            )
        width = _width(RECOVERABILITY_JSON, row)
        intervals, counts = _object(row, "intervals"), {}
        for key in RECOVERED:
            if key in numbers:
                interval = intervals.get(INTERVALS.get(key, ""))
                ends = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
                counts[key] = Estimate(numbers[key], *(_finite(RECOVERABILITY_JSON, end) for end in ends))
        features, by_tau = int(numbers.get("n_features", 0)), _object(row, "by_tau")
        readouts = {
            readout: _numbers(RECOVERABILITY_JSON, _object(_object(row, "readouts"), readout)) for readout in READOUTS
        }
        found.append(
            RecoveryRow(
                student=str(row.get("student", "")),
                width=width,
                hook=str(row.get("hook", "")),
                tau=numbers.get("tau", float("nan")),
                n_features=features,
                n_judged=int(numbers.get("n_judged", features)),
                counts=counts,
                overlap=_numbers(RECOVERABILITY_JSON, _object(row, "overlap")),
                medians={
                    figure: {readout: values[figure] for readout, values in readouts.items() if figure in values}
                    for figure in ("average_precision", "r2")
                },
                by_tau={
                    float(at): _numbers(RECOVERABILITY_JSON, _object(by_tau, at))
                    for at in by_tau
                    if TAU_KEY.fullmatch(at)
                },
            )
        )
    return found


def _check_schema(file: str, content: Any) -> None:
    """Raises `MeasurementError` where a file, or a row of it, is of a newer version."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise MeasurementError(
            f"{file} has schema {_quoted(schema)}, and this version reads up to {SCHEMA}: upgrade tl-capacity"
        )


def _width(file: str, row: Mapping[str, Any]) -> int:
    """The width of a row.

    Raises:
        MeasurementError: where it is no width.
    """
    width = row["width"]
    if type(width) is not int or not 1 <= width <= LARGEST:
        raise MeasurementError(
            f"{file} has the width {_quoted(width)}, which is no whole number of dimensions: it was altered, write it"
            " again"
        )
    return width


def _estimate(file: str, row: Mapping[str, Any], name: str, low: str, high: str) -> Estimate | None:
    """A number of a row with its interval; None where there is no number."""
    value, *ends = (_finite(file, row.get(key)) for key in (name, low, high))
    return None if value is None else Estimate(value, *ends)


def _numbers(file: str, content: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are numbers."""
    return {name: number for name, value in content.items() if (number := _finite(file, value)) is not None}


def _object(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within another, empty where there is none."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _finite(file: str, value: Any) -> float | None:
    """A number, or None where it is none.

    Raises:
        MeasurementError: where it is too large to be a result.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (isinstance(value, int) or isfinite(value))
    ):
        return None
    if abs(value) > LARGEST:
        raise MeasurementError(
            f"{file} has the number {_quoted(value)}, which no result can be: it was altered, write it again"
        )
    return float(value)


def _quoted(value: Any) -> str:
    """A value as it is shown in an error, of very many digits only the first."""
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}…"


def _results_in(path: Path) -> dict[str, Path]:
    """The known files that a path is, holds, or holds one folder deeper; nearer ones go first."""
    if path.is_file():
        return {path.name: path} if path.name in FILES else {}
    files: dict[str, Path] = {}
    for folder in (path, *sorted(p for p in path.glob("*") if p.is_dir())):
        for name in FILES:
            if (folder / name).is_file():
                files.setdefault(name, folder / name)
    return files


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise MeasurementError(f"{path} cannot be read ({problem}): write it again") from problem
