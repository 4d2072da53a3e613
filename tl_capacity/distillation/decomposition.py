"""Decomposition of observed floors: observed(d_S) = C · predicted(d_S) + B, with intervals, and beside it everything
else that might explain them as well.

Candidates are ranked by leave-one-width-out error, as R² of a straight line through a handful of points says little:
1/d alone has R² 0.992 on the published predicted floors of the paper (arXiv:2604.04037).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.observed import ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.predict.curve import Curve
from tl_capacity.predict.floors import hook_floors
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.show.tables import html_table, plain, table

MIN_WIDTHS = 5
"""Fewer widths than this cannot tell a law with two or three free numbers from another."""
REPLICATES = 200
OBSERVED = ("fit", "last_tenth")
PAPER = "compressed_sensing"
EXPONENTS = np.geomspace(0.02, 8, 3000)
"""Among which the exponent of a power law is looked for: 0.2% apart."""
NATS = "nats per token"
"""The unit of the observed floors. A prediction in it needs no C."""
SHOWN = 10
"""Candidates that the table shows whatever they are."""


@dataclass(frozen=True)
class Points:
    """Observed floors, one per student [student].

    Attributes:
        widths: d_S.
        floors: in nats per token.
        parameters: of the students' bodies, without embeddings and head.
    """

    widths: NDArray[np.float64]
    floors: NDArray[np.float64]
    parameters: NDArray[np.float64]

    def take(self, places: NDArray[Any]) -> Points:
        """Some of the points, by place or by mask."""
        return Points(self.widths[places], self.floors[places], self.parameters[places])


@dataclass(frozen=True)
class Candidate:
    """One explanation of the observed floors: observed = C · x + B, or C · x^−s + B with the exponent s free.

    Attributes:
        name: what explains them.
        kind: "prediction" (refined floor), "naive floor" or "rival".
        x: x [student] of some points.
        free_exponent: whether s is fitted too.
        as_is: whether C = 1 and only B is fitted: the claim of a prediction in nats per token.
        hook, importance, law, unit: of a prediction.
    """

    name: str
    kind: str
    x: Callable[[Points], NDArray[np.float64]]
    free_exponent: bool = False
    as_is: bool = False
    hook: str = ""
    importance: str = ""
    law: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Fit:
    """A candidate, fitted.

    Attributes:
        c, b: C and B with 95% intervals (bootstrap over widths and, within a width, over seeds), C in nats per token
            for each unit of x; C is None where x is the same at all widths, and has no interval where it was not
            fitted.
        exponent: s with its interval, where it was free.
        r2: share of the variance explained; None where there is none, as at a single width.
        error: leave-one-width-out error: root mean square, over widths, of the mean observed floor less the one that
            the other widths predict, in nats per token; None where too few widths are left to fit.
        fitted: C · x + B at each width, in nats per token.
    """

    candidate: Candidate
    c: Estimate | None
    b: Estimate
    exponent: Estimate | None
    r2: float | None
    error: float | None
    fitted: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        """A flat object."""
        return {
            "name": self.candidate.name,
            "kind": self.candidate.kind,
            "hook": self.candidate.hook,
            "importance": self.candidate.importance,
            "law": self.candidate.law,
            "unit": self.candidate.unit,
            "C": None if self.c is None else self.c.to_json(),
            "B": self.b.to_json(),
            "exponent": None if self.exponent is None else self.exponent.to_json(),
            "r2": self.r2,
            "leave_one_width_out_error": self.error,
            "fitted_floors": {str(width): floor for width, floor in self.fitted.items()},
        }


RIVALS = (
    Candidate("constant", "rival", lambda points: np.zeros(len(points.widths))),
    Candidate("1/d", "rival", lambda points: 1 / points.widths),
    Candidate("power law in d", "rival", lambda points: points.widths, free_exponent=True),
    Candidate("power law in parameters", "rival", lambda points: points.parameters, free_exponent=True),
)
"""What knows nothing of features. The last is the scaling law of Kaplan et al. 2020 (arXiv:2001.08361), parameters
without embeddings, plus a constant.
"""


@dataclass(frozen=True)
class Decomposition:
    """Observed floors, and every candidate fitted to them, best first; shows itself in a terminal.

    Attributes:
        observed: of each student, controls included.
        which: "fit" (L∞) or "last_tenth": what was taken as the observed floor.
        fits: by leave-one-width-out error, smallest first; those that could not be fitted last.
        chosen: the prediction that was asked for: hook, importance and law.
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
        return self.fits[0] if self.fits[0].error is not None and len(self.predicted) >= MIN_WIDTHS else None

    def notes(self) -> list[str]:
        """What a reader must know before believing the figures, the verdict first."""
        return [self.verdict(), *_notes(self)]

    def verdict(self) -> str:
        """Which candidate explains the floors best, and where the paper's formula stands."""
        n = len(self.predicted)
        if self.winner is None:
            return (
                f"{n} width{' is' if n == 1 else 's are'} too few to say which law holds: observe at least {MIN_WIDTHS}"
            )
        place = next(i for i, fit in enumerate(self.fits, 1) if fit is self.chosen)
        best = (
            f"{self.winner.candidate.name} explains the floors best, with a leave-one-width-out error of"
            f" {_error(self.winner)} nats per token"
        )
        if self.winner is self.chosen:
            return f"{best}; it is the prediction asked for"
        return f"{best}; {self.chosen.candidate.name} comes {place} of {len(self.fits)}, with {_error(self.chosen)}"

    def shown(self, most: int = SHOWN) -> list[tuple[int, Fit]]:
        """The candidates that a table needs, with their places: the best, the rivals, the best naive floor, and every
        importance at the hook point and by the law asked for, C fitted and C = 1.
        """
        asked, naive = self.chosen.candidate, next((f for f in self.fits if f.candidate.kind == "naive floor"), None)

        def needed(place: int, f: Fit) -> bool:
            of = f.candidate
            return (
                place <= most
                or of.kind == "rival"
                or f is naive
                or (of.kind == "prediction" and (of.hook, of.law) == (asked.hook, asked.law))
            )

        return [(place, f) for place, f in enumerate(self.fits, 1) if needed(place, f)]

    def in_nats(self) -> list[Fit]:
        """The predictions in nats per token at the hook point and by the law asked for, C fitted: they are right where
        it is 1.
        """
        asked = self.chosen.candidate
        of = [(f, f.candidate) for f in self.fits]
        return [
            f
            for f, c in of
            if c.kind == "prediction" and c.unit == NATS and not c.as_is and (c.hook, c.law) == (asked.hook, asked.law)
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "schema": 1,
            "observed": [f.to_json() for f in self.observed],
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

        flat = []
        for row in (fit.to_json() for fit in self.fits):
            numbers = ("C", "B", "exponent")
            intervals = {
                f"{key} {end}": row[key][end] if row[key] else None for key in numbers for end in ("low", "high")
            }
            flat.append({**row, **{key: row[key]["value"] if row[key] else None for key in numbers}, **intervals})
        return pandas.DataFrame(flat).drop(columns="fitted_floors")

    def _repr_html_(self) -> str:
        return html_table(*_cells(self)) + "".join(f"<p>note: {escape(note)}</p>" for note in self.notes())

    def table_of_floors(self) -> list[dict[str, Any]]:
        """One object per student: width, seed, observed floor with its interval, and predicted floor."""
        return [
            {
                "width": f.width,
                "seed": f.seed,
                "observed_floor": f.value if self.which == "fit" else f.last_tenth,
                "observed_low": f.low if self.which == "fit" else None,
                "observed_high": f.high if self.which == "fit" else None,
                "predicted_floor": self.predicted[f.width].value,
            }
            for f in self.observed
            if f.start != "teacher"
        ]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        floors = self.table_of_floors()
        header = [
            "width",
            "seed",
            "observed floor, nats per token",
            f"predicted, {self.unit} per token",
            "C·predicted + B",
            self.fits[0].candidate.name,
        ]
        rows = [
            [
                f"{f['width']:,}",
                str(f["seed"]),
                Estimate(f["observed_floor"], f["observed_low"], f["observed_high"]).show(".4f"),
                self.predicted[f["width"]].show(".4g"),
                f"{self.chosen.fitted[f['width']]:.4f}",
                f"{self.fits[0].fitted[f['width']]:.4f}",
            ]
            for f in floors
        ]
        yield table(
            f"Observed floors ({'L∞ of the fit' if self.which == 'fit' else 'mean of the last tenth'}) and"
            f" {self.chosen.candidate.name}",
            header,
            rows,
        )
        yield table("Candidates: observed = C · candidate + B, best first", *_cells(self))
        for note in self.notes():
            yield f"[yellow]note:[/yellow] {plain(note)}"


def decompose(
    measurement: Measurement,
    run: DistillationRun,
    *,
    hook: str | None = None,
    importance: str = "second_moment",
    law: str = PAPER,
    observed: str = "fit",
    max_fvu: float | None = 1.0,
) -> Decomposition:
    """Fit observed floors to predicted ones, and to every rival.

    Args:
        measurement: of the teacher.
        run: its students.
        hook: the hook point whose prediction is asked for; by default the measured one in the middle. All others are
            candidates as well.
        importance, law: of that prediction; all others that the measurement allows are candidates as well.
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
    asked = measurement[hook] if hook is not None else measurement.hooks[len(measurement.hooks) // 2]
    measurement.budget((), importance, law, max_fvu)  # refuses SAEs that do not fit the model
    asked.estimator(importance)
    floors, widths, wanted = observed_floors(run), run.widths, (asked.hook, importance, law)
    if not widths:
        raise MeasurementError("the distillation has no students but the control: distil some widths")
    return decompose_floors(
        floors, {s.name: s.body_parameters for s in run}, _predictions(measurement, widths, wanted), wanted, observed
    )


@dataclass(frozen=True)
class Prediction:
    """Predicted floors [width] of one hook point, importance and law, and the naive ones beside them."""

    hook: str
    importance: str
    law: str
    unit: str
    floors: Mapping[int, Estimate]
    naive: Mapping[int, float]


def decompose_floors(
    floors: Sequence[ObservedFloor],
    parameters: Mapping[str, int],
    predictions: Sequence[Prediction],
    asked: tuple[str, str, str],
    observed: str = "fit",
) -> Decomposition:
    """The same from floors and predictions as such; `asked` is the hook, the importance and the law of the prediction
    that is asked for.
    """
    students = [f for f in floors if f.start != "teacher"]
    points = Points(
        np.array([f.width for f in students], dtype=np.float64),
        np.array([f.value if observed == "fit" else f.last_tenth for f in students], dtype=np.float64),
        np.array([parameters[f.name] for f in students], dtype=np.float64),
    )
    replicates = resamples(points)
    fits = [fit(candidate, points, replicates) for candidate in (*RIVALS, *_candidates(predictions))]
    chosen_from = next(p for p in predictions if (p.hook, p.importance, p.law) == asked)
    chosen = next(
        f
        for f in fits
        if (f.candidate.hook, f.candidate.importance, f.candidate.law) == asked and not f.candidate.as_is
    )
    ranked = tuple(sorted(fits, key=lambda f: (f.error is None, f.error or 0.0)))
    return Decomposition(tuple(floors), observed, ranked, chosen, chosen_from.floors)


def fit(candidate: Candidate, points: Points, replicates: NDArray[np.float64]) -> Fit:
    """Fit a candidate by least squares, every student counting the same.

    Args:
        replicates: [replicate, student] how often each student counts, as `resamples` draws it.
    """
    widths = np.unique(points.widths)
    without = (points.widths != widths[:, None]).astype(np.float64)
    free_c = bool(np.ptp(candidate.x(points)) > 0) and not candidate.as_is
    enough = len(widths) > 1 + free_c + candidate.free_exponent
    # In one go: with all students, without each width (nothing is left where there is but one), and as the bootstrap
    # draws them.
    numbers = _solve(
        candidate,
        points,
        np.concatenate([np.ones((1, len(points.widths))), without if enough else without[:0], replicates]),
    )
    own, left_out, again = (
        numbers[0],
        numbers[1 : len(numbers) - len(replicates)],
        numbers[len(numbers) - len(replicates) :],
    )
    values = _values(candidate, points, own)
    error = None
    if enough:
        misses = [
            (points.floors - _values(candidate, points, of))[points.widths == width].mean()
            for width, of in zip(widths, left_out, strict=True)
        ]
        error = float(np.sqrt(np.mean(np.square(misses))))
    spread = float(np.square(points.floors - points.floors.mean()).sum())
    return Fit(
        candidate,
        c=_estimate(own[0], again[:, 0], enough and free_c) if free_c or candidate.as_is else None,
        b=_estimate(own[1], again[:, 1], enough),
        exponent=_estimate(own[2], again[:, 2], enough) if candidate.free_exponent and len(widths) > 1 else None,
        r2=1 - float(np.square(points.floors - values).sum()) / spread if spread and len(widths) > 1 else None,
        error=error,
        fitted={int(width): float(values[points.widths == width][0]) for width in widths},
    )


def _solve(candidate: Candidate, points: Points, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[C, B, s]` by least squares, a row for each row of weights [replicate, student]."""
    x, y = candidate.x(points), points.floors
    nothing = np.full(len(weights), -1.0)
    if candidate.as_is:
        return np.stack([np.ones(len(weights)), weights @ (y - x) / weights.sum(1), nothing], 1)
    if not candidate.free_exponent:
        return np.stack([*_line(x, y, weights), nothing], 1)
    # The best C and B of each exponent are a straight line's, so only the exponent is searched for.
    found, smallest = np.zeros((len(weights), 3)), np.full(len(weights), np.inf)
    for s in EXPONENTS:
        power = _power(x, s)
        c, b = _line(power, y, weights)
        left = (weights * np.square(y - c[:, None] * power - b[:, None])).sum(1)
        better = left < smallest
        found[better], smallest[better] = np.stack([c, b, np.full_like(c, s)], 1)[better], left[better]
    return found


def _values(candidate: Candidate, points: Points, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    x = candidate.x(points)
    return np.asarray(numbers[0] * (_power(x, numbers[2]) if candidate.free_exponent else x) + numbers[1])


def _power(x: NDArray[np.float64], s: float) -> NDArray[np.float64]:
    return np.asarray(x**-s)


def _line(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(C, B)` of the weighted least-squares line of each row of weights; C is 0 where x is the same everywhere, as
    nothing tells what it is.
    """
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    centred = weights * (x - mean_x[:, None])
    spread, product = centred @ x, centred @ y
    varies = spread > 1e-12 * (weights @ x**2)  # below it is what rounding leaves of zero
    c = np.divide(product, spread, out=np.zeros_like(total), where=varies)
    return c, mean_y - c * mean_x


def resamples(points: Points) -> NDArray[np.float64]:
    """How often each student counts in each replicate [replicate, student]: two or more widths, drawn with replacement,
    and students for each.
    """
    random = np.random.default_rng(0)
    students = {width: np.flatnonzero(points.widths == width) for width in np.unique(points.widths)}
    widths = np.array(list(students))
    found: list[NDArray[np.int64]] = []
    while len(found) < REPLICATES:
        drawn = random.choice(widths, len(widths))
        if len(widths) == 1 or np.ptp(drawn) > 0:
            places = np.concatenate([random.choice(students[width], len(students[width])) for width in drawn])
            found.append(np.bincount(places, minlength=len(points.widths)))
    return np.array(found, dtype=np.float64)


def _estimate(value: float, again: NDArray[np.float64], enough: bool) -> Estimate:
    if not enough:
        return Estimate(float(value))
    low, high = np.quantile(again, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _predictions(measurement: Measurement, widths: Sequence[int], asked: tuple[str, str, str]) -> list[Prediction]:
    """Of every hook point, every importance that the measurement allows, and every law; an interval for the one that is
    asked for, as they take long.
    """
    found = []
    for hook in measurement:
        for estimator in plugins().importance_estimators:
            if not _measured(hook, estimator.name):
                continue
            curve = Curve(hook.hook, hook.importance(estimator.name), hook.summary.alpha.value)
            for law in plugins().capacity_laws:
                this = (hook.hook, estimator.name, law.name)
                floors = (
                    hook_floors(hook, widths, estimator.name, law) if this == asked else curve.floors(widths, law.name)
                )
                by_width = {f.width: f.predicted_floor for f in floors}
                found.append(
                    Prediction(*this, estimator.unit, by_width, {f.width: f.naive_floor.value for f in floors})
                )
    return found


def _measured(hook: HookMeasurement, importance: str) -> bool:
    try:
        hook.estimator(importance)
    except MeasurementError:
        return False
    return True


def _candidates(predictions: Sequence[Prediction]) -> list[Candidate]:
    """The refined floor of each prediction; the naive one of each hook point and law, for the first importance: others
    change little but a factor.
    """
    found, naive = [], set[tuple[str, str]]()
    for p in predictions:
        name, x = (
            f"{p.importance}, {p.law} at {p.hook}",
            _looked_up({width: floor.value for width, floor in p.floors.items()}),
        )
        refined = Candidate(name, "prediction", x, hook=p.hook, importance=p.importance, law=p.law, unit=p.unit)
        found.append(refined)
        if p.unit == NATS:
            found.append(replace(refined, name=f"{name}, C = 1", as_is=True))
        if (p.hook, p.law) not in naive:
            naive.add((p.hook, p.law))
            found.append(
                Candidate(
                    f"naive floor, {p.law} at {p.hook}", "naive floor", _looked_up(p.naive), hook=p.hook, law=p.law
                )
            )
    return found


def _looked_up(floors: Mapping[int, float]) -> Callable[[Points], NDArray[np.float64]]:
    return lambda points: np.array([floors[int(width)] for width in points.widths])


def _notes(found: Decomposition) -> list[str]:
    notes = []
    rival = next(f for f in found.fits if f.candidate.kind == "rival")
    if found.winner is not None and found.winner is not rival:
        notes.append(
            f"of the candidates that know nothing of features, {rival.candidate.name} is the best, with an error of"
            f" {_error(rival)} nats per token"
        )
    if found.winner is not None:
        notes.append(
            f"the best of {len(found.fits)} candidates was chosen by its error on {len(found.predicted)} widths: on"
            " others expect a larger one"
        )
    for each in found.in_nats():
        if each.c is not None and each.c.low is not None and each.c.high is not None:
            right = (
                "1 is inside, so it may be right as it is"
                if each.c.low <= 1 <= each.c.high
                else "1 is outside, so it is not right as it is"
            )
            notes.append(f"{each.candidate.name} predicts nats per token, and C = {each.c.show('.3g')}: {right}")
    if found.chosen.c is None:
        notes.append(
            f"{found.chosen.candidate.name} predicts the same floor at all widths, so there is no C: distil narrower"
            " students"
        )
    elif found.chosen.c.value < 0:
        notes.append(
            f"C = {found.chosen.c.value:.3g} is negative: the floors rise where {found.chosen.candidate.name} predicts"
            " that they fall"
        )
    floors = sorted((f["width"], f["observed_floor"]) for f in found.table_of_floors())
    means = [np.mean([floor for w, floor in floors if w == width]) for width in found.predicted]
    if any(np.diff(np.array(means)[np.argsort(list(found.predicted))]) > 0):
        notes.append("the observed floors do not fall with the width: train longer, or on more text")
    falling = [f for f in found.observed if f.low is not None and f.falling > 0.1 * f.value]
    if found.which == "fit" and falling:
        notes.append(
            f"{len(falling)} students have not come near their floor (more than a tenth of it above at the end), so it"
            " is extrapolated, and too low where the learning rate fell to zero: train longer, and see whether the"
            " mean of the last tenth says the same"
        )
    unfitted = [f for f in found.observed if f.low is None and f.start != "teacher"]
    if found.which == "fit" and unfitted:
        notes.append(
            f"{len(unfitted)} students have too few evaluations for a fit: their floor is the mean of the last tenth of"
            " training"
        )
    return notes


def _cells(found: Decomposition) -> tuple[list[str], list[list[str]]]:
    header = ["place", "candidate", "leave-one-width-out error, nats per token", "R²", "C", "B", "exponent"]
    return header, [
        [
            f"{place}{', asked for' if f is found.chosen else ''}",
            f.candidate.name,
            _error(f),
            "too few widths" if f.r2 is None else f"{f.r2:.4f}",
            "" if f.c is None else f.c.show(".3g"),
            f.b.show(".3g"),
            "" if f.exponent is None else f.exponent.show(".2f"),
        ]
        for place, f in found.shown()
    ]


def _error(fit: Fit) -> str:
    return "too few widths" if fit.error is None else f"{fit.error:.4f}"
