"""Compare observed floors with predictions: observed(d_S) = C · predicted(d_S) + B, with intervals.

Every other explanation of the floors stands beside it.

What knows the teacher's features and what knows none meet in a league (`league.py`), as R² of a straight line through a
handful of points says little: 1/d alone has R² 0.992 on the published predicted floors of the paper (arXiv:2604.04037).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from typing import Any

import numpy as np

from tl_capacity.distillation import notes
from tl_capacity.distillation.by_width import check_students
from tl_capacity.distillation.candidates import LINE, Candidate, Points, Shape, shapes_of, short_names
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.fitting import Fit, fit_candidates
from tl_capacity.distillation.league import Group, league
from tl_capacity.distillation.left_out import floor_noise, text_noise
from tl_capacity.distillation.observed import OBSERVED, ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.distillation.standings import candidate_cells, league_cells
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.splices import check_splice
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import hook_floors
from tl_capacity.predict.forecasts import Forecasts
from tl_capacity.predict.predictors import forecasts_of
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.estimate import Estimate, group_resamples, significant
from tl_capacity.results.naming import middle
from tl_capacity.runtime.units import NATS, per_token
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, plain, table, terminal_notes

SHOWN = 3
"""How many candidates of each group the table always shows."""


@dataclass(frozen=True)
class Decomposition(ShownInNotebooks):
    """Observed floors, and every candidate fitted to them. It shows itself in a terminal.

    Attributes:
        observed: of each student, controls included.
        which: "last_tenth" or "fit" (L∞): what was taken as the observed floor.
        fits: by leave-one-width-out error, smallest first, those that could not be fitted last; in no order where
            there are too few widths for one.
        chosen: the prediction that was asked for, with C and B fitted.
        predicted: its floors [width].
        leagues: for each way to read the floor, the candidates in groups of equally many fitted constants, and which
            side is ahead; no group below five widths.
        remarks: what is known of the candidates besides, a sentence each.
    """

    observed: tuple[ObservedFloor, ...]
    which: str
    fits: tuple[Fit, ...]
    chosen: Fit
    predicted: Mapping[int, Estimate]
    leagues: Mapping[str, tuple[Group, ...]]
    remarks: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """Unit of the requested prediction."""
        return self.chosen.candidate.shape.unit

    @property
    def groups(self) -> tuple[Group, ...]:
        """The league for the requested way to read the floor."""
        return self.leagues[self.which]

    @property
    def winner(self) -> Fit | None:
        """The candidate that explains the floors best; None if no side is ahead in any group.

        It is the best candidate of the side that is ahead in its group. Of several such sides, the one with the
        smallest error counts.
        """
        leaders = [group.leader for group in self.groups if group.leader is not None]
        leader = min(leaders, key=lambda side: side.error.value, default=None)
        return None if leader is None else self._fit_of(leader.best)

    @property
    def best(self) -> tuple[Fit | None, Fit | None]:
        """The best candidate that knows features and the best rival, both fitted with C and B.

        Each is None if there is no such candidate, or if there are too few widths to rank them.
        """
        group = next((group for group in self.groups if group.constants == LINE.constants), None)
        sides = (None, None) if group is None else (group.features, group.rivals)
        features, rivals = (None if side is None else self._fit_of(side.best) for side in sides)
        return features, rivals

    @property
    def students(self) -> tuple[ObservedFloor, ...]:
        """The observed floors without the controls. No candidate is fitted to a control."""
        return tuple(floor for floor in self.observed if floor.start != "teacher")

    def verdict(self) -> str:
        """Whether knowing the teacher's features helps to predict a left-out width, for the requested way to read the
        floor.
        """
        return self.verdicts()[self.which]

    def verdicts(self) -> dict[str, str]:
        """The verdict for each way to read the floor; the requested one comes first."""
        return {
            which: notes.verdict(self.leagues[which], notes.reading(self.observed, which), len(self.predicted))
            for which in self._readings
        }

    @property
    def _short(self) -> Callable[[Candidate], str]:
        return short_names(fit.candidate for fit in self.fits)

    @property
    def _readings(self) -> tuple[str, ...]:
        """The ways to read the floor; the requested one comes first."""
        return (self.which, *(which for which in OBSERVED if which != self.which))

    def notes(self) -> list[str]:
        """What a reader must know before believing the figures; the verdicts come first."""
        floors: dict[int, list[float]] = defaultdict(list)
        for student in self.students:
            floors[student.width].append(student.taken_as(self.which).value)
        asked = next((group for group in self.groups if self.chosen.candidate in group.places), None)
        return [
            *dict.fromkeys(self.verdicts().values()),
            *notes.ranking_notes(asked, self.chosen),
            *notes.prediction_notes(self.chosen, self.in_nats(), floors),
            *notes.floor_notes(self.observed, self.which, floors),
            *self.remarks,
        ]

    def shown(self, most: int = SHOWN) -> list[tuple[str, Fit]]:
        """The candidates that a table shows, each with its place and the place's interval.

        These are the best of each group, the best rival, and the requested shape. With C and B fitted, every importance
        at the requested hook point and law is shown too. With too few widths to rank, there are no places, and only the
        predictions asked for are shown.
        """
        if not self.groups:
            return [("", fit) for fit in self.fits if fit is self.chosen or fit in self.in_nats()]
        shown = []
        for group in self.groups:
            fits = [fit for fit in self.fits if fit.candidate in group.places]
            rival = next((fit for fit in fits if not fit.candidate.shape.knows_features), None)
            shown += [
                (group.places[fit.candidate].show(".0f"), fit)
                for rank, fit in enumerate(fits)
                if rank < most
                or fit is rival
                or fit.candidate.shape is self.chosen.candidate.shape
                or (fit.candidate.form is LINE and self._is_beside_chosen(fit))
            ]
        return shown

    def in_nats(self) -> list[Fit]:
        """The predictions in nats per token at the requested hook point and law, fitted with C and B.

        Such a prediction is right if C is 1 and B is 0.
        """
        return [
            fit
            for fit in self.fits
            if fit.candidate.form is LINE and fit.candidate.shape.unit == NATS and self._is_beside_chosen(fit)
        ]

    def _is_beside_chosen(self, fit: Fit) -> bool:
        """Whether a fit is a prediction at the requested hook point and law, with any importance."""
        asked, shape = self.chosen.candidate.shape, fit.candidate.shape
        return shape.knows_features and (shape.hook, shape.law) == (asked.hook, asked.law)

    def _fit_of(self, candidate: Candidate) -> Fit:
        return next(fit for fit in self.fits if fit.candidate == candidate)

    def to_json(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        verdicts = self.verdicts()
        return {
            "schema": 1,
            "verdict": self.verdict(),
            "verdicts": verdicts,
            "observed": [floor.to_json() for floor in self.observed],
            "which": self.which,
            "predicted": {str(width): estimate.to_json() for width, estimate in self.predicted.items()},
            "unit": self.unit,
            "chosen": self.chosen.to_json(),
            "winner": None if self.winner is None else self.winner.candidate.name,
            "league": {which: [group.to_json() for group in self.leagues[which]] for which in verdicts},
            "notes": [note for note in self.notes() if note not in verdicts.values()],
            "candidates": [fit.to_json() for fit in self.fits],
        }

    def plot(self) -> Any:
        """A plotly figure of the observed floors and what explains them; see `report.figures.observed_figure`."""
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
                "observed_low": student.taken_as(self.which).low,
                "observed_high": student.taken_as(self.which).high,
                "predicted_floor": self.predicted[student.width].value,
            }
            for student in self.students
        ]

    def _repr_html_(self) -> str:
        answers = "".join(f"<p>{escape(verdict)}</p>" for verdict in dict.fromkeys(self.verdicts().values()))
        tables = [league_cells(self.groups, self._short)] if self.groups else []
        tables.append(candidate_cells(self.shown(), self.chosen, self._short))
        notes = html_notes(self.to_json()["notes"])
        return answers + "".join(html_table(*cells) for cells in tables) + notes

    def __rich_console__(self, console: Any, options: Any) -> Any:
        for verdict in dict.fromkeys(self.verdicts().values()):
            yield f"[bold]{plain(verdict[:1].upper() + verdict[1:])}.[/bold]"
        yield table(f"Observed floors and {self.chosen.candidate.name}", *self._floor_cells())
        if self.groups:
            title = "Error at a left-out width, nats per token, of the candidate chosen without it [95% interval]"
            yield table(title, *league_cells(self.groups, self._short))
        shown = candidate_cells(self.shown(), self.chosen, self._short)
        yield table("Candidates: observed = C · candidate^exponent + B; error at a left-out width", *shown)
        yield from terminal_notes(self.to_json()["notes"])

    def _floor_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the students, with both readings of each floor side by side."""
        readings = {notes.reading(self.observed, which): which for which in self._readings}
        header = [
            "width",
            "seed",
            *(f"{reading}, nats per token" for reading in readings),
            f"predicted, {per_token(self.unit)}",
            "C·predicted + B",
        ]
        return header, [
            [
                f"{student.width:,}",
                str(student.seed),
                *(student.taken_as(which).show(".4f") for which in readings.values()),
                self.predicted[student.width].show(significant(self.predicted[student.width].value)),
                f"{self.chosen.fitted[student.width]:.4f}",
            ]
            for student in self.students
        ]


