"""The interface of a floor predictor: what it is given, and what it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tl_capacity.interfaces.capacity import CapacityContext
from tl_capacity.runtime.rounding import whole_below
from tl_capacity.runtime.units import NATS

VARIES_WITH = ("hook", "importance", "law")
"""What a floor may depend on besides the width."""


@runtime_checkable
class WithInterval(Protocol):
    """A number with its 95% interval, such as `tl_capacity.results.estimate.Estimate`. Both ends are None without an
    interval.
    """

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...


@runtime_checkable
class KLCurve(Protocol):
    """KL of the spliced teacher in nats per token, by the number of features that stay."""

    @property
    def alive(self) -> int:
        """F, the number of alive features."""

    def at(self, kept: int, /) -> WithInterval:
        """The KL if so many features stay, from none to all that are alive."""


def _none(width: int) -> float:
    return 0.0


@dataclass(frozen=True)
class FloorContext:
    """What a floor predictor is given: a hook point, and what the teacher was already run for.

    Attributes:
        hook, sae: the hook point and the dictionary that was measured there.
        importance: the estimator by which features are ranked.
        unit: of that importance.
        law: the capacity law that says how many features a width keeps.
        features: sparsity, importances and widths of the alive features; none of them where the dictionary is a basis
            whose every coordinate is active.
        budget: d_S · ĝ(α), the features that a width d_S holds by the law, before they are rounded down.
        spectrum: [component] λ, variances of the activation along its principal components, the largest first; None
            where the measurement has no such basis at this hook point.
        curve: the KL against the features that stay, of this dictionary and importance; None where the teacher was not
            spliced.
        forecasts: floors by width of predictors for which the teacher was run, by the predictor's name.
        parameters: of a student's body, by width; empty where no student is known.
    """

    hook: str = ""
    sae: str = ""
    importance: str = ""
    unit: str = ""
    law: str = ""
    features: CapacityContext = field(default_factory=lambda: CapacityContext(0.0, np.zeros(0)))
    budget: Callable[[int], float] = _none
    spectrum: NDArray[np.float64] | None = None
    curve: KLCurve | None = None
    forecasts: Mapping[str, Mapping[int, WithInterval]] = field(default_factory=dict)
    parameters: Mapping[int, int] = field(default_factory=dict)

    def kept(self, width: int) -> int:
        """F_S = min(⌊d_S · ĝ(α)⌋, F), the features that a width keeps."""
        return min(int(whole_below(float(self.budget(width)))), self.features.n_features)


class FloorPredictor:
    """Base of a floor predictor: which loss do students of a width end at? Subclass it, name it, declare what it
    claims, and override `floors`.

    A predictor knows the teacher and the text, and no student. What it cannot know is fitted to students later, and
    `constants` says how many numbers that takes. A prediction that fits nothing can fail; one that fits three numbers
    to five widths hardly can.
    """

    name: str
    unit: str = NATS
    """Unit of the floors: nats per token, or the unit of a shape that a fitted factor turns into nats."""
    summary: str = ""
    """One line for `tl-capacity plugins`."""
    constants: int = 0
    """How many numbers must be fitted to students before the floors are in nats per token. That is 0 for a claim in
    nats and 1 for a shape that needs a factor. A free exponent adds 1.
    """
    needs_model: bool = False
    """Whether the teacher must run once more for it, beyond the measurement."""
    knows_features: bool = True
    """Whether it uses the features of a dictionary. A predictor without features is a rival: features are worth
    something only if they beat it.
    """
    varies_with: Sequence[str] | None = None
    """Which of `VARIES_WITH` its floors depend on; it is asked once for each. By default all of them, or only the hook
    point for a predictor that knows no features.
    """
    exponent_is_free: bool = False
    """Whether an exponent is fitted too, so that C · floor^s is compared with students."""
    is_bound: bool = False
    """Whether it is a bound that no student can be below, and not a forecast of where students end."""
    is_default: bool = False
    """Whether this predictor is used by default. Exactly one predictor of all plugins says so."""
    made_by: str = ""
    """The command that makes its input, if a measurement alone is not enough."""

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float | WithInterval | None] | None:
        """The floor of each width, finite and at least 0, in `unit`, with an interval if one is known. None at a width
        about which nothing can be said, and None for all if `at` lacks what is needed.
        """
        raise NotImplementedError(f"the floor predictor {self.name!r} does not override floors()")

    def unit_at(self, at: FloorContext) -> str:
        """Unit of the floors at a hook point. Override it if that is the importance's unit."""
        return self.unit


def problem_with(predictor: object) -> str | None:
    """What is wrong with a floor predictor's declarations, and what to do; None if nothing is."""
    if not isinstance(predictor, FloorPredictor):
        return "that is not a FloorPredictor: subclass tl_capacity.interfaces.FloorPredictor"
    constants, fewest = predictor.constants, int(predictor.unit != NATS) + int(predictor.exponent_is_free)
    if not isinstance(constants, int) or isinstance(constants, bool) or constants < 0:
        return f"with constants = {constants!r}: give a whole number of at least 0"
    if constants < fewest:
        exponent = " and a free exponent" if predictor.exponent_is_free else ""
        return (
            f"in {predictor.unit!r}{exponent} with constants = {constants}, which would make its floors nats per token:"
            f" set `constants` to at least {fewest}"
        )
    if strange := [name for name in predictor.varies_with or () if name not in VARIES_WITH]:
        return f"that varies with {strange[0]!r}: choose from {', '.join(VARIES_WITH)}"
    return None
