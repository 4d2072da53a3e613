"""HookMeasurement: one SAE at one hook point, with its figures and importances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError
from tl_capacity.interfaces import BASES, RESIDUAL_STREAM, ImportanceEstimator
from tl_capacity.plugins import plugins
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.summary import FeatureSummary

NEURONPEDIA = "https://neuronpedia.org"


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
        d_model: dimensions of the model's residual stream; None where it is not known, as of version 0.1.
        notes: how the model or the text differs from what the SAE says it was trained on, a sentence each.
        linear: whether the SAE writes the sum of its decoder vectors times its latents; false where its `decode` undoes
            a normalisation of each token. None where it is not known, as of version 0.1.
        neuronpedia_id: under which name Neuronpedia shows the SAE's features; None where the SAE does not say.
    """

    hook: str
    sae: str
    sae_digest: str
    architecture: str
    width: int
    summary: FeatureSummary
    estimators: tuple[str, ...] = ()
    d_model: int | None = None
    notes: tuple[str, ...] = ()
    linear: bool | None = None
    neuronpedia_id: str | None = None

    @property
    def is_basis(self) -> bool:
        """Whether the features are the vectors of a basis, not of an SAE."""
        return self.architecture.split(",")[0] in BASES

    @property
    def teacher_width(self) -> int:
        """d_T, the dimensions of the model's residual stream. The model is the teacher of any student distilled from
        it. 0 if unknown.
        """
        if self.d_model is None and RESIDUAL_STREAM.fullmatch(self.hook):
            return self.width
        return self.d_model or 0

    @property
    def kind(self) -> str:
        """The word for the dictionary in a sentence: SAE or basis."""
        return "basis" if self.is_basis else "SAE"

    @property
    def n_alive(self) -> Estimate:
        """F, the number of alive features, with its interval over documents."""
        return self.summary.n_alive

    @property
    def d_star(self) -> Estimate:
        """d* = F/g(α), the critical width in dimensions, with its interval over documents."""
        return self.summary.critical_width

    @property
    def feature_pages(self) -> str:
        """The address of Neuronpedia's page for a feature, without the feature's number. Empty if the SAE's metadata
        names none.
        """
        return f"{NEURONPEDIA}/{quote(self.neuronpedia_id)}/" if self.neuronpedia_id else ""

    def importance(self, name: str | None = None) -> NDArray[np.float64]:
        """Importance [feature] of the alive features, in the SAE's order and the estimator's unit. By default the
        default estimator's.

        Raises:
            CapacityError: where no such estimator is registered, or it had to be named when measuring and was not.
        """
        estimator = self.estimator(name)
        return self.summary.importance(estimator.compute, estimator.name)

    def ranked(self, importance: str | None = None) -> NDArray[np.int64]:
        """Numbers of the alive features in the SAE, most important first. Of equals, the smaller number comes first."""
        order = np.argsort(-self.importance(importance), kind="stable")
        return np.asarray(np.flatnonzero(self.summary.alive)[order], dtype=np.int64)

    def unit(self, name: str | None = None) -> str:
        """The unit of an importance. A predicted floor is a sum of importances, so it has the same unit.

        Latents of an SAE that normalises each token are in units of the normalised token, whatever the estimator says.
        """
        estimator = self.estimator(name)
        inside = estimator.compares_with_reconstruction_error and self.linear is False
        return f"normalised {estimator.unit}" if inside else str(estimator.unit)

    def estimator(self, name: str | None = None) -> Any:
        """The registered estimator of that name, or the default one. It is checked to have the sums it needs.

        Raises:
            MeasurementError: where it accumulated nothing here, or only its sums are here and its plugin is not.
            PluginError: where no plugin ever registered one of that name.
        """
        registered = plugins().importance_estimators
        absent = [known for known in self.estimators if known not in registered]
        if absent and name is not None and name not in registered:
            raise MeasurementError(
                f"no loaded plugin has the importance estimator {name!r}; {self.hook} was measured with"
                f" {', '.join(map(repr, absent))}, whose plugin is not loaded: pass its file, as tl-capacity --plugin"
                " FILE …, or register it in the session"
            )
        estimator = registered.named(name)
        accumulates = type(estimator).start is not ImportanceEstimator.start
        if accumulates and estimator.name not in self.estimators:
            raise MeasurementError(
                f"{self.hook} was measured without the importance estimator {estimator.name!r}: measure again with"
                f" --importance {estimator.name}"
            )
        return estimator
