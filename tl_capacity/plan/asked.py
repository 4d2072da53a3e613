"""The prediction that a plan is asked for: one importance and one capacity law at some hook points, from a splice if
there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.plan.methods import IMPORTANCE, features_for_loss, spliced_width, whole_estimate
from tl_capacity.plan.result import HookPlan
from tl_capacity.predict.floors import FloorPrediction, hook_floors, resampled
from tl_capacity.predict.laws import context_at, exact_width
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.predict.spliced_floor import PREDICTOR, kept_whole
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.rounding import whole_above
from tl_capacity.runtime.units import NATS

SPLICE_REMARK = (
    "the spliced nats are not fitted to any student; docs/results/splice.md shows how much such floors depend on the"
    " dictionary's L0"
)


@dataclass(frozen=True)
class Asked:
    """The prediction that a plan is asked for.

    Attributes:
        hooks: at which the goal must be met.
        importance: the estimator's name.
        law: how many features a width keeps.
        spliced: where its floors are read, with a curve of that importance at each hook point; None where they are the
            summed importance of what is lost.
    """

    hooks: tuple[HookMeasurement, ...]
    importance: str
    law: CapacityLaw
    spliced: Spliced | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Predictor, importance and law."""
        return IMPORTANCE if self.spliced is None else PREDICTOR, self.importance, self.law.name

    @property
    def unit(self) -> str:
        """The unit of its floors."""
        return self.hooks[0].unit(self.importance) if self.spliced is None else NATS

    def keeping(self, share: float) -> tuple[HookPlan, ...]:
        """The width that each hook point needs to keep a share of its features."""
        return tuple(_need(hook, self, lambda values: int(whole_above(share * len(values)))) for hook in self.hooks)

    def within(self, target: float) -> tuple[HookPlan, ...]:
        """The width that each hook point needs for a floor of at most `target`.

        Raises:
            CapacityError: where a spliced dictionary costs more with every latent kept.
        """
        needs = []
        for hook in self.hooks:
            curve = None if self.spliced is None else self.spliced.curve_of(hook, self.importance)
            needs.append(
                _need(hook, self, lambda values: features_for_loss(values, target))
                if curve is None
                else _spliced_need(hook, curve, self, target)
            )
        return tuple(needs)

    def floors(self, hook: HookMeasurement, widths: Sequence[int]) -> list[tuple[FloorPrediction, Estimate]]:
        """What each width keeps at a hook point, and its floor in `unit`."""
        predicted = hook_floors(hook, widths, self.importance, self.law)
        if self.spliced is None:
            return [(each, each.predicted_floor) for each in predicted]
        in_nats = {
            each.width: each.floor
            for each in self.spliced.floors([hook], widths, self.law.name)
            if each.order == self.importance
        }
        return [(each, in_nats[each.width]) for each in predicted]

    def notes(self, hook: HookMeasurement, widths: Sequence[int]) -> list[str]:
        """What a reader must know about the splice, and about these widths at a hook point."""
        if self.spliced is None:
            return []
        curves = (self.spliced.curve_of(each, self.importance) for each in self.hooks)
        mine = Spliced(tuple(curve for curve in curves if curve is not None))
        return [*mine.notes(), *kept_whole(mine.floors([hook], widths, self.law.name)), SPLICE_REMARK]


def asked_for(
    hooks: Sequence[HookMeasurement], importance: str | None, law: CapacityLaw, spliced: Spliced | None
) -> Asked:
    """The prediction by one importance, by default the default one.

    If a splice has it at some hook points, it is read from there, and only those hook points count.

    Raises:
        CapacityError: where the splice does not have it, and the importance itself is not in nats either.
    """
    name = hooks[0].estimator(importance).name
    if spliced is None:
        return Asked(tuple(hooks), name, law)
    there = tuple(hook for hook in hooks if spliced.curve_of(hook, name) is not None)
    if not there and hooks[0].unit(name) != NATS:
        raise CapacityError(
            f"the splice has no curve of the importance {name!r} here: pass a target_loss (--target-loss), and a"
            " splice of this measurement and that importance"
        )
    return Asked(there, name, law, spliced) if there else Asked(tuple(hooks), name, law)


def _need(hook: HookMeasurement, asked: Asked, features: Callable[[NDArray[np.float64]], int]) -> HookPlan:
    """The width that a hook point needs, if so many features of these importances must stay."""

    def smallest(values: NDArray[np.float64], alpha: float) -> list[float]:
        return [exact_width(asked.law, features(values), context_at(hook, values, alpha))]

    width = whole_estimate(resampled(hook, asked.importance, smallest)[0])
    alive = int(hook.summary.n_alive.value)
    return HookPlan(hook.hook, hook.width, features(hook.importance(asked.importance)), alive, width)


def _spliced_need(hook: HookMeasurement, curve: SplicedCurve, asked: Asked, target: float) -> HookPlan:
    at = context_at(hook, hook.importance(asked.importance), hook.summary.alpha.value)
    width, needed = spliced_width(curve, asked.law, at, target), curve.features_for(target)
    if width is None or needed is None:
        raise CapacityError(
            f"no width is known to reach {target:,.6g} nats per token at {hook.hook}: the SAE's own reconstruction"
            f" costs {curve.error.show('.3g')} there, so the dictionary is the limit and not the width; splice a"
            " dictionary that reconstructs better, or pass students (--calibrate)"
        )
    return HookPlan(hook.hook, hook.width, int(needed.value), int(hook.summary.n_alive.value), width)
