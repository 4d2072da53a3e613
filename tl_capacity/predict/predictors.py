"""Floor predictors, asked safely: the floors of some widths at each hook point, importance and law that a predictor
distinguishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError, PluginError, plugin_code
from tl_capacity.interfaces import BASES, CapacityContext, CapacityLaw, FloorContext, FloorPredictor, WithInterval
from tl_capacity.interfaces.floors import VARIES_WITH
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import checked_widths
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.predict.laws import budgets, context_at, knows_enough
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.units import NATS

ALL_COMPONENTS = BASES[1]
"""The architecture of a basis of principal components that keeps every coordinate. A spectrum is read from it."""


@checked
def forecasts_of(
    measurement: Iterable[HookMeasurement],
    widths: Sequence[int],
    spliced: Spliced | None = None,
    forecasts: Forecasts | None = None,
    *,
    parameters: Mapping[int, int] | None = None,
    predictors: Iterable[FloorPredictor] | None = None,
) -> Forecasts:
    """The forecasts of every registered floor predictor for some student widths.

    A predictor is asked once for each hook point, importance and law that it says its floors vary with. The
    notes are those of what is given, and name the predictors that say nothing, with what they lack.

    Args:
        measurement: of the teacher, or some of its hook points.
        widths: d_S of the students.
        spliced: what `tl_capacity.splice` gave for this teacher.
        forecasts: floors for which the teacher was run before.
        parameters: of a student's body, by width.
        predictors: those to ask; by default all that are registered.

    Raises:
        CapacityError: where a width is below 1.
        MeasurementError: where `spliced` and `forecasts` are of two teachers.
        PluginError: where a predictor fails, or gives numbers that are no floors; its message names the predictor.
    """
    widths = checked_widths(widths)
    given = {name: dict(each.about) for name, each in (("spliced", spliced), ("forecasts", forecasts)) if each}
    teacher = next((about["model"] for about in given.values() if "model" in about), None)
    if forecasts and teacher is not None:
        forecasts.check_teacher(teacher)
    contexts = list(contexts_of(tuple(measurement), spliced, forecasts, parameters or {}))
    asked = plugins().floor_predictors if predictors is None else predictors
    said = [(predictor, list(_records(predictor, widths, contexts))) for predictor in asked]
    silent = [predictor for predictor, records in said if widths and not records]
    notes = [*(spliced.notes() if spliced else ()), *(forecasts.notes if forecasts else ()), *_missing(silent)]
    return Forecasts(
        tuple(chain.from_iterable(records for _, records in said)),
        given if teacher is None else {"model": teacher, **given},
        tuple(dict.fromkeys(notes)),
    )


def constants_of(forecast: Forecast) -> int:
    """How many numbers must be fitted to students before a forecast is in nats per token.

    A shape whose unit happens to be nats per token, as with an importance in nats, needs no factor.

    Raises:
        PluginError: where the predictor's plugin is not loaded.
    """
    predictor = plugins().floor_predictors[forecast.predictor]
    return predictor.constants - int(predictor.unit != NATS and forecast.unit == NATS)


def contexts_of(
    hooks: Sequence[HookMeasurement],
    spliced: Spliced | None = None,
    forecasts: Forecasts | None = None,
    parameters: Mapping[int, int] | None = None,
) -> Iterator[FloorContext]:
    """The contexts that predictors are asked in: one for each hook point, SAE, measured importance and law.

    A basis without a sparsity has one context, and so has each further hook point of the forecasts.
    """
    known, widths = forecasts or Forecasts(()), parameters or {}
    for hook in hooks:
        spectrum, alpha = spectrum_at(hooks, hook.hook), hook.summary.alpha.value
        if not 0 < alpha < 1:
            told = _floors_at(known, hook.hook, hook.sae)
            yield FloorContext(hook.hook, hook.sae, spectrum=spectrum, forecasts=told, parameters=widths)
            continue
        for importance in importances_of(hook):
            features = context_at(hook, hook.importance(importance), alpha)
            curve = None if spliced is None else spliced.curve_of(hook, importance)
            for law in plugins().capacity_laws:
                if knows_enough(law, features):
                    yield FloorContext(
                        hook.hook,
                        hook.sae,
                        importance,
                        hook.unit(importance),
                        law.name,
                        features,
                        _budget(law, features),
                        spectrum,
                        curve,
                        _floors_at(known, hook.hook, hook.sae, law.name, importance),
                        widths,
                    )
    measured = {hook.hook for hook in hooks}
    elsewhere = dict.fromkeys(each.hook for each in known if each.hook and each.hook not in measured)
    for name in (*elsewhere, *([] if measured or elsewhere else [""])):
        yield FloorContext(name, forecasts=_floors_at(known, name), parameters=widths)


def importances_of(hook: HookMeasurement) -> list[str]:
    """The importance estimators that were measured at a hook point, or that every measurement allows."""
    return [estimator.name for estimator in plugins().importance_estimators if _is_measured(hook, estimator.name)]


def spectrum_at(hooks: Iterable[HookMeasurement], name: str) -> NDArray[np.float64] | None:
    """λ [component]: variances of the activation along its principal components, largest first.

    They are those of the text that was measured, along the components that the basis was fitted to. None where no basis
    of principal components with every coordinate (`pca:HOOK`, without k) was measured at the hook point.
    """
    for hook in hooks:
        if hook.hook == name and hook.architecture == ALL_COMPONENTS:
            tokens = hook.summary.n_tokens
            sums, squares = (hook.summary.arrays[key].sum(0) for key in ("sums", "squares"))
            return np.asarray(np.maximum(squares / tokens - (sums / tokens) ** 2, 0), dtype=np.float64)
    return None


def _budget(law: CapacityLaw, features: CapacityContext) -> Callable[[int], float]:
    """d_S · ĝ(α) by one law. Each width is asked once."""
    return cache(lambda width: float(budgets(law, [width], features)[0]))


def _is_measured(hook: HookMeasurement, importance: str) -> bool:
    try:
        hook.estimator(importance)
    except MeasurementError:
        return False
    return True


def _floors_at(
    forecasts: Forecasts, hook: str, sae: str = "", law: str = "", order: str = ""
) -> dict[str, dict[int, Estimate]]:
    """Floors by predictor and width that hold at a hook point.

    A record that leaves a name empty holds for all names, unless another record is more specific.
    """
    found: dict[str, dict[int, Estimate]] = {}
    for (predictor, *names), by_width in sorted(forecasts.series.items(), key=lambda each: sum(map(bool, each[0]))):
        if all(said in ("", asked) for said, asked in zip(names, (hook, sae, law, order), strict=True)):
            found.setdefault(predictor, {}).update({width: each.floor for width, each in by_width.items()})
    return found


def _varies_with(predictor: FloorPredictor) -> Sequence[str]:
    if predictor.varies_with is not None:
        return predictor.varies_with
    return VARIES_WITH if predictor.knows_features else ("hook",)


def _records(predictor: FloorPredictor, widths: Sequence[int], contexts: Sequence[FloorContext]) -> Iterator[Forecast]:
    """What a predictor says in the contexts that it tells apart. Of equal contexts, the first is asked."""
    varies, seen = _varies_with(predictor), set[tuple[str, ...]]()
    for at in contexts:
        if predictor.knows_features and not at.features.n_features:
            continue
        hook = at.hook if "hook" in varies else ""
        names = {
            "hook": hook,
            "sae": at.sae if hook and predictor.knows_features else "",
            "law": at.law if "law" in varies else "",
            "order": at.importance if "importance" in varies else "",
        }
        if tuple(names.values()) in seen:
            continue
        seen.add(tuple(names.values()))
        for width, floor in zip(widths, _asked(predictor, widths, at), strict=True):
            if floor is not None:
                yield Forecast(predictor.name, width, floor, unit=predictor.unit_at(at), **names)


def _asked(predictor: FloorPredictor, widths: Sequence[int], at: FloorContext) -> list[Estimate | None]:
    """The floor of each width; None if the predictor has none.

    Raises:
        PluginError: where it fails, or what it gives is no floor for each width.
    """
    with plugin_code("floor predictor", predictor.name, predictor.floors):
        answer = predictor.floors(widths, at)
        floors = [_estimate(number) for number in ([None] * len(widths) if answer is None else answer)]
    if len(floors) != len(widths):
        raise PluginError(
            f"the floor predictor {predictor.name!r} gives {len(floors):,} floors for {len(widths):,} widths, but one"
            " for each is needed: fix it"
        )
    for width, floor in zip(widths, floors, strict=True):
        if floor is not None and not (isfinite(floor.value) and floor.value >= 0):
            raise PluginError(
                f"the floor predictor {predictor.name!r} gives {floor.value:g} at width {width:,}, but a finite number"
                " of at least 0 is needed: fix it"
            )
    return floors


def _estimate(number: Any) -> Estimate | None:
    if number is None:
        return None
    if isinstance(number, WithInterval):
        low, high = (None if end is None else float(end) for end in (number.low, number.high))
        return Estimate(float(number.value), low, high)
    return Estimate(float(number))


def _missing(silent: Sequence[FloorPredictor]) -> Iterator[str]:
    """A sentence for each command that would give predictors what they lack, and one for the others."""
    for command in dict.fromkeys(predictor.made_by for predictor in silent):
        names = ", ".join(predictor.name for predictor in silent if predictor.made_by == command)
        yield f"no forecast by {names}" + (f": run {command}, and pass what it wrote" if command else "")
