"""The smallest student width that keeps a share of the features or stays below a predicted floor.

It is found from a measurement and a teacher's configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from tl_capacity.distillation.by_width import check_students, floors_by_width
from tl_capacity.distillation.observed import observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.splices import check_splice
from tl_capacity.plan.asked import Asked, asked_for
from tl_capacity.plan.calibration import Observed
from tl_capacity.plan.costs import ladder, next_that_can_be_built, parameters_of_widths
from tl_capacity.plan.in_nats import Evidence, InNats
from tl_capacity.plan.result import HookPlan, Plan, WidthCost
from tl_capacity.plugins import plugins
from tl_capacity.predict.caveats import measurement_warnings
from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.units import NATS, per_token


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
    forecasts: Iterable[Forecasts] = (),
    students: DistillationRun | None = None,
    observed: str = "last_tenth",
) -> Plan:
    """The smallest student width for a goal, by the theorem. What else a student loses, only training can show.

    A loss in nats per token is answered by every method that there is, each with how far it was off where it was
    checked. A loss is in nats where a splice, forecasts or students are given, or the importance is in nats.

    Args:
        measurement: of the teacher.
        keep: share of the alive features to keep, in (0, 1].
        target_loss: largest floor, in nats per token or else in the importance's unit per token; give this or `keep`.
        widths: of which the cost is shown besides; by default some between a sixteenth of the teacher's width and all
            of it.
        hook: only this hook point; by default the goal must be met at all of them.
        importance, law: of the prediction that is asked for; None for the default ones.
        max_fvu: refuse SAEs that leave more of the variance unexplained.
        config: the teacher's Hugging Face configuration, as `teacher_config` finds it, for the cost in parameters and
            for which widths can be built.
        spliced: of this measurement; the prediction that is asked for is then read from its curves.
        forecasts: of the same teacher, to stand beside it.
        students: of the same teacher, by whose observed floors every method is corrected.
        observed: what is taken as their floor: "last_tenth", which they did reach, or "fit".

    Raises:
        CapacityError: where not exactly one goal is given or it is out of its domain, a hook point has no sparsity,
            splice or students are of another teacher, or a spliced dictionary costs more than the goal with every
            latent kept and there are no students.
    """
    check_goal(keep, target_loss)
    measurement.budget((), importance, law, max_fvu)  # refuses SAEs that do not fit the model
    hooks = [h for h in measurement if hook in (None, h.hook)] or [measurement[str(hook)]]
    evidence = _evidence(measurement, spliced, tuple(forecasts), students, observed)
    if target_loss is None and evidence.any:
        raise CapacityError(
            "a splice, forecasts and students say what widths cost in nats, not what share of the features they keep:"
            " pass a target_loss (--target-loss)"
        )
    asked = asked_for(hooks, importance, plugins().capacity_laws.named(law), spliced)
    if target_loss is None or not (evidence.any or asked.unit == NATS):
        needs = asked.keeping(float(keep or 0)) if target_loss is None else asked.within(target_loss)
        return _planned(measurement, asked, _goal(keep, target_loss, asked), needs, config, widths)
    in_nats = InNats.of(target_loss, asked, hooks, evidence)
    goal = f"For a predicted floor of at most {target_loss:,.6g} {NATS}"
    return _planned(measurement, asked, goal, in_nats.needs, config, widths, in_nats)


def check_goal(keep: float | None, target_loss: float | None) -> None:
    """Raise `CapacityError` unless exactly one goal is given and it is in its domain."""
    if (keep is None) == (target_loss is None):
        raise CapacityError(
            "a plan needs one goal: pass keep (--keep 0.95, a share of the features) or target_loss (--target-loss"
            " 0.05, a predicted floor)"
        )
    if keep is not None and not 0 < keep <= 1:
        raise CapacityError(f"keep = {keep:g} is not a share of the features: choose a number above 0 and at most 1")
    if target_loss is not None and not 0 <= target_loss < float("inf"):
        raise CapacityError(f"target_loss = {target_loss:g} is not a loss: choose a finite number of at least 0")


def _evidence(
    measurement: Measurement,
    spliced: Spliced | None,
    forecasts: tuple[Forecasts, ...],
    students: DistillationRun | None,
    observed: str,
) -> Evidence:
    """The evidence for an answer, checked to be of the measured teacher."""
    if spliced is not None:
        check_splice(spliced, measurement)
    for each in forecasts:
        each.check_teacher(measurement.provenance.model)
    if students is None:
        return Evidence(spliced, forecasts)
    check_students(measurement, students)
    reached = Observed.by_width(floors_by_width(observed_floors(students), observed))
    if not len(reached.widths):
        raise CapacityError(
            "the students' floors are 0 at every width, so no factor can correct a prediction: pass --observed"
            " last_tenth, or narrower students"
        )
    return Evidence(spliced, forecasts, reached)


def _goal(keep: float | None, target_loss: float | None, asked: Asked) -> str:
    """A goal in the importance's unit, in words."""
    if keep is not None:
        return f"To keep {100 * keep:.4g}% of the features"
    return f"For a predicted floor of at most {target_loss:,.6g} {per_token(asked.unit)}"


