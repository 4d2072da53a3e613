"""A plan in nats: every available method answers the same loss, and one of them decides the width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tl_capacity.errors import CapacityError
from tl_capacity.plan.answers import MethodPlan, decisive, headline, method_plan, observed_plan, widest_prediction
from tl_capacity.plan.asked import Asked
from tl_capacity.plan.calibration import Corrected, Observed, observed_alone
from tl_capacity.plan.costs import ladder
from tl_capacity.plan.methods import Method, further_forecasts, methods_of, widest_of_each
from tl_capacity.plan.result import HookPlan
from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.units import NATS

CALIBRATION = (
    "corrected floors are the predicted ones times a factor, the students' observed / predicted; between their widths"
    " it follows a straight line in the logarithms of factor and width, and beyond them it is constant; the interval"
    " takes the largest factor by which this missed a left-out width between two others"
)


@dataclass(frozen=True)
class Evidence:
    """What answers a loss in nats per token, besides the measurement.

    Attributes:
        spliced: of the measurement.
        forecasts: of the same teacher.
        observed: what its students reached.
    """

    spliced: Spliced | None = None
    forecasts: tuple[Forecasts, ...] = ()
    observed: Observed | None = None

    @property
    def any(self) -> bool:
        """Whether there is any evidence."""
        return self.spliced is not None or bool(self.forecasts) or self.observed is not None


@dataclass(frozen=True)
class InNats:
    """What every method says of a loss in nats per token.

    Attributes:
        target: that loss.
        asked: the prediction that was asked for.
        methods: each at the hook point that needs the widest student.
        forecasts: of the same teacher.
        observed: what students reached.
    """

    target: float
    asked: Asked
    methods: tuple[Method, ...]
    forecasts: tuple[Forecasts, ...]
    observed: Observed | None

    @classmethod
    def of(cls, target: float, asked: Asked, hooks: Sequence[HookMeasurement], evidence: Evidence) -> InNats:
        """Every method that a measurement and the evidence allow."""
        # Students turn whatever unit into nats; without them it says nothing of a loss.
        further = [] if evidence.observed is None else [asked.importance]
        widths = ladder(max(hook.teacher_width or hook.width for hook in hooks))
        registered = further_forecasts(hooks, evidence.spliced, evidence.forecasts, widths)
        every = methods_of(hooks, further, evidence.spliced, (*evidence.forecasts, registered))
        return cls(target, asked, tuple(widest_of_each(every, target)), evidence.forecasts, evidence.observed)

    @cached_property
    def needs(self) -> tuple[HookPlan, ...]:
        """The width that each hook point needs by the requested prediction.

        Empty if that prediction is not in nats. Empty too if its dictionary is the limit and there are students to
        answer.

        Raises:
            CapacityError: where its dictionary is the limit, and there are no students.
        """
        if self.asked.unit != NATS:
            return ()
        try:
            return self.asked.within(self.target)
        except CapacityError:
            if self.observed is None:
                raise
            return ()

    @cached_property
    def own(self) -> MethodPlan | None:
        """What the students' floors say by themselves."""
        return None if self.observed is None else observed_plan(self.observed, self.target)

    @cached_property
    def plans(self) -> tuple[MethodPlan, ...]:
        """What each method says."""
        return tuple(
            method_plan(method, self.target, self.observed, method.key == self.asked.key) for method in self.methods
        )

    @cached_property
    def width(self) -> int:
        """The smallest width within the loss, by the deciding method.

        Raises:
            CapacityError: where no method says a width.
        """
        decides = decisive(self.plans, self.own)
        if decides is not None:
            return int((decides.corrected or decides.width).value)  # type: ignore[union-attr]
        widest = widest_prediction(self.plans)
        if widest is None:
            raise CapacityError(
                f"no method here gives a width for {self.target:,.6g} nats per token: splice the measurement, or choose"
                " another loss"
            )
        return widest

    def answer(self, width: int) -> str:
        """The answer in words, for that planned width."""
        between = "" if self.observed is None else self.observed.between()
        return headline(self.target, self.plans, self.own, width, between)

    def notes(self) -> list[str]:
        """What a reader must know about the forecasts and the students."""
        notes = [note for each in self.forecasts for note in each.notes]
        if self.observed is None:
            return notes
        notes.append(CALIBRATION)
        if self.observed.left_out:
            widths = ", ".join(f"{width:,}" for width in sorted(self.observed.left_out))
            notes.append(f"the floors of width {widths} are 0, so nothing is corrected by them")
        return notes

    def everything(self) -> tuple[MethodPlan, ...]:
        """What the students say by themselves, then each method."""
        return self.plans if self.own is None else (self.own, *self.plans)

    def corrected(self, widths: Iterable[int]) -> dict[int, float]:
        """The floor of each width by the deciding method, corrected by students; empty without students."""
        decides = decisive(self.plans, self.own)
        if self.observed is None or decides is None or decides.corrected is None:
            return {}
        wanted = np.array(sorted(widths), dtype=np.int64)
        if decides is self.own:
            inside = (wanted >= self.observed.widths[0]) & (wanted <= self.observed.widths[-1])
            wanted, floors = wanted[inside], observed_alone(self.observed).floors(wanted[inside])
        else:
            method = self.methods[self.plans.index(decides)]
            floors = Corrected(self.observed, method.floors).floors(wanted)
        return {int(width): float(floor) for width, floor in zip(wanted, floors, strict=True) if np.isfinite(floor)}
