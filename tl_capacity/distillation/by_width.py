"""Observed floors by width: what the students of each width reached, whatever their seeds, and whether they are of the
teacher that was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.observed import OBSERVED, ObservedFloor
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.results.estimate import Estimate

ByWidth = Mapping[int, Sequence[Estimate]]
"""Observed floors in nats per token of each student of a width, in ascending order of the widths."""


def check_students(
    measurement: Measurement, run: DistillationRun, advice: str = "pass students of the teacher that was measured"
) -> None:
    """Refuse students of another teacher than was measured, and such as are still trained.

    Args:
        advice: what to do about another teacher.

    Raises:
        MeasurementError: names both teachers.
    """
    if not run.complete:
        raise MeasurementError("the distillation has not ended: resume it with --resume")
    if run.teacher != measurement.provenance.model:
        raise MeasurementError(
            f"the measurement is of {measurement.provenance.model!r} and the distillation of {run.teacher!r}: {advice}"
        )


def floors_by_width(floors: Iterable[ObservedFloor], which: str) -> dict[int, tuple[Estimate, ...]]:
    """The observed floors of the students of each width, controls left out.

    Args:
        which: "fit" for L∞ of each curve's fit, or "last_tenth" for the mean over the last tenth of training.

    Raises:
        CapacityError: where `which` is neither, or there is no student but the control.
    """
    if which not in OBSERVED:
        raise CapacityError(f"{which!r} is no observed floor: choose one of {', '.join(OBSERVED)}")
    students = sorted((floor for floor in floors if floor.start != "teacher"), key=lambda floor: floor.width)
    if not students:
        raise MeasurementError("the distillation has no students but the control: distil some widths")
    by_width: dict[int, tuple[Estimate, ...]] = {}
    for student in students:
        by_width[student.width] = (*by_width.get(student.width, ()), student.taken_as(which))
    return by_width


def drawn_means(students: Sequence[Estimate], replicates: int) -> NDArray[np.float64]:
    """The mean of some students' floors, drawn anew [replicate]: students with replacement, and each one's floor within
    its own interval. A mean is not negative, as no KL is.
    """
    random = np.random.default_rng(0)
    values = np.array([student.value for student in students])
    spreads = np.array([_spread(student) for student in students])
    drawn = random.integers(0, len(students), size=(replicates, len(students)))
    noise = random.standard_normal(drawn.shape)
    return np.asarray(np.maximum((values[drawn] + spreads[drawn] * noise).mean(1), 0.0))


def _spread(student: Estimate) -> float:
    """The standard deviation of which a 95% interval would be; 0 without an interval."""
    return 0.0 if student.low is None or student.high is None else (student.high - student.low) / (2 * 1.96)
