"""What the entry point names: the hooks, each of which hands over its objects once. It imports nothing heavy, since
every command imports it.
"""

from __future__ import annotations

from collections.abc import Callable

from tl_capacity import CapacityLaw, ImportanceEstimator, hookimpl
from tl_capacity.interfaces import Concept, FloorPredictor, ModelFamily, Recipe
from tl_capacity_example.concepts import ASKS
from tl_capacity_example.estimator import MeanAblation
from tl_capacity_example.family import BLOOM
from tl_capacity_example.law import Antipodal
from tl_capacity_example.predictor import LostShare


@hookimpl
def register_importance_estimators(register: Callable[[ImportanceEstimator], None]) -> None:
    register(MeanAblation())


@hookimpl
def register_model_families(register: Callable[[ModelFamily], None]) -> None:
    register(BLOOM)


@hookimpl
def register_capacity_laws(register: Callable[[CapacityLaw], None]) -> None:
    register(Antipodal())


@hookimpl
def register_floor_predictors(register: Callable[[FloorPredictor], None]) -> None:
    register(LostShare())


@hookimpl
def register_concepts(register: Callable[[Concept], None]) -> None:
    register(ASKS)


@hookimpl
def register_recipes(register: Callable[[Recipe], None]) -> None:
    register(
        Recipe(
            "compare-importance",
            "How far two importance estimators agree about a measurement",
            "tl_capacity_example.recipe:main",
        )
    )
