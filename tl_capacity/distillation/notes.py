"""Notes on a decomposition: its answer in words, and what to know before believing its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tl_capacity.distillation.curves import GIVEN
from tl_capacity.distillation.fitting import Fit
from tl_capacity.distillation.league import FEATURES, MIN_WIDTHS, NEITHER, RIVALS, Group
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.results.estimate import Estimate

READINGS = {"last_tenth": "the mean of the last tenth", "fit": "L∞ of the fit"}
"""Names of the ways to read a floor off a curve."""
AS_THEY_CAME = "the loss of the students as they came"
"""The same for students that somebody else trained, which have no curve."""
C_WITHIN = 0.1
"""How far C may be from 1 if a prediction in nats is to be called right."""
B_WITHIN = 0.1
"""How far B may be from 0, as a share of the mean observed floor."""
NUMBERS = ("no", "one", "two", "three")


def reading(observed: Sequence[ObservedFloor], which: str) -> str:
    """What was taken as the floor, in words."""
    students = [floor for floor in observed if floor.start != "teacher"]
    return AS_THEY_CAME if all(student.start == GIVEN for student in students) else READINGS[which]


def verdict(groups: Sequence[Group], taken: str, n_widths: int) -> str:
    """Whether knowing the teacher's features helps to predict a left-out width, in one sentence.

    Args:
        groups: by the number of fitted constants.
        taken: what was taken as the floor, in words.
    """
    if n_widths < MIN_WIDTHS:
        widths = "1 width is" if n_widths == 1 else f"{n_widths} widths are"
        return f"{widths} too few to say which law holds: observe at least {MIN_WIDTHS}"
    sentences = {
        FEATURES: "candidates that know features of the teacher predict a left-out width better than those that know"
        " none, with {}",
        RIVALS: "candidates that know no features predict a left-out width better than those that do, with {}",
        NEITHER: "candidates that know features of the teacher and those that know none are not distinguishable, with"
        " {}",
        None: "with {} there is only one side",
    }
    said = [
        sentence.format(_constants([group.constants for group in groups if group.ahead == ahead]))
        for ahead, sentence in sentences.items()
        if any(group.ahead == ahead for group in groups)
    ]
    return f"by {taken}, {'; '.join(said)}"


def _constants(numbers: Sequence[int]) -> str:
    """`one and two fitted constants`."""
    words = [NUMBERS[number] for number in numbers]
    listed = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    return f"{listed} fitted constant{'' if list(numbers) == [1] else 's'}"


def ranking_notes(group: Group | None, chosen: Fit) -> list[str]:
    """The place of the requested prediction.

    Args:
        group: that of the prediction; None where too few widths make a ranking.
    """
    if group is None:
        return []
    place, last = group.places[chosen.candidate], max(place.value for place in group.places.values())
    return [
        f"the requested prediction, {chosen.candidate.name}, misses a left-out width by {chosen.show_error()} nats per"
        f" token: place {place.show('.0f')} of {last:.0f} with {_constants([group.constants])}"
    ]


def noise_notes(students: Sequence[ObservedFloor], one_text: bool) -> list[str]:
    """Sources of uncertainty that the league's intervals leave out.

    Args:
        one_text: whether the students' losses on parts of the held-out text are not known.
    """
    widths = [student.width for student in students]
    unknown = [
        *(["how seeds differ, as no width has two seeds"] if len(widths) == len(set(widths)) else []),
        *(["the choice of held-out documents, as their losses were not kept"] if one_text else []),
    ]
    return [f"the league's intervals leave out {' and '.join(unknown)}"] if unknown else []


def prediction_notes(chosen: Fit, in_nats: Sequence[Fit], floors: Mapping[int, Sequence[float]]) -> list[str]:
    """Whether predictions in nats per token are right as they are, and whether the requested one has a sensible C.

    Args:
        in_nats: the fits with C and B.
        floors: the observed floors of each width.
    """
    notes = [_right(fit, floors) for fit in in_nats if fit.c is not None]
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


def _right(fit: Fit, floors: Mapping[int, Sequence[float]]) -> str:
    """Whether a prediction in nats per token is right as it is, with C = 1 and B = 0."""
    assert fit.c is not None
    name, n_widths = fit.candidate.name, len(floors)
    told = f"{name} predicts nats per token; C = {fit.c.show('.3g')}, B = {fit.b.show('.3g')}"
    if n_widths < MIN_WIDTHS:
        widths = "1 width is" if n_widths == 1 else f"{n_widths} widths are"
        return f"{told}: {widths} too few to say whether it is right as it is"
    mean = float(np.mean([np.mean(values) for values in floors.values()]))
    wrong = [
        f"{number} must be within {within:.2g} of {truth:g}, with {truth:g} in its interval"
        for number, estimate, truth, within in (("C", fit.c, 1.0, C_WITHIN), ("B", fit.b, 0.0, B_WITHIN * abs(mean)))
        if not _is_about(estimate, truth, within)
    ]
    return f"{told}: " + (f"it is not right as it is ({' and '.join(wrong)})" if wrong else "it may be right as it is")


def _is_about(estimate: Estimate, truth: float, within: float) -> bool:
    inside = estimate.low is not None and estimate.high is not None and estimate.low <= truth <= estimate.high
    return inside and abs(estimate.value - truth) <= within


def floor_notes(observed: Sequence[ObservedFloor], which: str, floors: Mapping[int, Sequence[float]]) -> list[str]:
    """Problems of the observed floors.

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
    falling = sum(floor.far_from_floor for floor in observed)
    if falling:
        meaning = (
            "L∞ is extrapolated, and too low where the learning rate fell to zero"
            if which == "fit"
            else "the mean of the last tenth is only an upper bound"
        )
        notes.append(f"{falling} students ended more than a tenth above their floor, so {meaning}: train longer")
    if which != "fit":
        return notes
    unfitted = sum(floor.low is None and floor.start not in ("teacher", GIVEN) for floor in observed)
    if unfitted:
        notes.append(
            f"{unfitted} students have too few evaluations for a fit: their floor is the mean of the last tenth of"
            " training"
        )
    return notes
