"""The hook specifications: what a plugin may contribute. Each hook receives a `register` function and calls it once per
object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

# Named in annotations only: numpy and jaxtyping, which they need, are half of the time that the package's import takes.
if TYPE_CHECKING:
    from collections.abc import Callable

    from tl_capacity.interfaces import (
        CapacityLaw,
        Concept,
        FloorPredictor,
        ImportanceEstimator,
        ModelFamily,
        NamedModel,
        Recipe,
        TokenSource,
    )

hookspec = pluggy.HookspecMarker("tl_capacity")
hookimpl = pluggy.HookimplMarker("tl_capacity")


@hookspec
def register_importance_estimators(register: Callable[[ImportanceEstimator], None]) -> None:
    """Add ways to measure how much a feature matters."""


@hookspec
def register_capacity_laws(register: Callable[[CapacityLaw], None]) -> None:
    """Add laws that say how many features a dimension holds."""


@hookspec
def register_floor_predictors(register: Callable[[FloorPredictor], None]) -> None:
    """Add ways to predict the loss that students of a width end at."""


@hookspec
def register_model_families(register: Callable[[ModelFamily], None]) -> None:
    """Add architectures whose Hugging Face modules can be tapped directly."""


@hookspec
def register_models(register: Callable[[NamedModel], None]) -> None:
    """Add models that load by a short name without a hub, and the SAEs that belong to them."""


@hookspec
def register_token_sources(register: Callable[[TokenSource], None]) -> None:
    """Add places to read documents from."""


@hookspec
def register_concepts(register: Callable[[Concept], None]) -> None:
    """Add labelled texts for probes."""


@hookspec
def register_recipes(register: Callable[[Recipe], None]) -> None:
    """Add experiments for `tl-capacity run`."""
