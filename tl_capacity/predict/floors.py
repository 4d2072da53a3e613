"""Predicted loss floors of student widths, from the measurement of a hook point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.predict.laws import budgets, context_at, features_within
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.results.summary import Resample
from tl_capacity.runtime.units import per_token

if TYPE_CHECKING:
    from tl_capacity.results.hook import HookMeasurement


@dataclass(frozen=True)
class FloorPrediction:
    """The loss that a student of one width cannot avoid, by one capacity law and one importance estimator.

    Attributes:
        hook: the hook point that was measured, or the curve's name; where several SAEs were measured there, the SAE's
            name as well.
        width: d_S.
        features_kept, features_lost: F_S and F − F_S.
        kept_share: F_S / F.
        predicted_floor: Σ of the lost features' importance, in `unit` per token.
        naive_floor: the same with every feature equally important.
        share: predicted floor / L_∞, the loss of keeping nothing.
    """

    hook: str
    width: int
    features_kept: Estimate
    features_lost: Estimate
    kept_share: Estimate
    predicted_floor: Estimate
    naive_floor: Estimate
    share: Estimate
    unit: str
    importance: str
    law: str
    caveat: str = ""

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, as `tl-capacity floor --json` prints it."""
        return {
            "hook": self.hook,
            "width": self.width,
            "features_kept": int(self.features_kept.value),
            "kept_low": self.features_kept.low,
            "kept_high": self.features_kept.high,
            "features_lost": int(self.features_lost.value),
            "lost_low": self.features_lost.low,
            "lost_high": self.features_lost.high,
            "predicted_floor": self.predicted_floor.value,
            "predicted_low": self.predicted_floor.low,
            "predicted_high": self.predicted_floor.high,
            "naive_floor": self.naive_floor.value,
            "naive_low": self.naive_floor.low,
            "naive_high": self.naive_floor.high,
            "share_of_total": self.share.value,
            "share_low": self.share.low,
            "share_high": self.share.high,
            "unit": self.unit,
            "importance": self.importance,
            "law": self.law,
            "caveat": self.caveat,
        }


def floor_cells(floors: Sequence[FloorPrediction]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of predicted floors, as text. The unit is beside each floor if there are several units."""
    units = {f.unit for f in floors}
    unit = f" ({per_token(floors[0].unit)})" if len(units) == 1 and floors[0].unit else ""
    return ["hook", "width", "kept", "lost", f"predicted floor{unit}", "share of total"], [
        [
            f.hook,
            f"{f.width:,}",
            f"{f.features_kept.value:,.0f}",
            f"{f.features_lost.value:,.0f}",
            f.predicted_floor.show(significant(f.predicted_floor.value)) + (f" {f.unit}" if len(units) > 1 else ""),
            f"{100 * f.share.value:.3g}%",
        ]
        for f in floors
    ]


def hook_floors(
    hook: HookMeasurement, widths: Sequence[int], importance: str | None, law: CapacityLaw
) -> list[FloorPrediction]:
    """Predicted floors of one hook point. Every figure has its interval from the document bootstrap."""
    widths = checked_widths(widths)
    if not widths:
        return []

    def numbers(values: NDArray[np.float64], alpha: float) -> list[float]:
        return floor_numbers(context_at(hook, values, alpha), widths, law)

    estimates = resampled(hook, importance, numbers)
    estimator = hook.estimator(importance)
    return floor_predictions(hook.hook, widths, estimates, estimator.name, hook.unit(importance), law)


def floor_values(
    hook: HookMeasurement, widths: Sequence[int], importance: str | None, law: CapacityLaw
) -> dict[int, float]:
    """The predicted floor of each width, without the intervals, which take two hundred times as long."""
    widths = checked_widths(widths)
    if not widths:
        return {}
    at = context_at(hook, hook.importance(importance), sparsity(hook))
    kept = features_within(budgets(law, widths, at), at.n_features)
    return dict(zip(widths, theory.lost_importance(at.importance, kept).tolist(), strict=True))


def sparsity(hook: HookMeasurement) -> float:
    """α of a hook point, the probability that an alive feature is not active on a token.

    Raises:
        CapacityError: where none is defined, with no feature alive or all of them always active.
    """
    s = hook.summary
    if not 0 < s.alpha.value < 1:
        raise CapacityError(
            f"{hook.hook} has {int(s.n_alive.value):,} alive features at L0 = {s.l0.value:.3g}, for which no sparsity"
            f" is defined: count more tokens, or keep the largest coordinates of a basis, as in pca:{hook.hook},k=24"
        )
    return s.alpha.value


def resampled(
    hook: HookMeasurement, importance: str | None, statistic: Callable[[NDArray[np.float64], float], Sequence[float]]
) -> list[Estimate]:
    """Figures computed from the alive features' importances [feature] and their sparsity, with intervals over
    documents.

    Raises:
        CapacityError: where the hook point has no sparsity.
    """
    estimator, s = hook.estimator(importance), hook.summary
    size = len(statistic(hook.importance(importance), sparsity(hook)))

    def of_resample(sums: Resample) -> Sequence[float]:
        alpha = s.sparsity_of(sums)
        if not 0 < alpha < 1:
            return [float("nan")] * size
        return statistic(sums.importance(estimator.compute, estimator.name)[sums.rates > s.alive_threshold], alpha)

    return s.estimates(of_resample)


def floor_numbers(at: CapacityContext, widths: Sequence[int], law: CapacityLaw) -> list[float]:
    """The numbers of a `FloorPrediction` for each width, in its order.

    They are features kept and lost, the share kept, refined and naive floor, and the share lost.
    """
    features, total = at.n_features, float(at.importance.sum())
    held = budgets(law, widths, at)
    kept = features_within(held, features)
    refined = theory.lost_importance(at.importance, kept)
    naive = total * np.maximum(0.0, 1 - held / max(features, 1))
    shares = refined / total if total else np.zeros(len(kept))
    return list(np.stack([kept, features - kept, kept / max(features, 1), refined, naive, shares], 1).ravel())


def floor_predictions(
    hook: str, widths: Sequence[int], estimates: Sequence[Estimate], importance: str, unit: str, law: CapacityLaw
) -> list[FloorPrediction]:
    """The floors of some widths, from the estimates of their `floor_numbers`."""
    predictions, numbers = [], iter(estimates)
    for width in widths:
        kept, lost, kept_share, refined, naive, share = (next(numbers) for _ in range(6))
        predictions.append(
            FloorPrediction(
                hook=hook,
                width=width,
                features_kept=kept.within(0.0),
                features_lost=lost.within(0.0),
                kept_share=kept_share.within(0.0, 1.0),
                predicted_floor=refined.within(0.0),
                naive_floor=naive.within(0.0),
                share=share.within(0.0, 1.0),
                unit=unit,
                importance=importance,
                law=law.name,
                caveat=law.caveat,
            )
        )
    return predictions


def checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The student widths, checked, each once.

    Raises:
        CapacityError: where one is below 1.
    """
    for width in widths:
        if width < 1:
            raise CapacityError(f"width {width} is not a student width: pass whole numbers of at least 1")
    return tuple(dict.fromkeys(widths))
