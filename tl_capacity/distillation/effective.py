"""Effective capacity: how many of the teacher's features a student is worth, for each of its dimensions.

The KL that students reached is looked up in the curve of the spliced teacher: so many features must pass its hook point
for the same KL. Divided by d_S, that measures the capacity function on a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from tl_capacity.distillation.by_width import ByWidth, check_students, drawn_means, floors_by_width
from tl_capacity.distillation.observed import ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import resampled
from tl_capacity.predict.laws import budgets, context_at
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.estimate import Estimate, estimate_around, significant
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import places_told_apart
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.units import NATS
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, plain, table, terminal_notes


@dataclass(frozen=True)
class EffectiveWidth:
    """How many features the students of one width are worth, read from one curve.

    Attributes:
        hook, sae, order: of the curve.
        width: d_S.
        students: how many there are of that width.
        observed: the mean of their observed floors in nats per token, with its 95% interval over students and over
            evaluations of each.
        features: how many features the spliced teacher must keep to have that KL, with its 95% interval over documents
            and over what `observed` leaves open; None where it does not reach it with all of them.
        per_dimension: the same divided by d_S.
        expected: features per dimension by the capacity law, with its 95% interval over documents.
        error: KL of the spliced teacher with every feature kept, in nats per token.
    """

    hook: str
    sae: str
    order: str
    width: int
    students: int
    observed: Estimate
    features: Estimate | None
    per_dimension: Estimate | None
    expected: Estimate
    error: Estimate

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, except that each estimate is three numbers."""
        return {
            **vars(self),
            "observed": self.observed.to_json(),
            "features": None if self.features is None else self.features.to_json(),
            "per_dimension": None if self.per_dimension is None else self.per_dimension.to_json(),
            "expected": self.expected.to_json(),
            "error": self.error.to_json(),
        }


