"""Candidates: everything that might explain the observed floors, with and without knowledge of the teacher's features.

A shape is what one floor predictor says of the student widths. A candidate is a shape with none to three constants to
fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tl_capacity.plugins import plugins
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.results.naming import LAYER
from tl_capacity.runtime.units import NATS


@dataclass(frozen=True)
class Points:
    """Observed floors, one per student [student].

    Attributes:
        widths: d_S.
        floors: in nats per token.
    """

    widths: NDArray[np.float64]
    floors: NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """Which constants of observed = C · x^s + B are fitted; the others stay at C = 1, B = 0, s = 1.

    Attributes:
        suffix: what a candidate's name ends with.
    """

    free_c: bool
    free_b: bool
    free_exponent: bool
    suffix: str

    @property
    def constants(self) -> int:
        """The number of fitted constants."""
        return self.free_c + self.free_b + self.free_exponent


AS_IS = Form(False, False, False, ", as it is")
FACTOR = Form(True, False, False, ", B = 0")
OFFSET = Form(False, True, False, ", C = 1")
LINE = Form(True, True, False, "")
PURE_POWER = Form(True, False, True, ", B = 0")
POWER = Form(True, True, True, ", any power")


@dataclass(frozen=True, eq=False)
class Shape:
    """What one floor predictor says of the student widths.

    Attributes:
        name: the predictor's, with what it looked at.
        x: the floor at each width, in `unit`.
        knows_features: whether it rests on the teacher's features.
        unit: in nats per token it is a claim that needs no constant.
        hook, importance, law: what it looked at, where it distinguishes them.
        is_bound: whether it is a bound that no student can be below, and so no forecast as it is.
        free_exponent: whether its exponent is always fitted.
    """

    name: str
    x: Mapping[int, float]
    knows_features: bool = True
    unit: str = ""
    hook: str = ""
    importance: str = ""
    law: str = ""
    is_bound: bool = False
    free_exponent: bool = False

    def at(self, widths: NDArray[np.float64]) -> NDArray[np.float64]:
        """x [width] at the given widths."""
        return np.array([self.x[int(width)] for width in widths])

    def is_power_of(self, other: Shape) -> bool:
        """Whether this x is another shape's x to some power, times a factor."""
        x, others = (np.array([shape.x[width] for width in self.x]) for shape in (self, other))
        if len(x) < 3 or min(x.min(), others.min()) <= 0 or not np.ptp(others):
            return False
        slope, offset = np.polyfit(np.log(others), np.log(x), 1)
        return bool(np.allclose(slope * np.log(others) + offset, np.log(x), atol=1e-9))

    def candidates(self, powers: Sequence[Shape] = ()) -> list[Candidate]:
        """The shape with every sensible choice of constants.

        These are C; C and B; and C, B and an exponent. A prediction in nats also enters as it is, and with B alone. A
        shape without features that is the same at every width has one constant.

        Args:
            powers: shapes with a free exponent; a power of one of them has no exponent of its own.
        """
        if self.free_exponent:
            forms: tuple[Form, ...] = (PURE_POWER, POWER)
        elif not self.knows_features and len(set(self.x.values())) == 1:
            forms = (FACTOR,)
        else:
            without_factor = (*(() if self.is_bound else (AS_IS,)), OFFSET) if self.unit == NATS else ()
            exponent = () if any(self.is_power_of(shape) for shape in powers) else (POWER,)
            forms = (*without_factor, FACTOR, LINE, *exponent)
        return [Candidate(self, form) for form in forms]


@dataclass(frozen=True)
class Candidate:
    """One explanation of the observed floors: a shape, and which constants of C · x^s + B are fitted."""

    shape: Shape
    form: Form

    @property
    def name(self) -> str:
        """The shape's name, and which constants are not fitted, or that the exponent is."""
        plain = self.form is POWER and self.shape.free_exponent
        return f"{self.shape.name}{'' if plain else self.form.suffix}"

    @property
    def constants(self) -> int:
        """The number of fitted constants."""
        return self.form.constants


def shapes_of(forecasts: Forecasts, widths: Sequence[int]) -> dict[tuple[str, str, str, str, str], Shape]:
    """A shape for each series of forecasts that covers all of these widths, keyed by the series."""
    whole = {series: by_width for series, by_width in forecasts.series.items() if set(widths) <= set(by_width)}
    saes: dict[str, set[str]] = {}
    for _, hook, sae, _, _ in whole:
        saes.setdefault(hook, set()).add(sae)
    return {
        series: _shape(by_width, several_saes=len(saes[series[1]] - {""}) > 1) for series, by_width in whole.items()
    }


def _shape(by_width: Mapping[int, Forecast], several_saes: bool) -> Shape:
    first = next(iter(by_width.values()))
    predictor = plugins().floor_predictors[first.predictor]
    named = "" if predictor is plugins().floor_predictors.default else first.predictor
    place = f" at {first.hook}" if first.hook else ""
    if several_saes and first.sae:
        place += f", {first.sae}"
    return Shape(
        ", ".join(filter(None, (named, first.order, first.law))) + place,
        {width: forecast.floor.value for width, forecast in by_width.items()},
        knows_features=predictor.knows_features,
        unit=first.unit,
        hook=first.hook,
        importance=first.order,
        law=first.law,
        is_bound=predictor.is_bound,
        free_exponent=predictor.exponent_is_free,
    )


def added_rivals(constants: int, number: int, widths: NDArray[np.float64]) -> list[Candidate]:
    """The given number of further curves over the width that know nothing of features.

    With one or two constants they are d^−s, the exponents s from 0.1 to 4. With three the exponent is fitted, so they
    are (d + δ)^−s, the shifts δ from a tenth of the narrowest width to a hundred times it: between a power law and an
    exponential. Either grid is even in its logarithm. With no constant there is none, as such a curve is not in nats.
    """
    if not constants:
        return []
    if constants == POWER.constants:
        shifts = widths.min() * np.geomspace(0.1, 100, number)
        return [
            Candidate(_over_widths(f"1/(d + {shift:.3g})", 1 / (widths + shift), widths), POWER) for shift in shifts
        ]
    form = FACTOR if constants == FACTOR.constants else LINE
    return [Candidate(_over_widths(f"1/d^{s:.3g}", widths**-s, widths), form) for s in np.geomspace(0.1, 4, number)]


def _over_widths(name: str, x: NDArray[np.float64], widths: NDArray[np.float64]) -> Shape:
    by_width = {int(width): float(value) for width, value in zip(widths, x, strict=True)}
    return Shape(name, by_width, knows_features=False)


def short_names(candidates: Iterable[Candidate]) -> Callable[[Candidate], str]:
    """A function that gives candidates short names.

    Hook points become `layer N` if they differ in nothing but the layer. The default capacity law is not named.
    """
    matches = {hook: LAYER.fullmatch(hook) for hook in {c.shape.hook for c in candidates} - {""}}
    alike = len({match and match[2] for match in matches.values()}) == 1

    def short(candidate: Candidate) -> str:
        hook = candidate.shape.hook
        match = matches.get(hook) if alike else None
        name = without_default_law(candidate.name)
        return name if match is None else name.replace(f" at {hook}", f" at layer {match[1]}")

    return short


def without_default_law(text: str) -> str:
    """A candidate's name, or a sentence with such names, without the name of the default capacity law."""
    return text.replace(f", {plugins().capacity_laws.default.name}", "")
