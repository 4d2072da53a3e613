"""What a report is made of: results read from folders and JSON files, those that recipes wrote checked row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from tl_capacity.distillation.run import JSON_NAME as DISTILLATION_JSON
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import MeasurementError
from tl_capacity.measurement import JSON_NAME as MEASUREMENT_JSON
from tl_capacity.measurement import Measurement
from tl_capacity.summary import Estimate

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


@dataclass(frozen=True)
class Results:
    """What a report is made of; all but the measurement may be missing.

    Attributes:
        folder: of the measurement, for the commands that the page suggests.
        probes, recoverability: as their recipes wrote them.
    """

    measurement: Measurement
    folder: str = "runs/measurement"
    run: DistillationRun | None = None
    probes: Any = None
    recoverability: Any = None

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Results:
        """Read results from folders or JSON files, in any order; a folder may hold them itself or one folder deeper, as `pythia-floor` writes them.

        Raises:
            MeasurementError: where there is no measurement, something is given twice or cannot be read, or a path holds nothing that is known.
        """
        found: dict[str, Path] = {}
        for path in paths:
            here = _results_in(path)
            if not here:
                raise MeasurementError(f"{path} holds no result: pass a folder with one of {', '.join(FILES)} in it")
            for name, file in here.items():
                if name in found and found[name] != file:
                    raise MeasurementError(f"{found[name]} and {file} are both given, but a report shows one {name}: leave one out")
                found[name] = file
        if MEASUREMENT_JSON not in found:
            raise MeasurementError(f"there is no measurement in {', '.join(map(str, paths))}: pass a folder that `tl-capacity measure --out` wrote")
        return cls(
            Measurement.load(found[MEASUREMENT_JSON].parent),
            str(found[MEASUREMENT_JSON].parent),
            DistillationRun.load(found[DISTILLATION_JSON].parent) if DISTILLATION_JSON in found else None,
            _json(found[PROBES_JSON]) if PROBES_JSON in found else None,
            _json(found[RECOVERABILITY_JSON]) if RECOVERABILITY_JSON in found else None,
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
        selectivity: accuracy above that of the control task; None where there was none.
    """

    concept: str
    kind: str
    model: str
    baseline: bool
    width: int
    accuracy: Estimate
    majority: float | None
    selectivity: Estimate | None


def probe_rows(content: Any) -> list[ProbeRow]:
    """The rows of a `probes.json`; those without a number, as of a probe that could not be fitted, are left out.

    Raises:
        MeasurementError: where none is left.
    """
    rows = content.get("probes") if isinstance(content, dict) else content
    found = []
    for row in rows if isinstance(rows, list) else []:
        accuracy = _finite(row.get("accuracy")) if isinstance(row, dict) and isinstance(row.get("width"), int) else None
        if accuracy is None:
            continue
        above = _finite(row.get("selectivity"))
        selectivity = None if above is None else Estimate(above, _finite(row.get("selectivity_low")), _finite(row.get("selectivity_high")))
        found.append(
            ProbeRow(
                concept=str(row.get("concept", "")),
                kind=str(row.get("kind", "probe")),
                model=str(row.get("model", "")),
                baseline=bool(row.get("baseline")),
                width=row["width"],
                accuracy=Estimate(accuracy, _finite(row.get("low")), _finite(row.get("high"))),
                majority=_finite(row.get("majority")),
                selectivity=selectivity,
            )
        )
    if not found:
        raise MeasurementError(f"{PROBES_JSON} has no accuracy at any width: probe again")
    return found


def concept_titles(content: Any) -> dict[str, str]:
    """What each concept of a `probes.json` tells apart, as `question or statement`; those whose classes it does not name are left out."""
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
    """

    student: str
    width: int
    hook: str
    tau: float
    n_features: int
    n_judged: int
    counts: Mapping[str, Estimate]


def recoverability_rows(content: Any) -> list[RecoveryRow]:
    """The rows of a `recoverability.json`, checked.

    Raises:
        MeasurementError: where they are none.
    """
    found = []
    for row in content if isinstance(content, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("width"), int) or _finite(row.get("kept")) is None:
            raise MeasurementError(f"{RECOVERABILITY_JSON} has a row without width and kept: it was altered, measure recoverability again")
        saved = row.get("intervals")
        intervals = saved if isinstance(saved, dict) else {}
        counts = {}
        for key in RECOVERED:
            if (value := _finite(row.get(key))) is not None:
                interval = intervals.get(INTERVALS.get(key, ""))
                low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
                counts[key] = Estimate(value, _finite(low), _finite(high))
        tau, features = _finite(row.get("tau")), int(_finite(row.get("n_features")) or 0)
        found.append(
            RecoveryRow(
                student=str(row.get("student", "")),
                width=row["width"],
                hook=str(row.get("hook", "")),
                tau=float("nan") if tau is None else tau,
                n_features=features,
                n_judged=int(_finite(row.get("n_judged")) or features),
                counts=counts,
            )
        )
    if not found:
        raise MeasurementError(f"{RECOVERABILITY_JSON} has no rows: measure recoverability again")
    return found


def _finite(value: Any) -> float | None:
    """A number, or None where it is none."""
    return float(value) if isinstance(value, (int, float)) and isfinite(value) else None


def _results_in(path: Path) -> dict[str, Path]:
    """The known files that a path is, holds, or holds one folder deeper; nearer ones go first."""
    if path.is_file():
        return {path.name: path} if path.name in FILES else {}
    found: dict[str, Path] = {}
    for folder in (path, *sorted(p for p in path.glob("*") if p.is_dir())):
        for name in FILES:
            if (folder / name).is_file():
                found.setdefault(name, folder / name)
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise MeasurementError(f"{path} cannot be read ({problem}): write it again") from problem
