"""The smallest student width that keeps a share of the features, or stays below a predicted floor, found from a
measurement and a teacher's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plan.result import HookPlan, Plan, WidthCost
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import hook_floors, resampled
from tl_capacity.predict.laws import context_at, exact_width
from tl_capacity.predict.spliced import NATS, Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.rounding import whole_above
from tl_capacity.runtime.units import per_token

SPLICE_REMARK = (
    "nothing in these nats was fitted to a student; docs/results/splice.md has how far such floors were from what"
    " students reached, and how much they follow the dictionary's L0"
)


@checked
def plan(
    measurement: Measurement,
    *,
    keep: float | None = None,
    target_loss: float | None = None,
    widths: Sequence[int] = (),
    hook: str | None = None,
    importance: str | None = None,
    law: str | None = None,
    max_fvu: float | None = 1.0,
    config: Any = None,
    spliced: Spliced | None = None,
) -> Plan:
    """The smallest student width for a goal, by the theorem; what else a student loses, training it will show.

    Args:
        measurement: of the teacher.
        keep: share of the alive features to keep, in (0, 1].
        target_loss: largest predicted floor, in the importance's unit per token; give this or `keep`.
        widths: of which the cost is shown besides; by default some between a sixteenth of the teacher's width and all
            of it.
        hook: only this hook point; by default the goal must be met at all of them.
        importance, law: of the prediction; None for the default ones.
        max_fvu: refuse SAEs that leave more of the variance unexplained.
        config: the teacher's Hugging Face configuration, as `teacher_config` finds it, for the cost in parameters and
            for which widths can be built.
        spliced: of this measurement: `target_loss` is then a KL in nats per token, and floors are read from its curves.

    Raises:
        CapacityError: where not exactly one goal is given or it is out of its domain, a hook point has no sparsity, or
            a spliced dictionary costs more than the goal with every latent kept.
    """
    from tl_capacity.models.defaults import width_of

    check_goal(keep, target_loss)
    measurement.budget((), importance, law, max_fvu)  # refuses SAEs that do not fit the model
    hooks = [h for h in measurement if hook in (None, h.hook)] or [measurement[str(hook)]]
    chosen_law = plugins().capacity_laws.named(law)
    if spliced is not None:
        hooks = [h for h in hooks if spliced.curve_of(h, importance) is not None]
        if target_loss is None or not hooks:
            raise CapacityError(
                "a splice says what widths cost in nats at the hook points that it has: pass a target_loss"
                " (--target-loss), and a splice of this measurement and importance"
            )
    needs = tuple(_hook_plan(each, keep, target_loss, importance, chosen_law, spliced) for each in hooks)
    place = max(range(len(needs)), key=lambda i: needs[i].width.value)
    decides, needed = hooks[place], int(needs[place].width.value)
    estimator = decides.estimator(importance)
    unit = decides.unit(importance) if spliced is None else NATS
    goal = (
        f"To keep {100 * keep:.4g}% of the features"
        if keep is not None
        else f"For a {'predicted' if spliced is None else 'spliced'} floor of at most {target_loss:.4g}"
        f" {per_token(unit)}"
    )
    width = needed if config is None else _next_that_can_be_built(config, needed)
    shown = sorted({width, *(widths or ladder(decides.width))})
    teacher_width = 0 if config is None else width_of(config)
    sizes = {} if config is None else _sizes(config, [*shown, teacher_width])
    teacher = sizes.get(teacher_width)
    costs = []
    in_nats = {} if spliced is None else _spliced_floors(spliced, decides, shown, importance, law)
    for f in hook_floors(decides, shown, importance, chosen_law):
        total, body = sizes.get(f.width, (None, None))
        share = total / teacher[0] if total is not None and teacher is not None else None
        floor = in_nats.get(f.width, f.predicted_floor)
        costs.append(WidthCost(f.width, f.kept_share, floor, total, body, share))
    remarks = (*_remarks(measurement, sizes), *([] if spliced is None else [*spliced.notes(), SPLICE_REMARK]))
    return Plan(goal, unit, estimator.name, chosen_law.name, needs, width, tuple(costs), remarks, chosen_law.caveat)


def check_goal(keep: float | None, target_loss: float | None) -> None:
    """Raises `CapacityError` where not exactly one goal is given, or it is out of its domain."""
    if (keep is None) == (target_loss is None):
        raise CapacityError(
            "a plan needs one goal: pass keep (--keep 0.95, a share of the features) or target_loss (--target-loss"
            " 0.05, a predicted floor)"
        )
    if keep is not None and not 0 < keep <= 1:
        raise CapacityError(f"keep = {keep:g} is no share of the features: choose a number above 0 and at most 1")
    if target_loss is not None and not 0 <= target_loss < float("inf"):
        raise CapacityError(f"target_loss = {target_loss:g} is no loss: choose a finite number of at least 0")


def teacher_config(measurement: Measurement, model: str | None = None) -> Any:
    """The configuration of the teacher, or None where it is not known by the name that the measurement has and no other
    was given.

    Raises:
        CapacityError: where `model` was given and cannot be found, or its family has no students.
    """
    from tl_capacity.distillation.students import student_config
    from tl_capacity.models.defaults import width_of
    from tl_capacity.models.loading import load_config

    try:
        config = load_config(model or measurement.provenance.model)
        student_config(config, width_of(config))
    except CapacityError:
        if model:
            raise
        return None
    return config


def ladder(width: int, octaves: int = 4) -> tuple[int, ...]:
    """Student widths to look at for a teacher of some width: all of it, and two to each octave below."""
    halves = [width / 2**octave for octave in range(octaves + 1)]
    return tuple(sorted({max(1, round(step)) for half in halves for step in (half, 1.5 * half) if step <= width}))


def _spliced_floors(
    spliced: Spliced, hook: HookMeasurement, widths: Sequence[int], importance: str | None, law: str | None
) -> dict[int, Estimate]:
    """The spliced floor of each width at a hook point."""
    order = hook.estimator(importance).name
    return {f.width: f.floor for f in spliced.floors([hook], widths, law) if f.order == order}


def _spliced_plan(
    hook: HookMeasurement, curve: SplicedCurve, target_loss: float, importance: str | None, law: CapacityLaw
) -> HookPlan:
    needed = curve.features_for(target_loss)
    if needed is None:
        raise CapacityError(
            f"no width is known to reach {target_loss:.4g} nats per token at {hook.hook}: the SAE's own reconstruction"
            f" costs {curve.error.show('.3g')} there, so the dictionary is the limit and not the width; splice one that"
            " reconstructs better"
        )
    at = context_at(hook, hook.importance(importance), hook.summary.alpha.value)
    ends = (needed.value, needed.low, needed.high)
    value, low, high = (
        None if end is None else _whole_width(exact_width(law, int(whole_above(min(end, at.n_features))), at))
        for end in ends
    )
    alive = int(hook.summary.n_alive.value)
    return HookPlan(hook.hook, hook.width, int(needed.value), alive, Estimate(value or 1.0, low, high))


def _hook_plan(
    hook: HookMeasurement,
    keep: float | None,
    target_loss: float | None,
    importance: str | None,
    law: CapacityLaw,
    spliced: Spliced | None,
) -> HookPlan:
    curve = None if spliced is None else spliced.curve_of(hook, importance)
    if curve is not None and target_loss is not None:
        return _spliced_plan(hook, curve, target_loss, importance, law)

    def needed(values: NDArray[np.float64]) -> int:
        if keep is not None:
            return int(whole_above(keep * len(values)))
        tails = np.asarray(theory.lost_importance(values, np.arange(len(values) + 1)))
        return int(np.argmax(tails <= float(target_loss or 0.0)))

    def smallest(values: NDArray[np.float64], alpha: float) -> list[float]:
        return [exact_width(law, needed(values), context_at(hook, values, alpha))]

    exact = resampled(hook, importance, smallest)[0]
    alive = int(hook.summary.n_alive.value)
    low, high = (None if end is None else _whole_width(end) for end in (exact.low, exact.high))
    whole = Estimate(_whole_width(exact.value), low, high)
    return HookPlan(hook.hook, hook.width, needed(hook.importance(importance)), alive, whole)


def _whole_width(width: float) -> float:
    """The smallest whole width that is not below, short of rounding."""
    return max(1.0, float(whole_above(width)))


def _next_that_can_be_built(config: Any, width: int) -> int:
    """The narrowest student of at least `width` that the family can build: a multiple of the teacher's width at the
    latest.
    """
    return next(w for w in count(width) if _student_config(config, w) is not None)


def _student_config(config: Any, width: int) -> Any:
    """The configuration of a student, or None where the family has none of that width."""
    from tl_capacity.distillation.students import student_config

    try:
        return student_config(config, width)
    except CapacityError:
        return None


def _sizes(config: Any, widths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Parameters of the student of each width, all and without embeddings and head; counted on a
    model without storage.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tl_capacity.distillation.students import parameters_of

    build: Any = AutoModelForCausalLM.from_config  # which has no annotations
    sizes = {}
    for width in sorted(set(widths)):
        narrower = _student_config(config, width)
        if narrower is not None:
            with torch.device("meta"):
                sizes[width] = parameters_of(build(narrower))
    return sizes


def _remarks(measurement: Measurement, sizes: dict[int, tuple[int, int]]) -> list[str]:
    """What to know of any plan from this measurement."""
    remarks = []
    if not sizes:
        remarks.append(
            "what the widths cost is not known, as the model or the students of its family are not: pass --model"
        )
    if all(isfinite(h.summary.critical_width.value) for h in measurement):
        remarks.append(
            "d* rests on the SAE's L0: plan with several SAEs of one hook point before building on one number"
        )
    return [*remarks, *measurement.warnings]
