"""Answers in nats: what every method says of a loss, how far each was off, and the answer in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tl_capacity.plan.calibration import Corrected, Observed, observed_alone
from tl_capacity.plan.fields import estimate_field, field
from tl_capacity.plan.methods import Method, first_within
from tl_capacity.results.estimate import Estimate

UNCHECKED = "it was never checked against students"
BOUND = "a bound: no narrower student is within the loss"
OBSERVED_ALONE = "observed floors, interpolated"
"""Name of the students' own floors in the list of methods."""
ONLY_STUDENTS = "only trained students can tell which is right: pass them with --calibrate"


@dataclass(frozen=True)
class MethodPlan:
    """What one method says of a loss in nats per token.

    Attributes:
        method, hook: which; the hook point is empty where it knows none.
        width: the smallest width whose floor is within the loss, with its 95% interval over documents; None where there
            is none, or its floors are not in nats.
        low, high: that width where its floors are off as far, one way and the other, as they were where they were
            checked; None where they never were, or no width is within the loss then.
        checked: how far that was, in words.
        corrected: the smallest width by its floors as the students correct them, with an interval; None without
            students.
        missed_by: the largest factor by which that missed a width that was left out.
        asked: whether it is the method that was asked for.
    """

    method: str
    hook: str
    width: Estimate | None
    low: int | None = None
    high: int | None = None
    checked: str = UNCHECKED
    corrected: Estimate | None = None
    missed_by: float | None = None
    asked: bool = False

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, except that each estimate is three numbers."""
        return {
            **vars(self),
            "width": None if self.width is None else self.width.to_json(),
            "corrected": None if self.corrected is None else self.corrected.to_json(),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> MethodPlan:
        """The checked object that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: where it lacks or garbles something.
        """
        width, corrected = (
            None if saved[name] is None else estimate_field(saved, name) for name in ("width", "corrected")
        )
        return cls(
            field(saved, "method", str),
            field(saved, "hook", str),
            width,
            field(saved, "low", (int, type(None))),
            field(saved, "high", (int, type(None))),
            field(saved, "checked", str),
            corrected,
            field(saved, "missed_by", (float, int, type(None))),
            saved["asked"] is True,
        )


def method_plan(method: Method, target: float, observed: Observed | None, asked: bool) -> MethodPlan:
    """What one method says of a loss."""
    widths = method.widths
    record = method.record if method.in_nats else None
    ends: tuple[int | None, int | None] = (None, None)
    if record is not None:
        floors = method.floors(widths)
        ends = (first_within(widths, floors, target / record.low), first_within(widths, floors, target / record.high))
    corrected = None if observed is None else Corrected(observed, method.floors)
    if corrected is not None and (method.is_bound or not corrected.possible):
        corrected = None
    checked = UNCHECKED if record is None else record.sentence()
    return MethodPlan(
        method.name,
        method.hook,
        method.needed(target) if method.in_nats else None,
        *ends,
        BOUND if method.is_bound else checked if method.in_nats else f"predicts {method.unit}, which is not a loss",
        None if corrected is None else corrected.needed(target, widths),
        None if corrected is None else corrected.missed_by,
        asked,
    )


def observed_plan(observed: Observed, target: float) -> MethodPlan:
    """What the students' floors say by themselves. Beyond the distilled widths they say nothing."""
    alone, widths = observed_alone(observed), np.arange(observed.widths[0], observed.widths[-1] + 1)
    inside = observed.reaches(target)
    return MethodPlan(
        OBSERVED_ALONE,
        "",
        None,
        checked="students themselves" if inside else f"the loss is outside of what {observed.between()} reached",
        corrected=alone.needed(target, widths) if inside else None,
        missed_by=alone.missed_by,
    )


def decisive(plans: Sequence[MethodPlan], own: MethodPlan | None) -> MethodPlan | None:
    """The method that decides the width; None if no method says one.

    The students' own floors come first, if they reach the loss. Then comes the corrected method that missed left-out
    widths least, then the requested method.

    Args:
        own: what the students' floors say by themselves, where there are students.
    """
    if own is not None and own.corrected is not None:
        return own
    corrected = [each for each in plans if each.corrected is not None]
    if corrected:
        return min(corrected, key=lambda each: each.missed_by or float("inf"))
    return next((each for each in plans if each.asked and each.width is not None), None)