def decompose(
    measurement: Measurement,
    run: DistillationRun,
    *,
    hook: str | None = None,
    importance: str | None = None,
    law: str | None = None,
    observed: str = "last_tenth",
    max_fvu: float | None = 1.0,
    forecasts: Sequence[Spliced | Forecasts] = (),
) -> Decomposition:
    """Fit observed floors to the predicted ones and to every rival.

    What every registered floor predictor says is a candidate, at each hook point, importance and law that it
    distinguishes.

    Args:
        measurement: of the teacher.
        run: its students.
        hook: the hook point whose prediction is asked for; by default the measured one in the middle.
        importance, law: of that prediction; None for the default ones.
        observed: "last_tenth" for the mean over the last tenth of training, which students did reach, or "fit" for L∞
            of each curve's fit, which is extrapolated. The verdict by the other stands beside.
        max_fvu: refuse SAEs that leave more of the variance unexplained.
        forecasts: floors for which the teacher was run, as `tlc.splice` gave them or folders hold them.

    Raises:
        CapacityError: where there is no such hook point, importance, law or observed floor, or they do not belong
            together.
    """
    if observed not in OBSERVED:
        raise CapacityError(
            f"{observed!r} is not a way to read the observed floor: choose one of {', '.join(OBSERVED)}"
        )
    check_students(measurement, run, "decompose the floors of one teacher")
    for told in forecasts:
        if isinstance(told, Spliced):
            check_splice(told, measurement)
        else:
            told.check_teacher(measurement.provenance.model)
    asked_hook = measurement[hook] if hook is not None else middle(measurement)
    measurement.budget((), importance, law, max_fvu)  # refuses SAEs that do not fit the model
    chosen_law = plugins().capacity_laws.named(law)
    floors = observed_floors(run)
    if not run.widths:
        raise MeasurementError("the distillation has only the control student: distil some widths")
    predicted = hook_floors(asked_hook, run.widths, importance, chosen_law)
    parameters = {student.width: student.body_parameters for student in run if student.start != "teacher"}
    everything = forecasts_of(
        measurement,
        run.widths,
        Spliced(tuple(curve for told in forecasts if isinstance(told, Spliced) for curve in told)),
        Forecasts(tuple(each for told in forecasts if isinstance(told, Forecasts) for each in told)),
        parameters=parameters,
    )
    asked = (
        plugins().floor_predictors.default.name,
        asked_hook.hook,
        asked_hook.sae,
        chosen_law.name,
        asked_hook.estimator(importance).name,
    )
    refined = {floor.width: floor.predicted_floor for floor in predicted}
    return decompose_floors(floors, everything, asked, observed, refined, run.students)


