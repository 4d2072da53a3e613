"""Decomposition of observed floors: observed(d_S) = C · predicted(d_S) + B, with intervals, and beside it everything
else that might explain them as well.

Candidates are ranked by leave-one-width-out error, as R² of a straight line through a handful of points says little:
1/d alone has R² 0.992 on the published predicted floors of the paper (arXiv:2604.04037).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from tl_capacity.distillation import notes
from tl_capacity.distillation.candidates import NATS, RIVALS, Points, Prediction, candidates_of, predictions_of
from tl_capacity.distillation.fitting import Fit, fit_candidate
from tl_capacity.distillation.observed import OBSERVED, ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.results.estimate import Estimate, group_resamples
from tl_capacity.runtime.units import per_token
from tl_capacity.show.tables import html_table, plain, table

SHOWN = 10
"""Candidates that the table shows whatever they are."""


@dataclass(frozen=True)
class Decomposition:
    """Observed floors, and every candidate fitted to them, best first; shows itself in a terminal.

    Attributes:
        observed: of each student, controls included.
        which: "fit" (L∞) or "last_tenth": what was taken as the observed floor.
        fits: by leave-one-width-out error, smallest first; those that could not be fitted last.
        chosen: the prediction that was asked for: hook, importance and law.
        predicted: its floors [width].
    """

    observed: tuple[ObservedFloor, ...]
    which: str
    fits: tuple[Fit, ...]
    chosen: Fit
    predicted: Mapping[int, Estimate]

    @property
    def unit(self) -> str:
        """Of the prediction that was asked for."""
        return self.chosen.candidate.unit

    @property
    def winner(self) -> Fit | None:
        """The candidate with the smallest error; None where too few widths make one."""
        return self.fits[0] if self.fits[0].error is not None and len(self.predicted) >= notes.MIN_WIDTHS else None

    @property
    def students(self) -> tuple[ObservedFloor, ...]:
        """The observed floors without the controls', which no candidate is fitted to."""
        return tuple(floor for floor in self.observed if floor.start != "teacher")

    def verdict(self) -> str:
        """Which candidate explains the floors best, and where the prediction that was asked for stands."""
        return notes.verdict(self.fits, self.winner, self.chosen, len(self.predicted))

    def notes(self) -> list[str]:
        """What a reader must know before believing the figures, the verdict first."""
        floors: dict[int, list[float]] = defaultdict(list)
        for student in self.students:
            floors[student.width].append(student.taken_as(self.which).value)
        return [
            self.verdict(),
            *notes.ranking_notes(self.fits, self.winner, len(self.predicted)),
            *notes.prediction_notes(self.chosen, self.in_nats()),
            *notes.floor_notes(self.observed, self.which, floors),
        ]

    def shown(self, most: int = SHOWN) -> list[tuple[int, Fit]]:
        """The candidates that a table needs, with their places: the best, the rivals, the best naive floor, and every
        importance at the hook point and by the law asked for, C fitted and C = 1.
        """
        naive = next((fit for fit in self.fits if fit.candidate.kind == "naive floor"), None)
        return [
            (place, fit)
            for place, fit in enumerate(self.fits, 1)
            if place <= most or fit.candidate.kind == "rival" or fit is naive or self._is_beside_chosen(fit)
        ]

    def in_nats(self) -> list[Fit]:
        """The predictions in nats per token at the hook point and by the law asked for, C fitted: they are right where
        it is 1.
        """
        return [
            fit
            for fit in self.fits
            if self._is_beside_chosen(fit) and fit.candidate.unit == NATS and not fit.candidate.as_is
        ]

    def _is_beside_chosen(self, fit: Fit) -> bool:
        """Whether a fit is a prediction at the hook point and by the law asked for, of whatever importance."""
        asked, candidate = self.chosen.candidate, fit.candidate
        return candidate.kind == "prediction" and (candidate.hook, candidate.law) == (asked.hook, asked.law)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "schema": 1,
            "observed": [floor.to_json() for floor in self.observed],
            "which": self.which,
            "predicted": {str(width): estimate.to_json() for width, estimate in self.predicted.items()},
            "unit": self.unit,
            "chosen": self.chosen.to_json(),
            "winner": None if self.winner is None else self.winner.candidate.name,
            "verdict": self.verdict(),
            "notes": self.notes()[1:],
            "candidates": [fit.to_json() for fit in self.fits],
        }

    def plot(self) -> Any:
        """A plotly figure of the observed floors with what explains them; see `report.figures.observed_figure`."""
        from tl_capacity.distillation.figures import observed_figure

        return observed_figure(self.observed, self)

    def to_frame(self) -> Any:
        """The candidates as a pandas DataFrame, best first."""
        import pandas

        numbers = ("C", "B", "exponent")
        rows = []
        for row in (fit.to_json() for fit in self.fits):
            intervals = {
                f"{key} {end}": row[key][end] if row[key] else None for key in numbers for end in ("low", "high")
            }
            rows.append({**row, **{key: row[key]["value"] if row[key] else None for key in numbers}, **intervals})
        return pandas.DataFrame(rows).drop(columns="fitted_floors")

    def table_of_floors(self) -> list[dict[str, Any]]:
        """One object per student: width, seed, observed floor with its interval, and predicted floor."""
        return [
            {
                "width": student.width,
                "seed": student.seed,
                "observed_floor": student.taken_as(self.which).value,
                "observed_low": student.low if self.which == "fit" else None,
                "observed_high": student.high if self.which == "fit" else None,
                "predicted_floor": self.predicted[student.width].value,
            }
            for student in self.students
        ]

    def _repr_html_(self) -> str:
        return html_table(*self._cells()) + "".join(f"<p>note: {escape(note)}</p>" for note in self.notes())

    def __rich_console__(self, console: Any, options: Any) -> Any:
        header = [
            "width",
            "seed",
            "observed floor, nats per token",
            f"predicted, {per_token(self.unit)}",
            "C·predicted + B",
            self.fits[0].candidate.name,
        ]
        rows = [
            [
                f"{row['width']:,}",
                str(row["seed"]),
                Estimate(row["observed_floor"], row["observed_low"], row["observed_high"]).show(".4f"),
                self.predicted[row["width"]].show(".4g"),
                f"{self.chosen.fitted[row['width']]:.4f}",
                f"{self.fits[0].fitted[row['width']]:.4f}",
            ]
            for row in self.table_of_floors()
        ]
        yield table(
            f"Observed floors ({'L∞ of the fit' if self.which == 'fit' else 'mean of the last tenth'}) and"
            f" {self.chosen.candidate.name}",
            header,
            rows,
        )
        yield table("Candidates: observed = C · candidate + B, best first", *self._cells())
        for note in self.notes():
            yield f"[yellow]note:[/yellow] {plain(note)}"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the candidates that a table needs, as text."""
        header = ["place", "candidate", "leave-one-width-out error, nats per token", "R²", "C", "B", "exponent"]
        return header, [
            [
                f"{place}{', asked for' if fit is self.chosen else ''}",
                fit.candidate.name,
                fit.show_error(),
                "too few widths" if fit.r2 is None else f"{fit.r2:.4f}",
                "" if fit.c is None else fit.c.show(".3g"),
                fit.b.show(".3g"),
                "" if fit.exponent is None else fit.exponent.show(".2f"),
            ]
            for place, fit in self.shown()
        ]


def decompose(
    measurement: Measurement,
    run: DistillationRun,
    *,
    hook: str | None = None,
    importance: str | None = None,
    law: str | None = None,
    observed: str = "fit",
    max_fvu: float | None = 1.0,
) -> Decomposition:
    """Fit observed floors to predicted ones, and to every rival.

    Args:
        measurement: of the teacher.
        run: its students.
        hook: the hook point whose prediction is asked for; by default the measured one in the middle. All others are
            candidates as well.
        importance, law: of that prediction; None for the default ones. All others that the measurement allows are
            candidates as well.
        observed: "fit" for L∞ of each curve's fit, or "last_tenth" for the mean over the last tenth of training, as the
            paper has it.
        max_fvu: refuse SAEs that leave more of the variance unexplained.

    Raises:
        CapacityError: where there is no such hook point, importance, law or observed floor, or the two do not belong
            together.
    """
    if observed not in OBSERVED:
        raise CapacityError(f"{observed!r} is no observed floor: choose one of {', '.join(OBSERVED)}")
    if not run.complete:
        raise MeasurementError("the distillation has not ended: resume it with --resume")
    if run.teacher != measurement.provenance.model:
        raise MeasurementError(
            f"the measurement is of {measurement.provenance.model!r} and the distillation of {run.teacher!r}: decompose"
            " the floors of one teacher"
        )
    asked_hook = measurement[hook] if hook is not None else measurement.hooks[len(measurement.hooks) // 2]
    measurement.budget((), importance, law, max_fvu)  # refuses SAEs that do not fit the model
    asked = (asked_hook.hook, asked_hook.estimator(importance).name, plugins().capacity_laws.named(law).name)
    floors = observed_floors(run)
    if not run.widths:
        raise MeasurementError("the distillation has no students but the control: distil some widths")
    parameters = {student.name: student.body_parameters for student in run}
    return decompose_floors(floors, parameters, predictions_of(measurement, run.widths, asked), asked, observed)


def decompose_floors(
    floors: Sequence[ObservedFloor],
    parameters: Mapping[str, int],
    predictions: Sequence[Prediction],
    asked: tuple[str, str, str],
    observed: str = "fit",
) -> Decomposition:
    """The same from floors and predictions as such.

    Args:
        parameters: of each student's body, by the student's name.
        asked: hook, importance and law of the prediction that is asked for.
        observed: "fit" or "last_tenth", as in `decompose`.
    """
    students = [floor for floor in floors if floor.start != "teacher"]
    points = Points(
        np.array([student.width for student in students], dtype=np.float64),
        np.array([student.taken_as(observed).value for student in students], dtype=np.float64),
        np.array([parameters[student.name] for student in students], dtype=np.float64),
    )
    replicates = group_resamples(points.widths)
    fits = [fit_candidate(candidate, points, replicates) for candidate in (*RIVALS, *candidates_of(predictions))]
    prediction = next(p for p in predictions if (p.hook, p.importance, p.law) == asked)
    chosen = next(
        fitted
        for fitted in fits
        if (fitted.candidate.hook, fitted.candidate.importance, fitted.candidate.law) == asked
        and not fitted.candidate.as_is
    )
    ranked = tuple(sorted(fits, key=lambda fitted: (fitted.error is None, fitted.error or 0.0)))
    return Decomposition(tuple(floors), observed, ranked, chosen, prediction.floors)