def widest_prediction(plans: Sequence[MethodPlan]) -> int | None:
    """The widest width that any method says, without bounds; None if no method says one."""
    widths = _predictions(plans)
    return int(max(widths)) if widths else None


def headline(target: float, plans: Sequence[MethodPlan], own: MethodPlan | None, width: int, students: str) -> str:
    """The answer to a loss in nats per token, and the doubts about it.

    Args:
        plans: of every method.
        own: as in `decisive`.
        width: the one that is planned, which a family can build.
        students: the widths of the students, in words.
    """
    goal, decides = f"For a floor of at most {target:,.6g} nats per token", decisive(plans, own)
    predictions = _predictions(plans)
    if decides is None:
        return _sentences(
            [f"{goal}, the methods here say {_between(predictions)}, and the widest is planned", ONLY_STUDENTS]
        )
    where = f" at {decides.hook}" if decides.hook else ""
    if own is not None and decides is own:
        parts = [f"{goal}, students of {students} say width {_shown(own.corrected)} by interpolation"]
        corrected = [each.corrected.value for each in plans if each.corrected is not None]
        parts += [f"corrected by them, the methods here say {_between(corrected)}"] if corrected else []
        parts += [f"uncorrected, they say {_between(predictions)}"] if predictions else []
    elif decides.corrected is not None:
        parts = [
            f"{goal}, {decides.method}{where} says width {_shown(decides.corrected)}, corrected by students of"
            f" {students}",
            "none of them reached that loss, so this is an extrapolation",
        ]
    else:
        others = _predictions([each for each in plans if each is not decides])
        parts = [f"{goal}, {decides.method}{where} says width {_shown(decides.width)}"]
        parts += [
            UNCHECKED if decides.checked == UNCHECKED else f"where it was checked, {decides.checked}{_makes(decides)}"
        ]
        parts += [f"the other methods here say {_between(others)}"] if others else []
        parts += [ONLY_STUDENTS]
    needed = decides.corrected or decides.width
    if needed is not None and width != needed.value:
        parts[0] += f"; the next width that its family can build is {width:,}"
    return _sentences(parts)


def _sentences(parts: Sequence[str]) -> str:
    """Each part as a sentence of its own."""
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in parts)


def method_cells(plans: Sequence[MethodPlan]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the methods, as text."""
    corrected = any(each.corrected is not None for each in plans)
    header = ["method", "hook", "smallest width", "if off as far as before"]
    header += ["corrected by students", "left-out widths missed by"] if corrected else []
    return [*header, "checked"], [
        [
            f"{each.method}{' ←' if each.asked else ''}",
            each.hook,
            _shown(each.width) or "none",
            _range(each),
            *(
                [
                    _shown(each.corrected),
                    "" if each.missed_by is None else f"at most × {each.missed_by:.2f}",
                ]
                if corrected
                else []
            ),
            each.checked,
        ]
        for each in plans
    ]


def _predictions(plans: Sequence[MethodPlan]) -> list[float]:
    """The widths that methods say without students, without bounds."""
    return [each.width.value for each in plans if each.width is not None and each.checked != BOUND]


def _shown(width: Estimate | None) -> str:
    return "" if width is None else width.show(",.0f")


def _between(widths: Sequence[float]) -> str:
    low, high = min(widths), max(widths)
    return f"width {low:,.0f}" if low == high else f"widths {low:,.0f} to {high:,.0f}"


def _makes(each: MethodPlan) -> str:
    """The widths that follow if the method is off by as much as before."""
    return f", which makes that {_range(each)}" if each.low is not None or each.high is not None else ""


def _range(each: MethodPlan) -> str:
    if each.low is None and each.high is None:
        return ""
    low = "none" if each.low is None else f"{each.low:,}"
    return f"{low} to {'no known width' if each.high is None else f'{each.high:,}'}"