@dataclass(frozen=True)
class EffectiveCapacity(ShownInNotebooks):
    """How many features per dimension students are worth. It shows itself in a terminal and a notebook.

    Attributes:
        rows: one for each curve and width.
        which: what was taken as the observed floor, "fit" or "last_tenth".
        law: the capacity law that is drawn beside it.
    """

    rows: tuple[EffectiveWidth, ...]
    which: str
    law: str

    def series(self) -> dict[tuple[str, str, str], list[EffectiveWidth]]:
        """The rows of each curve, by hook point, SAE and order."""
        found: dict[tuple[str, str, str], list[EffectiveWidth]] = {}
        for row in self.rows:
            found.setdefault((row.hook, row.sae, row.order), []).append(row)
        return found

    def verdict(self) -> list[str]:
        """A sentence for each curve: what the students are worth, and what the law says."""
        name = self.named()
        return [_verdict(name(rows[0].hook, rows[0].sae), rows, self.law) for rows in self.series().values()]

    def named(self) -> Callable[[str, str], str]:
        """A function that names a row's hook point, with its SAE if several were spliced there."""
        return places_told_apart((row.hook, row.sae) for row in self.rows)

    def notes(self) -> list[str]:
        """What a reader must know before trusting the figures."""
        name = self.named()
        beyond = [
            f"students of width {row.width:,} reached {_nats(row.observed)}, but even with every feature kept the"
            f" spliced teacher at {name(row.hook, row.sae)} has {_nats(row.error)}: they are worth more than all"
            " features of this dictionary"
            for row in self.rows
            if row.features is None
        ]
        alone = sorted({row.width for row in self.rows if row.students == 1})
        notes = list(dict.fromkeys(beyond))
        if alone:
            notes.append(
                f"width{'s' if len(alone) > 1 else ''} {', '.join(f'{width:,}' for width in alone)} had one student,"
                " so the interval leaves out how seeds differ"
            )
        if any(row.features is not None and row.features.low is None for row in self.rows):
            notes.append("some numbers have no interval: splice on more text")
        return [
            *notes,
            "a student that is not fully trained is worth more than this says; also, the spliced teacher's upper"
            " layers are frozen, while a student's learn to work with the features that are left",
        ]

    def to_json(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "schema": 1,
            "which": self.which,
            "law": self.law,
            "verdict": self.verdict(),
            "notes": self.notes(),
            "widths": [row.to_json() for row in self.rows],
        }

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row for each curve and width."""
        import pandas

        names = ("observed", "features", "per_dimension", "expected", "error")
        return pandas.DataFrame(
            [
                {
                    **{name: value for name, value in vars(row).items() if name not in names},
                    **{
                        f"{name}{suffix}": None if estimate is None else getattr(estimate, part)
                        for name in names
                        for estimate in [getattr(row, name)]
                        for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
                    },
                }
                for row in self.rows
            ]
        )

    def plot(self) -> Any:
        """A plotly figure of features per dimension against the student's width, beside the capacity law."""
        from tl_capacity.distillation.effective_figure import effective_figure

        return effective_figure(self)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table, as text."""
        name = self.named()
        header = ["hook", "order", "width", f"observed ({NATS})", "features worth", "per dimension", self.law]
        return header, [
            [
                name(row.hook, row.sae),
                row.order,
                f"{row.width:,}",
                row.observed.show(significant(row.observed.value)),
                "not reached" if row.features is None else row.features.show(",.0f"),
                "" if row.per_dimension is None else row.per_dimension.show(".3g"),
                row.expected.show(".3g"),
            ]
            for row in self.rows
        ]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        for sentence in self.verdict():
            yield plain(f"{sentence}\n")
        yield table(_TITLE, *self.cells())
        yield from terminal_notes(self.notes())

    def _repr_html_(self) -> str:
        verdict = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.verdict())
        return f"{verdict}<p>{escape(_TITLE)}</p>{html_table(*self.cells())}{html_notes(self.notes())}"


_TITLE = "Features per dimension that students are worth [95% interval]"


@checked
def effective_capacity(
    measurement: Measurement,
    spliced: Spliced,
    run: DistillationRun,
    *,
    hook: str | None = None,
    importance: str | None = None,
    law: str | None = None,
    observed: str = "last_tenth",
) -> EffectiveCapacity:
    """How many features per dimension the students of each width are worth.

    Args:
        measurement: of the teacher.
        spliced: of that measurement.
        run: the teacher's students.
        hook: only this hook point; by default all that were spliced.
        importance: only this order of the features; by default all that were spliced.
        law: the capacity law to compare with; None for the default one.
        observed: "last_tenth" for the mean over the last tenth of training, which students did reach, or "fit" for
            where the curve is heading.

    Raises:
        CapacityError: where the students are of another teacher, or no curve is of this measurement, hook point and
            order.
    """
    check_students(measurement, run)
    hooks = [h for h in measurement if hook in (None, h.hook)] or [measurement[str(hook)]]
    return worth_of(hooks, spliced, observed_floors(run), importance=importance, law=law, observed=observed)


def worth_of(
    hooks: Iterable[HookMeasurement],
    spliced: Spliced,
    floors: Sequence[ObservedFloor],
    *,
    importance: str | None = None,
    law: str | None = None,
    observed: str = "last_tenth",
) -> EffectiveCapacity:
    """Effective capacity from observed floors, for the curves of some hook points.

    Raises:
        CapacityError: where no curve is of one of these hook points and that order.
    """
    by_width, chosen = floors_by_width(floors, observed), plugins().capacity_laws.named(law)
    pairs = [
        (hook, curve)
        for hook in hooks
        for curve in spliced
        if (curve.hook, curve.sae_digest) == (hook.hook, hook.sae_digest) and importance in (None, curve.order)
    ]
    if not pairs:
        raise CapacityError(
            "the splice has no curve for this hook point, SAE and order: pass the measurement that was spliced, and"
            " one of the splice's orders"
        )
    rows = [row for hook, curve in pairs for row in effective_widths(hook, curve, by_width, chosen)]
    return EffectiveCapacity(tuple(rows), observed, chosen.name)


def effective_widths(
    hook: HookMeasurement, curve: SplicedCurve, by_width: ByWidth, law: CapacityLaw
) -> list[EffectiveWidth]:
    """How many features the students of each width are worth, by one curve of one hook point.

    Documents of the splice and observed floors are drawn independently. Where both are of the same text, what is easy
    in one is easy in the other, and the interval is too wide rather than too narrow.
    """
    widths = list(by_width)

    def expected(values: Any, alpha: float) -> list[float]:
        return list(budgets(law, widths, context_at(hook, values, alpha)) / np.array(widths))

    rows = []
    for width, at_width in zip(widths, resampled(hook, curve.importance, expected), strict=True):
        students = by_width[width]
        mean = float(np.mean([student.value for student in students]))
        drawn = None if curve.replicates is None else drawn_means(students, len(curve.replicates))
        kept = curve.features_for(mean, drawn)
        known = len(students) > 1 or students[0].low is not None
        rows.append(
            EffectiveWidth(
                hook.hook,
                hook.sae,
                curve.order,
                width,
                len(students),
                estimate_around(mean, drawn).within(0.0) if drawn is not None and known else Estimate(mean),
                kept,
                None if kept is None else _divided(kept, width),
                at_width,
                curve.error,
            )
        )
    return rows


def _divided(estimate: Estimate, by: int) -> Estimate:
    low, high = (None if end is None else end / by for end in (estimate.low, estimate.high))
    return Estimate(estimate.value / by, low, high)


def _nats(estimate: Estimate) -> str:
    return f"{estimate.show(significant(estimate.value, 3))} {NATS}"


def _verdict(place: str, rows: Sequence[EffectiveWidth], law: str) -> str:
    """One sentence: what students are worth by one curve, beside the capacity law."""
    worth = {row.width: row.per_dimension for row in rows if row.per_dimension is not None}
    where = f"At {place}, with features ordered by {rows[0].order}:"
    if not worth:
        return f"{where} students of every width are worth more than all features of the dictionary"
    values = [estimate.value for estimate in worth.values()]
    said = f"{values[0]:.3g}" if len(values) == 1 else f"{min(values):.3g} to {max(values):.3g}"
    expected = [row.expected.value for row in rows if row.width in worth]
    low, high = f"{min(expected):.3g}", f"{max(expected):.3g}"
    between = f"width {min(worth):,}" if len(worth) == 1 else f"widths {min(worth):,} to {max(worth):,}"
    return (
        f"{where} students of {between} are worth {said} features per dimension; {law} says"
        f" {low if low == high else f'{low} to {high}'}"
    )
