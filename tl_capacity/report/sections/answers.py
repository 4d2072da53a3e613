"""The answers at the top of the page: which width to choose, and what the students showed."""

from __future__ import annotations

from collections.abc import Sequence

from tl_capacity.distillation.curves import GIVEN
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.errors import MeasurementError
from tl_capacity.plan import Plan
from tl_capacity.plan.answers import UNCHECKED, MethodPlan
from tl_capacity.predict.spliced_floor import SplicedFloor
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery_row import RecoveryRow
from tl_capacity.report.parts import Cell, estimate_cell, sentence
from tl_capacity.report.story import NEARLY_ALL, Story
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.results.naming import short_hook
from tl_capacity.runtime.units import NATS, per_token

Tile = tuple[str, Cell]
"""The label of a large figure, and the figure."""


def choice(story: Story) -> list[str]:
    """Sentences on which width to choose, and how far such answers were off elsewhere."""
    if story.plan is None:
        return [sentence(f"No width can be named: {story.unplanned}")] if story.unplanned else []
    made, decides = story.plan, story.plan.decides
    if not made.methods:
        return [
            f"To keep {NEARLY_ALL:.0%} of the features at every hook point, choose width {needed(made).brief(',.0f')};"
            " without a splice or students, nothing here says what that costs in nats."
        ]
    goal = f"For at most {story.settings.target_loss:g} {NATS}, choose width {needed(made).brief(',.0f')}"
    if decides is None:
        return [f"{goal}. It is the widest that any method here gives; no student has checked one."]
    return [" ".join([f"{goal}, {_grounds(story, decides)}.", *(_doubts(decides) or _still_falling(story))])]


def _grounds(story: Story, decides: MethodPlan) -> str:
    """The method that decides the width, in words."""
    if not decides.hook and decides.corrected is not None:
        return "as the students here show: it lies between their widths"
    where = f" at {short_hook(story.measurement, decides.hook)}" if decides.hook else ""
    if decides.corrected is not None:
        by = f"by the method “{decides.method}”{where}, corrected by the students here"
        return f"{by}; none of them reached that loss"
    return f"by the method “{decides.method}”{where}"


def _doubts(decides: MethodPlan) -> list[str]:
    """How far such forecasts were off elsewhere, in words."""
    if decides.corrected is not None:
        return []
    if decides.checked == UNCHECKED:
        return ["That method was never checked against students."]
    between = f", which would make it {decides.low:,} to {decides.high:,}" if decides.low and decides.high else ""
    return [sentence(f"where such forecasts were checked, {decides.checked}{between}")]


def _still_falling(story: Story) -> list[str]:
    """A sentence on students that were not trained to their end: a narrower width may do."""
    students = [floor for floor in story.observed if floor.start != "teacher"]
    falling = sum(student.far_from_floor for student in students)
    if not falling:
        return []
    those = "These students" if falling == len(students) else f"{falling} of these {len(students)} students"
    return [f"{those} were still falling at the end of training, so a narrower width may do."]


def needed(made: Plan) -> Estimate:
    """The planned width, with its interval."""
    decides = made.decides
    width = (decides.corrected or decides.width) if decides is not None else None
    if width is None and made.hooks and not made.methods:
        width = made.deciding.width
    return width if width is not None else Estimate(float(made.width))


def seen(story: Story) -> list[str]:
    """What the student of about half the teacher's width was predicted to lose, did lose, and kept."""
    student = shown_student(story)
    if student is None:
        return []
    floor = predicted_loss(story, student.width)
    began = "" if student.start != GIVEN else ", which somebody else trained,"
    observed = _observed(story, student).brief(".3g")
    said = f"A student of width {student.width:,}{began} lost {observed} {NATS}"
    if floor is not None:
        value, unit = floor
        how = ", with nothing fitted" if unit == NATS else f" {unit}"
        said += f"; predicted was {value.brief(significant(value.value, 3))}{how}"
    row = kept_by(story, student)
    if row is None:
        return [f"{said}."]
    kept = {name: row.counts[key] for name, key in KEPT.items() if key in row.counts}
    said += f"; readouts find {kept['student'].brief(',.0f')} of {row.n_judged:,} features in it"
    others = {"random": "with random weights", "teacher": "in the teacher itself"}
    said += "".join(f", {kept[name].value:,.0f} {where}" for name, where in others.items() if name in kept)
    return [f"{said}."]


KEPT = {"student": "kept", "random": "kept_random", "teacher": "kept_teacher"}
"""The readouts of a student, of the floor and of the ceiling, with the names of their counts."""


def shown_student(story: Story) -> ObservedFloor | None:
    """The student whose width is nearest to half the hook point's."""
    students = [floor for floor in story.observed if floor.start != "teacher"]
    return min(students, key=lambda s: (abs(s.width - story.main.width / 2), s.seed), default=None)


def predicted_loss(story: Story, width: int) -> tuple[Estimate, str] | None:
    """The predicted loss of a width at the main hook point, and its unit; in nats if any result here is."""
    spliced = spliced_at(story, width)
    if spliced is not None:
        return spliced.floor, NATS
    floors = [floor for floor in story.floors.get(story.main_place, ()) if floor.width == width]
    return (floors[0].predicted_floor, per_token(floors[0].unit)) if floors else None


def spliced_at(story: Story, width: int) -> SplicedFloor | None:
    """The spliced floor of a width at the main hook point, by the requested importance."""
    asked = (story.main.hook, story.importance.name, width)
    return next((f for f in story.spliced_floors if (f.hook, f.order, f.width) == asked), None)


def kept_by(story: Story, student: ObservedFloor) -> RecoveryRow | None:
    """What readouts found in a student at the main hook point; None if it was not measured."""
    try:
        rows: Sequence[RecoveryRow] = Recoverability.from_json(story.results.recoverability).rows
    except MeasurementError:  # its section says why
        return None
    here = [row for row in rows if row.width == student.width and row.hook == story.main.hook]
    return next((row for row in here if row.student == student.name), here[0] if here else None)


def tiles(story: Story) -> list[Tile]:
    """The same answers as large figures."""
    shown: list[Tile] = []
    if story.plan is not None:
        what = f"at most {story.settings.target_loss:g} {NATS}" if story.plan.methods else f"{NEARLY_ALL:.0%} of F"
        shown.append((f"width for {what}", estimate_cell(needed(story.plan), ",.0f")))
    student = shown_student(story)
    if student is None:
        return shown
    floor, observed = predicted_loss(story, student.width), _observed(story, student)
    if floor is not None:
        predicted = estimate_cell(floor[0], significant(floor[0].value, 3))
        shown.append((f"predicted loss at width {student.width:,}, {floor[1]}", predicted))
    shown.append((f"observed loss at width {student.width:,}, {NATS}", estimate_cell(observed, ".3g")))
    row = kept_by(story, student)
    if row is not None:
        others = {"random": "random weights", "teacher": "teacher"}
        around = [f"{what} {row.counts[KEPT[n]].value:,.0f}" for n, what in others.items() if KEPT[n] in row.counts]
        kept = Cell(f"{row.counts['kept'].value:,.0f}", ", ".join(around))
        shown.append((f"of {row.n_judged:,} judged features kept at width {student.width:,}", kept))
    return shown


def _observed(story: Story, student: ObservedFloor) -> Estimate:
    return student.taken_as(story.settings.observed)
