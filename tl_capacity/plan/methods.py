"""Methods: every way to predict floors in nats per token that a measurement, its splice and forecasts allow.

Each gives the floors of some widths, and the smallest width within a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import resampled
from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.predict.laws import budgets, context_at, exact_width, features_within, knows_enough
from tl_capacity.predict.predictors import forecasts_of, importances_of
from tl_capacity.predict.record import Record, record_of
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.predict.spliced_floor import PREDICTOR
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.rounding import whole_above
from tl_capacity.runtime.units import NATS

IMPORTANCE = "importance"
WIDEST = 2
"""Widths are looked for up to this many times the teacher's width."""


@dataclass(frozen=True)
class Method:
    """A way to predict the floor of a width at one hook point.

    Attributes:
        predictor: splice, importance, or the predictor of a forecast.
        hook, sae: the hook point and the dictionary; empty where it knows none.
        importance, law: by which it ranks features, and says how many a width keeps; empty where it does neither.
        teacher_width: d_T.
        unit: of its floors.
        floors: predicted floor of each of some ascending widths [width], NaN where it says nothing.
        needed: the smallest whole width whose floor is within a loss, with its interval over documents; None where it
            knows of none.
        is_bound: whether its floor is a bound that no student of the width is below.
    """

    predictor: str
    hook: str
    sae: str
    importance: str
    law: str
    teacher_width: int
    unit: str
    floors: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    needed: Callable[[float], Estimate | None]
    is_bound: bool = False

    @property
    def name(self) -> str:
        """The method's name in a table."""
        by = self.importance if self.predictor == IMPORTANCE else self.predictor
        of = f" of {self.importance}" if self.importance and by != self.importance else ""
        return f"{by}{of}{f', {self.law}' if self.law else ''}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Predictor, importance and law."""
        return self.predictor, self.importance, self.law

    @property
    def in_nats(self) -> bool:
        """Whether its floors are a loss in nats as they are."""
        return self.unit == NATS

    @property
    def record(self) -> Record | None:
        """How far off it was where it was checked."""
        return record_of(self.predictor, self.importance, self.law)

    @property
    def widths(self) -> NDArray[np.int64]:
        """The widths that are looked through."""
        return np.arange(1, WIDEST * max(self.teacher_width, 1) + 1)


def first_within(widths: NDArray[np.int64], floors: NDArray[np.float64], target: float) -> int | None:
    """The first of ascending widths whose floor is at most the target; None if there is none."""
    within = floors <= target
    return int(widths[within.argmax()]) if within.any() else None


def methods_of(
    hooks: Sequence[HookMeasurement],
    importances: Iterable[str],
    spliced: Spliced | None = None,
    forecasts: Iterable[Forecasts] = (),
) -> list[Method]:
    """Every available method: splices by each order and law, importances by each law, and forecasts in nats.

    Args:
        hooks: of the measurement.
        importances: further importances that are not in nats, which students can be compared with.
        spliced: of that measurement.
        forecasts: of the same teacher.
    """
    methods = []
    for hook in hooks:
        if not 0 < hook.summary.alpha.value < 1:
            continue  # no law says anything there
        for curve in spliced or ():
            if (curve.hook, curve.sae_digest) == (hook.hook, hook.sae_digest):
                methods += [spliced_method(hook, curve, law) for law in _laws(hook, curve.importance)]
        for importance in _importances(hook, set(importances)):
            methods += [importance_method(hook, importance, law) for law in _laws(hook, importance)]
    teacher_width = max((hook.teacher_width or hook.width for hook in hooks), default=1)
    for each in forecasts:
        methods += forecast_methods(each, {hook.hook for hook in hooks}, teacher_width)
    return methods


def further_forecasts(
    hooks: Sequence[HookMeasurement], spliced: Spliced | None, forecasts: Sequence[Forecasts], widths: Sequence[int]
) -> Forecasts:
    """Forecasts in nats by further registered floor predictors, with nothing fitted.

    They are those that read neither a splice nor an importance, as a plan does that itself, and that are not among the
    forecasts yet.
    """
    known = {PREDICTOR, IMPORTANCE, *(each.predictor for every in forecasts for each in every)}
    asked = [
        predictor
        for predictor in plugins().floor_predictors
        if predictor.unit == NATS and not predictor.constants and predictor.name not in known
    ]
    if not asked:
        return Forecasts(())
    said = forecasts_of(tuple(hooks), widths, spliced, predictors=asked)
    return Forecasts(said.records)  # those that say nothing are no note of a plan


def widest_of_each(methods: Iterable[Method], target: float) -> list[Method]:
    """One of each method at several hook points: the one that needs the widest student.

    A student must meet the goal at all hook points.
    """
    best: dict[str, tuple[float, Method]] = {}
    for method in methods:
        width = first_within(method.widths, method.floors(method.widths), target) if method.in_nats else None
        need = float("inf") if width is None else float(width)
        if method.name not in best or need > best[method.name][0]:
            best[method.name] = (need, method)
    return [method for _, method in best.values()]


