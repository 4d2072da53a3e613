"""Candidates: everything that might explain observed floors, predictions of the measured features as well as rivals
that know nothing of features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.predict.curve import Curve
from tl_capacity.predict.floors import hook_floors
from tl_capacity.predict.laws import context_at, knows_enough
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement

NATS = "nats per token"
"""The unit of the observed floors. A prediction in it needs no C."""


@dataclass(frozen=True)
class Points:
    """Observed floors, one per student [student].

    Attributes:
        widths: d_S.
        floors: in nats per token.
        parameters: of the students' bodies, without embeddings and head.
    """

    widths: NDArray[np.float64]
    floors: NDArray[np.float64]
    parameters: NDArray[np.float64]

    def take(self, places: NDArray[Any]) -> Points:
        """Some of the points, by place or by mask."""
        return Points(self.widths[places], self.floors[places], self.parameters[places])


@dataclass(frozen=True)
class Candidate:
    """One explanation of the observed floors: observed = C · x + B, or C · x^−s + B with the exponent s free.

    Attributes:
        name: what explains them.
        kind: "prediction" (refined floor), "naive floor" or "rival".
        x: x [student] of some points.
        free_exponent: whether s is fitted too.
        as_is: whether C = 1 and only B is fitted: the claim of a prediction in nats per token.
        hook, importance, law, unit: of a prediction.
    """

    name: str
    kind: str
    x: Callable[[Points], NDArray[np.float64]]
    free_exponent: bool = False
    as_is: bool = False
    hook: str = ""
    importance: str = ""
    law: str = ""
    unit: str = ""


RIVALS = (
    Candidate("constant", "rival", lambda points: np.zeros(len(points.widths))),
    Candidate("1/d", "rival", lambda points: 1 / points.widths),
    Candidate("power law in d", "rival", lambda points: points.widths, free_exponent=True),
    Candidate("power law in parameters", "rival", lambda points: points.parameters, free_exponent=True),
)
"""What knows nothing of features. The last is the scaling law of Kaplan et al. 2020 (arXiv:2001.08361), parameters
without embeddings, plus a constant.
"""


@dataclass(frozen=True)
class Prediction:
    """Predicted floors [width] of one hook point, importance and law, and the naive ones beside them."""

    hook: str
    importance: str
    law: str
    unit: str
    floors: Mapping[int, Estimate]
    naive: Mapping[int, float]


def predictions_of(measurement: Measurement, widths: Sequence[int], asked: tuple[str, str, str]) -> list[Prediction]:
    """The predictions of every hook point, every importance that the measurement allows, and every law.

    Only the one that is asked for (hook, importance, law) has intervals, as they take long.
    """
    predictions = []
    for hook in measurement:
        for estimator in plugins().importance_estimators:
            if not _is_measured(hook, estimator.name):
                continue
            at = context_at(hook, hook.importance(estimator.name), hook.summary.alpha.value)
            curve = Curve(hook.hook, at.importance, at.alpha, at.hook_width, at.teacher_width)
            for law in plugins().capacity_laws:
                names = (hook.hook, estimator.name, law.name)
                if names != asked and not knows_enough(law, at):
                    continue
                floors = (
                    hook_floors(hook, widths, estimator.name, law) if names == asked else curve.floors(widths, law.name)
                )
                refined = {floor.width: floor.predicted_floor for floor in floors}
                naive = {floor.width: floor.naive_floor.value for floor in floors}
                predictions.append(Prediction(*names, hook.unit(estimator.name), refined, naive))
    return predictions


def candidates_of(predictions: Sequence[Prediction]) -> list[Candidate]:
    """The refined floor of each prediction, and the naive one of each hook point and law.

    The naive one is that of the first importance: others change little but a factor.
    """
    candidates, with_naive = [], set[tuple[str, str]]()
    for prediction in predictions:
        hook, law = prediction.hook, prediction.law
        refined = Candidate(
            f"{prediction.importance}, {law} at {hook}",
            "prediction",
            _looked_up({width: floor.value for width, floor in prediction.floors.items()}),
            hook=hook,
            importance=prediction.importance,
            law=law,
            unit=prediction.unit,
        )
        candidates.append(refined)
        if prediction.unit == NATS:
            candidates.append(replace(refined, name=f"{refined.name}, C = 1", as_is=True))
        if (hook, law) not in with_naive:
            with_naive.add((hook, law))
            naive = _looked_up(prediction.naive)
            candidates.append(Candidate(f"naive floor, {law} at {hook}", "naive floor", naive, hook=hook, law=law))
    return candidates


def without_default_law(text: str) -> str:
    """A candidate's name, or a sentence with such names, without the capacity law where it is the default one."""
    return text.replace(f", {plugins().capacity_laws.default.name}", "")


def _is_measured(hook: HookMeasurement, importance: str) -> bool:
    try:
        hook.estimator(importance)
    except MeasurementError:
        return False
    return True


def _looked_up(floors: Mapping[int, float]) -> Callable[[Points], NDArray[np.float64]]:
    return lambda points: np.array([floors[int(width)] for width in points.widths])
