"""Floor predictors: what a dictionary's features predict, and rivals that know nothing of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tl_capacity import theory
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import FloorContext, FloorPredictor, WithInterval

SPLICE = "tl-capacity run splice"
RIVALS = "tl-capacity run rivals"


class Importance(FloorPredictor):
    """Σ_{i > F_S} I_(i), the importance of the features that a width loses: the paper's refined floor
    (arXiv:2604.04037). In nats per token if the importance is.
    """

    name = "importance"
    unit = "that of the importance"
    summary = "Σ importance of the lost features, the paper's refined floor"
    constants = 1
    is_default = True

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float]:
        lost: Sequence[float] = theory.lost_importance(at.features.importance, [at.kept(w) for w in widths]).tolist()
        return lost

    def unit_at(self, at: FloorContext) -> str:
        return at.unit


class Naive(Importance):
    """Σ I · max(0, 1 − d_S · g(α)/F), with every feature equally important (arXiv:2604.04037).

    Another importance changes little but the factor, so it is said once for each law.
    """

    name = "naive"
    summary = "share of the features that are lost, times Σ importance"
    varies_with = ("hook", "law")

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float]:
        total, features = float(at.features.importance.sum()), at.features.n_features
        return [total * max(0.0, 1 - at.budget(width) / features) for width in widths]


class Splice(FloorPredictor):
    """KL(teacher ‖ teacher with only the kept features at one hook point), read from a curve computed before."""

    name = "splice"
    summary = "KL of the teacher with only the kept features"
    needs_model = True
    made_by = SPLICE

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[WithInterval] | None:
        curve = at.curve
        return None if curve is None else [curve.at(min(at.kept(width), curve.alive)) for width in widths]


class Run(FloorPredictor):
    """A floor for which the teacher was run before, read from its forecasts."""

    needs_model = True
    knows_features = False
    made_by = RIVALS

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float | WithInterval | None] | None:
        known = at.forecasts.get(self.name)
        return None if known is None else [known.get(width) for width in widths]


class PCASplice(Run):
    """KL(teacher ‖ teacher whose activation at one hook point is projected onto its d_S
    leading principal components).
    """

    name = "pca_splice"
    summary = "KL of the teacher projected on its d_S leading components"


class TruncatedStart(Run):
    """KL(teacher ‖ student before its first step). The student is cut out of the teacher along its principal
    components.
    """

    name = "truncated_start"
    summary = "KL of the truncated student before its first step"
    varies_with = ()


class RankBound(Run):
    """The least KL that logits of rank d_S can have, as far as the optimiser found it. It is a lower bound for every
    student of that width (exponential-family PCA, Collins et al. 2001; arXiv:2404.07647).
    """

    name = "rank_bound"
    summary = "least KL of logits of rank d_S, as far as an optimiser found it"
    varies_with = ()
    is_bound = True


class PCATail(Run):
    """Σ_{j > d_S} λ_j, the variance that d_S principal components of the activation leave out."""

    name = "pca_tail"
    unit = "activation²"
    summary = "variance outside the d_S leading components"
    constants = 1
    needs_model = False

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float | WithInterval | None] | None:
        if at.spectrum is None:
            return super().floors(widths, at)
        left = np.concatenate([np.cumsum(at.spectrum[::-1])[::-1], [0.0]])
        return [float(left[min(width, len(at.spectrum))]) for width in widths]


class InWidth(FloorPredictor):
    """A shape that depends only on the width."""

    knows_features = False
    varies_with = ()
    constants = 1


class Constant(InWidth):
    """The same floor at every width. Any other predictor must beat it."""

    name = "constant"
    unit = "1"
    summary = "the same floor at every width"

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float]:
        return [1.0 for _ in widths]


class OneOverWidth(InWidth):
    """1/d_S, the loss of superposition by interference (Liu, Liu & Gore 2025, arXiv:2505.10465)."""

    name = "1/d"
    unit = "1/dimension"
    summary = "1/d_S, interference of features in superposition"

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float]:
        return [1 / width for width in widths]


class OneOverRootWidth(InWidth):
    """1/√d_S."""

    name = "1/√d"
    unit = "1/√dimension"
    summary = "1/√d_S"

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float]:
        return [width**-0.5 for width in widths]


class PowerOfWidth(OneOverWidth):
    """d_S^−s with the exponent s fitted."""

    name = "power law in d"
    summary = "d_S^−s, s fitted"
    constants = 2
    exponent_is_free = True


class PowerOfParameters(InWidth):
    """P^−s with the exponent s fitted, where P is the number of the student's parameters without embeddings and head:
    the scaling law of Kaplan et al. 2020 (arXiv:2001.08361).
    """

    name = "power law in parameters"
    unit = "1/parameter"
    summary = "parameters^−s, s fitted (Kaplan et al. 2020)"
    constants = 2
    exponent_is_free = True
    made_by = "tl-capacity run distill"

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float | None] | None:
        known = at.parameters
        return [1 / known[width] if width in known else None for width in widths] if known else None


@hookimpl
def register_floor_predictors(register: Callable[[FloorPredictor], None]) -> None:
    for predictor in (
        Importance(),
        Naive(),
        Splice(),
        PCASplice(),
        PCATail(),
        TruncatedStart(),
        RankBound(),
        Constant(),
        OneOverWidth(),
        OneOverRootWidth(),
        PowerOfWidth(),
        PowerOfParameters(),
    ):
        register(predictor)
