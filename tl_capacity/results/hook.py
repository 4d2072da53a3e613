"""HookMeasurement: one SAE at one hook point, its figures and its importances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError
from tl_capacity.interfaces import BASES, ImportanceEstimator
from tl_capacity.plugins import plugins
from tl_capacity.results.summary import FeatureSummary


@dataclass(frozen=True)
class HookMeasurement:
    """One SAE at one hook point.

    Attributes:
        hook: the hook point's name.
        sae: the SAE's name or folder.
        sae_digest: SHA-256 of its weights.
        architecture: SAELens' name for its kind.
        width: the hook point's width d.
        summary: the figures, with intervals.
        estimators: importance estimators that accumulated a state of their own.
    """

    hook: str
    sae: str
    sae_digest: str
    architecture: str
    width: int
    summary: FeatureSummary
    estimators: tuple[str, ...] = ()

    @property
    def is_basis(self) -> bool:
        """Whether the features are the vectors of a basis instead of an SAE's."""
        return self.architecture.split(",")[0] in BASES

    @property
    def kind(self) -> str:
        """What a sentence calls the dictionary: SAE or basis."""
        return "basis" if self.is_basis else "SAE"

    def importance(self, name: str | None = None) -> NDArray[np.float64]:
        """Importance [feature] of the alive features, in the SAE's order, in the estimator's unit; by the default
        estimator where none is named.

        Raises:
            CapacityError: where no such estimator is registered, or it had to be named when measuring and was not.
        """
        estimator = self.estimator(name)
        return self.summary.importance(estimator.compute, estimator.name)

    def ranked(self, importance: str | None = None) -> NDArray[np.int64]:
        """Numbers of the alive features in the SAE, the most important first; of equals the one with the smaller
        number.
        """
        order = np.argsort(-self.importance(importance), kind="stable")
        return np.asarray(np.flatnonzero(self.summary.alive)[order], dtype=np.int64)

    def estimator(self, name: str | None = None) -> Any:
        """The registered estimator of that name, or the default one, checked to have accumulated what it needs."""
        estimator = plugins().importance_estimators.named(name)
        accumulates = type(estimator).start is not ImportanceEstimator.start
        if accumulates and estimator.name not in self.estimators:
            raise MeasurementError(
                f"{self.hook} was measured without the importance estimator {estimator.name!r}: measure again with"
                f" --importance {estimator.name}"
            )
        return estimator