def spliced_method(hook: HookMeasurement, curve: SplicedCurve, law: CapacityLaw) -> Method:
    """Floors read from a curve of the spliced teacher, by one law."""
    at = context_at(hook, hook.importance(curve.importance), hook.summary.alpha.value)

    def floors(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        return curve.values(np.minimum(features_within(budgets(law, widths.tolist(), at), at.n_features), curve.alive))

    return Method(
        PREDICTOR,
        hook.hook,
        hook.sae,
        curve.order,
        law.name,
        hook.teacher_width or hook.width,
        NATS,
        floors,
        partial(spliced_width, curve, law, at),
    )


def spliced_width(curve: SplicedCurve, law: CapacityLaw, at: CapacityContext, target: float) -> Estimate | None:
    """The smallest width that keeps enough features for a KL, with its interval over the documents of the splice."""
    needed = curve.features_for(target)
    if needed is None:
        return None
    ends = (needed.value, needed.low, needed.high)
    value, low, high = (
        None if end is None else whole_width(exact_width(law, int(whole_above(min(end, at.n_features))), at))
        for end in ends
    )
    return Estimate(value or 1.0, low, high)


def importance_method(hook: HookMeasurement, importance: str, law: CapacityLaw) -> Method:
    """Floors that are the summed importance of what a width loses, by one law."""
    at = context_at(hook, hook.importance(importance), hook.summary.alpha.value)

    def floors(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        kept = features_within(budgets(law, widths.tolist(), at), at.n_features)
        return np.asarray(theory.lost_importance(at.importance, kept), dtype=np.float64)

    return Method(
        IMPORTANCE,
        hook.hook,
        hook.sae,
        importance,
        law.name,
        hook.teacher_width or hook.width,
        hook.unit(importance),
        floors,
        partial(importance_width, hook, importance, law),
    )


def importance_width(hook: HookMeasurement, importance: str, law: CapacityLaw, target: float) -> Estimate:
    """The smallest width that loses at most so much importance, with its interval over documents."""

    def smallest(values: NDArray[np.float64], alpha: float) -> list[float]:
        return [exact_width(law, features_for_loss(values, target), context_at(hook, values, alpha))]

    return whole_estimate(resampled(hook, importance, smallest)[0])


def features_for_loss(importance: NDArray[np.float64], target: float) -> int:
    """How many of the most important features must stay, so that the others' summed importance is at most the
    target.
    """
    tails = np.asarray(theory.lost_importance(importance, np.arange(len(importance) + 1)))
    return int(np.argmax(tails <= target))


def forecast_methods(forecasts: Forecasts, hooks: set[str], teacher_width: int) -> Iterator[Method]:
    """A method for each series of forecasts in nats, interpolated between its widths.

    The forecasts are of these hook points or of the whole model.
    """
    predictors = plugins().floor_predictors
    for (predictor, hook, sae, law, order), by_width in forecasts.series.items():
        if all(each.unit == NATS for each in by_width.values()) and (not hook or hook in hooks):
            ends = [
                np.array([getattr(by_width[width].floor, end) for width in sorted(by_width)], dtype=np.float64)
                for end in ("value", "low", "high")
            ]
            known = np.array(sorted(by_width), dtype=np.int64)
            between = partial(_between, known)
            yield Method(
                predictor,
                hook,
                sae,
                order,
                law,
                teacher_width,
                NATS,
                partial(between, ends[0]),
                partial(_forecast_width, known, ends),
                is_bound=predictor in predictors and predictors[predictor].is_bound,
            )


def whole_width(width: float) -> float:
    """The smallest whole width that is not below a width, except for rounding errors."""
    return max(1.0, float(whole_above(width)))


def whole_estimate(exact: Estimate) -> Estimate:
    """An estimate of a width, as whole widths."""
    low, high = (None if end is None else whole_width(end) for end in (exact.low, exact.high))
    return Estimate(whole_width(exact.value), low, high)


def in_log(known: NDArray[np.int64], values: NDArray[np.float64], widths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Positive values between known widths, on a straight line in both logarithms.

    Beyond the ends they are constant.
    """
    return np.exp(np.interp(np.log(widths), np.log(known), np.log(values)))


def _between(known: NDArray[np.int64], values: NDArray[np.float64], widths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Floors between the widths of a forecast; NaN beyond them. A floor of zero is interpolated as a tiny one."""
    floors = in_log(known, np.maximum(values, 1e-12), widths)
    return np.where((widths >= known[0]) & (widths <= known[-1]), floors, np.nan)


def _forecast_width(known: NDArray[np.int64], ends: Sequence[NDArray[np.float64]], target: float) -> Estimate | None:
    """The smallest width within a loss, between the widths of a forecast.

    The ends of its interval come from the ends of the forecasts' intervals.
    """
    widths = np.arange(known[0], known[-1] + 1)
    value, low, high = (
        first_within(widths, _between(known, end, widths), target) if np.isfinite(end).all() else None for end in ends
    )
    if value is None or (value == known[0] and ends[0][0] < target):
        return None  # outside of what was forecast
    whole = Estimate(float(value))
    return whole if low is None or high is None else Estimate(whole.value, float(low), float(high))


def _importances(hook: HookMeasurement, further: set[str]) -> Iterator[str]:
    """The importances measured at a hook point, those in nats and the requested ones."""
    yield from (name for name in importances_of(hook) if hook.unit(name) == NATS or name in further)


def _laws(hook: HookMeasurement, importance: str | None) -> Iterator[CapacityLaw]:
    """The capacity laws that can be asked at a hook point."""
    at = context_at(hook, hook.importance(importance), hook.summary.alpha.value)
    yield from (law for law in plugins().capacity_laws if knows_enough(law, at))
