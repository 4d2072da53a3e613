"""Predictors of a toy model's floor: the theory's closed forms, every registered capacity law, and the measured kept
set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import kept_features, knows_enough

TRANSITION = 0.15
"""Half-width of the smooth band, as a share of the budget.

It is the middle of the 10 to 20% over which the paper sees the transition at d* smeared out.
"""


@dataclass(frozen=True)
class Case:
    """What a predictor may look at. Features are in order of importance.

    Attributes:
        importance: Iᵢ·E[xᵢ²], the loss of a feature that is put out as 0.
        variance: Iᵢ·Var[xᵢ], the loss of a feature that is put out as its mean, which the bias can do.
        alpha, width: α and d_S.
        kept: which features the trained model keeps; only the measured predictors look at it.
        teacher_width: d_T; 0 for a student of the data itself.
    """

    importance: Float[np.ndarray, " feature"]
    variance: Float[np.ndarray, " feature"]
    alpha: float
    width: int
    kept: Bool[np.ndarray, " feature"]
    teacher_width: int = 0


@dataclass(frozen=True)
class Predictor:
    """One way to predict the floor that a model will reach.

    Attributes:
        drawn: whether figures show it.
    """

    name: str
    summary: str
    predict: Callable[[Case], float]
    drawn: bool = False


def smooth_band_floor(
    importance: NDArray[np.float64], width: int, alpha: float, transition: float = TRANSITION
) -> float:
    """The refined floor with a soft cut.

    The lost share of feature i rises from 0 to 1 as i passes from (1−δ)·d·g(α) to (1+δ)·d·g(α).

    That is the refined floor averaged over budgets that lie evenly within ±δ of d·g(α).

    Raises:
        ValueError: unless 0 < δ < 1, and as in `theory.refined_floor`.
    """
    if not 0 < transition < 1:
        raise ValueError(f"transition = {transition:.8g} is outside its domain 0 < δ < 1")
    budget = theory.budget(width, alpha)
    ordered = np.sort(importance)[::-1]
    rank = np.arange(1, len(ordered) + 1) - 0.5
    lost = (
        np.clip((rank - (1 - transition) * budget) / (2 * transition * budget), 0, 1)
        if budget > 0
        else np.ones(len(ordered))
    )
    return float(lost @ ordered)


def law_floor(law: CapacityLaw, case: Case, charged: NDArray[np.float64]) -> float:
    """The sum charged for the features beyond ⌊d·ĝ⌋, with ĝ from a capacity law that sees the importances.

    NaN if the law needs a teacher's width and there is no teacher.
    """
    at = CapacityContext(case.alpha, case.importance, case.teacher_width, case.teacher_width)
    if not knows_enough(law, at):
        return float("nan")
    return float(theory.lost_importance(charged, kept_features(law, case.width, at)))


def _floor_by_law(law: CapacityLaw, case: Case) -> float:
    return law_floor(law, case, case.importance)


def _variance_floor_by_law(law: CapacityLaw, case: Case) -> float:
    return law_floor(law, case, case.variance)


def predictors() -> tuple[Predictor, ...]:
    """All predictors; those of plugins come last."""
    laws = plugins().capacity_laws
    others = [law for law in laws if law is not laws.default]
    return (
        Predictor(
            "naive",
            "every feature equally important",
            lambda c: float(theory.naive_floor(c.importance, c.width, c.alpha)),
        ),
        Predictor(
            "refined",
            "the paper's: the ⌊d·g(α)⌋ most important are kept",
            lambda c: float(theory.refined_floor(c.importance, c.width, c.alpha)),
            drawn=True,
        ),
        Predictor(
            "smooth band",
            f"refined, with the cut smeared over ±{TRANSITION:.0%}",
            lambda c: smooth_band_floor(c.importance, c.width, c.alpha),
            drawn=True,
        ),
        *(
            Predictor(
                law.name,
                f"{law.summary}; ⌊d·ĝ⌋ kept",
                partial(_floor_by_law, law),
                drawn=True,
            )
            for law in others
        ),
        *(
            Predictor(
                f"{name}, Var",
                f"{name}, lost features charged Var[x]",
                partial(_variance_floor_by_law, law),
            )
            for name, law in [("refined", laws.default), *((law.name, law) for law in others)]
        ),
        Predictor(
            "measured set",
            "the features that the trained model keeps; nothing fitted",
            lambda c: float(c.importance[~c.kept].sum()),
            drawn=True,
        ),
        Predictor(
            "measured set, Var",
            "measured set, lost features charged Var[x]",
            lambda c: float(c.variance[~c.kept].sum()),
        ),
    )