def decompose_floors(
    floors: Sequence[ObservedFloor],
    forecasts: Forecasts,
    asked: tuple[str, str, str, str, str],
    observed: str = "last_tenth",
    predicted: Mapping[int, Estimate] | None = None,
    curves: Sequence[StudentCurve] = (),
) -> Decomposition:
    """Decompose from observed floors and forecasts, without a run and a measurement.

    Args:
        asked: predictor, hook, SAE, law and importance of the prediction that is asked for.
        observed: "last_tenth" or "fit", as in `decompose`.
        predicted: its floors with their intervals; by default as in the forecasts.
        curves: of the students, whose losses on the parts of the held-out text are resampled.
    """
    students = [floor for floor in floors if floor.start != "teacher"]
    widths = sorted({student.width for student in students})
    shapes = shapes_of(forecasts, widths)
    powers = [shape for shape in shapes.values() if shape.free_exponent]
    candidates = list(chain.from_iterable(shape.candidates(powers) for shape in shapes.values()))
    readings = {which: _points(students, which) for which in OBSERVED}
    points = readings[observed]
    fits = fit_candidates(candidates, points, group_resamples(points.widths))
    noise = {which: floor_noise(students, which, curves) for which in OBSERVED}
    leagues = {which: league(candidates, readings[which], noise[which]) for which in OBSERVED}
    chosen = next(fit for fit in fits if fit.candidate.shape is shapes[asked] and fit.candidate.form is LINE)
    if leagues[observed]:
        fits.sort(key=lambda fit: (fit.error is None, fit.error or 0.0))
    if predicted is None:
        predicted = {width: forecast.floor for width, forecast in forecasts.series[asked].items()}
    unknown = notes.noise_notes(students, text_noise(students, curves) is None) if leagues[observed] else []
    remarks = (*unknown, *forecasts.notes, *_left_out(forecasts, shapes, widths))
    return Decomposition(tuple(floors), observed, tuple(fits), chosen, predicted, leagues, remarks)


def _points(students: Sequence[ObservedFloor], which: str) -> Points:
    widths = np.array([student.width for student in students], dtype=np.float64)
    return Points(widths, np.array([student.taken_as(which).value for student in students], dtype=np.float64))


def _left_out(forecasts: Forecasts, shapes: Mapping[Any, Shape], widths: Sequence[int]) -> list[str]:
    """A sentence for each forecast that has no floor for one of the distilled widths."""
    return [
        f"{', '.join(filter(None, series))} has no floor at width"
        f" {', '.join(f'{width:,}' for width in widths if width not in by_width)}, so it is not a candidate"
        for series, by_width in forecasts.series.items()
        if series not in shapes
    ]
