"""Notes on a decomposition: what a reader must know before believing its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tl_capacity.distillation.curves import GIVEN
from tl_capacity.distillation.fitting import Fit
from tl_capacity.distillation.observed import ObservedFloor

MIN_WIDTHS = 5
"""Fewer widths than this cannot tell a law with two or three free numbers from another."""


def verdict(fits: Sequence[Fit], winner: Fit | None, chosen: Fit, n_widths: int) -> str:
    """Which candidate explains the floors best, and where the prediction that was asked for stands.

    Args:
        fits: best first.
        winner: the first of them; None where too few widths make one.
    """
    if winner is None:
        widths = "1 width is" if n_widths == 1 else f"{n_widths} widths are"
        return f"{widths} too few to say which law holds: observe at least {MIN_WIDTHS}"
    place = next(place for place, fit in enumerate(fits, 1) if fit is chosen)
    best = (
        f"{winner.candidate.name} explains the floors best, with a leave-one-width-out error of"
        f" {winner.show_error()} nats per token"
    )
    if winner is chosen:
        return f"{best}; it is the prediction asked for"
    return f"{best}; {chosen.candidate.name} comes {place} of {len(fits)}, with {chosen.show_error()}"


def ranking_notes(fits: Sequence[Fit], winner: Fit | None, n_widths: int) -> list[str]:
    """How far the first place can be trusted."""
    if winner is None:
        return []
    notes = []
    rival = next(fit for fit in fits if fit.candidate.kind == "rival")
    if winner is not rival:
        notes.append(
            f"of the candidates that know nothing of features, {rival.candidate.name} is the best, with an error of"
            f" {rival.show_error()} nats per token"
        )
    notes.append(
        f"the best of {len(fits)} candidates was chosen by its error on {n_widths} widths: on others expect a larger"
        " one"
    )
    return notes


def prediction_notes(chosen: Fit, in_nats: Sequence[Fit]) -> list[str]:
    """Whether predictions in nats per token are right as they are, and whether C of the one asked for makes sense."""
    notes = []
    for fit in in_nats:
        if fit.c is not None and fit.c.low is not None and fit.c.high is not None:
            right = (
                "1 is inside, so it may be right as it is"
                if fit.c.low <= 1 <= fit.c.high
                else "1 is outside, so it is not right as it is"
            )
            notes.append(f"{fit.candidate.name} predicts nats per token, and C = {fit.c.show('.3g')}: {right}")
    if chosen.c is None:
        notes.append(
            f"{chosen.candidate.name} predicts the same floor at all widths, so there is no C: distil narrower students"
        )
    elif chosen.c.value < 0:
        notes.append(
            f"C = {chosen.c.value:.3g} is negative: the floors rise where {chosen.candidate.name} predicts that they"
            " fall"
        )
    return notes


def floor_notes(observed: Sequence[ObservedFloor], which: str, floors: Mapping[int, Sequence[float]]) -> list[str]:
    """What is wrong with the observed floors.

    Args:
        observed: of each student, controls included.
        which: what was taken as the floor, "fit" or "last_tenth".
        floors: that floor of each student at each width.
    """
    notes = []
    means = [np.mean(sorted(floors[width])) for width in sorted(floors)]
    given = sum(floor.start == GIVEN for floor in observed)
    if any(np.diff(np.array(means)) > 0):
        advice = "they were not trained alike" if given else "train longer, or on more text"
        notes.append(f"the observed floors do not fall with the width: {advice}")
    if given:
        notes.append(
            f"{given} students were judged as they came: their loss is taken as their floor, and more training may"
            " lower it"
        )
    if which != "fit":
        return notes
    falling = sum(floor.low is not None and floor.falling > 0.1 * floor.value for floor in observed)
    if falling:
        notes.append(
            f"{falling} students have not come near their floor (more than a tenth of it above at the end), so it is"
            " extrapolated, and too low where the learning rate fell to zero: train longer, and see whether the mean"
            " of the last tenth says the same"
        )
    unfitted = sum(floor.low is None and floor.start not in ("teacher", GIVEN) for floor in observed)
    if unfitted:
        notes.append(
            f"{unfitted} students have too few evaluations for a fit: their floor is the mean of the last tenth of"
            " training"
        )
    return notes
