"""Observed floors by width, over all seeds; students of another teacher than the measured one are refused."""

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
"""Observed floors of the students of each width, in nats per token; the widths ascend."""


def check_students(
    measurement: Measurement, run: DistillationRun, advice: str = "pass students of the measured teacher"
) -> None:
    """Refuse students of another teacher than the measured one, and students that are still training.

    Args:
        advice: what to do about another teacher.

    Raises:
        MeasurementError: names both teachers.
    """
    if not run.complete:
        raise MeasurementError("the distillation has not ended: resume it with --resume")
    if run.teacher != measurement.provenance.model:
        raise MeasurementError(
            f"the measurement is of {measurement.provenance.model!r}, but the distillation is of {run.teacher!r}:"
            f" {advice}"
        )


def floors_by_width(floors: Iterable[ObservedFloor], which: str) -> dict[int, tuple[Estimate, ...]]:
    """The students' observed floors by width, without the controls.

    Args:
        which: "fit" for L∞ of each curve's fit, or "last_tenth" for the mean over the last tenth of training.

    Raises:
        CapacityError: where `which` is neither, or there is no student but the control.
    """
    if which not in OBSERVED:
        raise CapacityError(f"{which!r} is not a way to read the observed floor: choose one of {', '.join(OBSERVED)}")
    students = sorted((floor for floor in floors if floor.start != "teacher"), key=lambda floor: floor.width)
    if not students:
        raise MeasurementError("the distillation has only the control student: distil some widths")
    by_width: dict[int, tuple[Estimate, ...]] = {}
    for student in students:
        by_width[student.width] = (*by_width.get(student.width, ()), student.taken_as(which))
    return by_width


def drawn_means(students: Sequence[Estimate], replicates: int) -> NDArray[np.float64]:
    """Bootstrap replicates [replicate] of the mean of some students' floors.

    Students are drawn with replacement, and each floor is drawn within its own interval. A mean is never negative, as a
    KL never is.
    """
    random = np.random.default_rng(0)
    values = np.array([student.value for student in students])
    spreads = np.array([_spread(student) for student in students])
    drawn = random.integers(0, len(students), size=(replicates, len(students)))
    noise = random.standard_normal(drawn.shape)
    return np.asarray(np.maximum((values[drawn] + spreads[drawn] * noise).mean(1), 0.0))


def _spread(student: Estimate) -> float:
    """The standard deviation that an estimate's 95% interval implies; 0 if it has no interval."""
    return 0.0 if student.low is None or student.high is None else (student.high - student.low) / (2 * 1.96)