def _planned(
    measurement: Measurement,
    asked: Asked,
    goal: str,
    needs: tuple[HookPlan, ...],
    config: Any,
    widths: Sequence[int],
    in_nats: InNats | None = None,
) -> Plan:
    """The plan for the needed width, with what it and other widths cost."""
    from tl_capacity.models.defaults import width_of

    place = max(range(len(needs)), key=lambda i: needs[i].width.value) if needs else 0
    needed = int(needs[place].width.value) if in_nats is None else in_nats.width
    width = needed if config is None else next_that_can_be_built(config, needed)
    decides = asked.hooks[place]
    shown = sorted({width, *(widths or ladder(decides.width))})
    teacher_width = 0 if config is None else width_of(config)
    sizes = {} if config is None else parameters_of_widths(config, [*shown, teacher_width])
    corrected = {} if in_nats is None else in_nats.corrected(shown)
    remarks = (
        _remarks(asked.hooks, measurement.complete, sizes)
        + asked.notes(decides, shown)
        + ([] if in_nats is None else in_nats.notes())
    )
    return Plan(
        goal,
        asked.unit,
        asked.importance,
        asked.law.name,
        needs,
        width,
        tuple(_costs(asked, decides, shown, sizes, teacher_width, corrected)),
        tuple(remarks),
        asked.law.caveat,
        () if in_nats is None else in_nats.everything(),
        "" if in_nats is None else in_nats.answer(width),
    )


def _costs(
    asked: Asked,
    hook: HookMeasurement,
    widths: Sequence[int],
    sizes: dict[int, tuple[int, int]],
    teacher_width: int,
    corrected: dict[int, float],
) -> list[WidthCost]:
    """What a student of each width keeps at a hook point, and its parameters."""
    teacher, costs = sizes.get(teacher_width), []
    for predicted, floor in asked.floors(hook, widths):
        width = predicted.width
        total, body = sizes.get(width, (None, None))
        share = total / teacher[0] if total is not None and teacher is not None else None
        costs.append(WidthCost(width, predicted.kept_share, floor, total, body, share, corrected.get(width)))
    return costs


def _remarks(hooks: Sequence[HookMeasurement], complete: bool, sizes: dict[int, tuple[int, int]]) -> list[str]:
    """What to know about any plan at these hook points of a measurement."""
    remarks = []
    if not sizes:
        remarks.append(
            "the widths' parameters are not known, because the model or its family's students are not known: pass"
            " --model"
        )
    if all(isfinite(h.summary.critical_width.value) for h in hooks):
        remarks.append(
            "d* depends on the SAE's L0: plan with several SAEs of one hook point before building on one number"
        )
    return [*remarks, *measurement_warnings(hooks, complete)]
