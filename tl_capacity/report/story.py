"""The story of a report, computed once from its results: main hook point, widths, predicted and observed floors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tl_capacity.distillation.decomposition import Decomposition, decompose
from tl_capacity.distillation.effective import EffectiveCapacity, worth_of
from tl_capacity.distillation.observed import OBSERVED, ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw, ImportanceEstimator
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.splices import check_splice
from tl_capacity.plan import Plan, check_goal, ladder, plan
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import FloorPrediction, hook_floors
from tl_capacity.predict.spliced_floor import SplicedFloor
from tl_capacity.report.edges import Edge, edges
from tl_capacity.report.results import Results
from tl_capacity.report.snippets import Snippets
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import hook_label, middle
from tl_capacity.runtime.units import NATS

NEARLY_ALL = 0.95
"""Share of the features to keep if nothing predicts a loss in nats."""


@dataclass(frozen=True)
class ReportSettings:
    """What the page shows.

    Attributes:
        widths: student widths; none for those distilled, or some between a sixteenth of the teacher's width and all of
            it.
        importance, law: of the predictions; None for the default ones.
        hook: the hook point that the verdict is about; None for the middle one.
        observed: "last_tenth" or "fit", as in `decompose`.
        target_loss: the loss in nats per token for which the verdict names a width.
    """

    widths: tuple[int, ...] = ()
    importance: str | None = None
    law: str | None = None
    hook: str | None = None
    observed: str = "last_tenth"
    target_loss: float = 0.1


@dataclass(frozen=True)
class Story:
    """What all sections share.

    Attributes:
        main: the hook point that the verdict is about.
        floors, edges: by the place of a hook point in the measurement; none where it has no sparsity.
        observed: floors of the distilled students.
        decomposition: of the observed floors; where there is none, `undecomposed` says why.
        spliced_floors: of the widths, read from the splice.
        effective: what the students are worth by the splice.
        plan: the width for the loss that is asked for, or for nearly all features where nothing here is in nats; where
            there is none, `unplanned` says why.
        snippets_note: why there are no snippets.
    """

    results: Results
    settings: ReportSettings
    widths: tuple[int, ...]
    importance: ImportanceEstimator
    law: CapacityLaw
    main: HookMeasurement
    floors: Mapping[int, Sequence[FloorPrediction]]
    edges: Mapping[int, Sequence[Edge]]
    observed: Sequence[ObservedFloor] = ()
    decomposition: Decomposition | None = None
    undecomposed: str = ""
    spliced_floors: Sequence[SplicedFloor] = ()
    effective: EffectiveCapacity | None = None
    plan: Plan | None = None
    unplanned: str = ""
    snippets: Snippets = field(default_factory=dict)
    snippets_note: str = ""

    @property
    def measurement(self) -> Measurement:
        return self.results.measurement

    @property
    def unit(self) -> str:
        """The unit of the importance at the main hook point."""
        return self.main.unit(self.importance.name)

    @property
    def trained(self) -> bool:
        """Whether there are students with a loss."""
        run = self.results.run
        return run is not None and all(student.given or len(student.tokens) > 1 for student in run)

    @property
    def folder(self) -> str:
        """The measurement's folder, quoted for a shell."""
        return shlex.quote(self.results.folder)

    @property
    def students(self) -> str:
        """The distillation's folder, quoted for a shell."""
        return shlex.quote(self.results.run_folder)

    @property
    def main_place(self) -> int:
        """The main hook point's place in the measurement."""
        return next(place for place, hook in enumerate(self.measurement) if hook is self.main)

    def name(self, hook: HookMeasurement) -> str:
        """The name of a hook point on the page."""
        return hook_label(self.measurement, hook)


def story_of(results: Results, settings: ReportSettings, snippets: Snippets, snippets_note: str) -> Story:
    """The story of some results.

    Raises:
        CapacityError: where the settings do not fit the measurement.
    """
    measurement, law = results.measurement, plugins().capacity_laws.named(settings.law)
    main, widths = main_hook(measurement, settings), report_widths(results, settings)
    importance = main.estimator(settings.importance)
    sparse = hooks_with_sparsity(measurement)
    floors = {place: hook_floors(hook, widths, importance.name, law) for place, hook in sparse.items()}
    around = {place: edges(hook, widths, importance.name, law) for place, hook in sparse.items()}
    story = Story(
        results,
        settings,
        widths,
        importance,
        law,
        main,
        floors,
        around,
        spliced_floors=_spliced_floors(results, widths, law),
        snippets=snippets,
        snippets_note=snippets_note,
    )
    story = _with_plan(story)
    return story if results.run is None else _with_effective(_with_observed(story, results.run))


def _with_plan(story: Story) -> Story:
    """The story with the width that answers its reader's question."""
    results, settings = story.results, story.settings
    run = results.run if results.run is not None and story.trained else None
    in_nats = results.spliced is not None or run is not None or story.unit == NATS
    goal: dict[str, Any] = {"target_loss": settings.target_loss} if in_nats else {"keep": NEARLY_ALL}
    try:
        made = plan(
            story.measurement,
            **goal,
            importance=settings.importance,
            law=settings.law,
            max_fvu=None,
            spliced=results.spliced,
            students=run,
            observed=settings.observed,
        )
    except CapacityError as problem:
        return replace(story, unplanned=str(problem))
    return replace(story, plan=made)


def _spliced_floors(results: Results, widths: Sequence[int], law: CapacityLaw) -> list[SplicedFloor]:
    """The floors of the widths, read from the splice.

    Raises:
        MeasurementError: where the splice is of another measurement.
    """
    if results.spliced is None:
        return []
    check_splice(results.spliced, results.measurement)
    return results.spliced.floors(results.measurement, widths, law.name)


def _with_effective(story: Story) -> Story:
    """The story with the features that its students are worth, if there is a splice."""
    spliced, students = story.results.spliced, [floor for floor in story.observed if floor.start != "teacher"]
    if spliced is None or not students:
        return story
    return replace(story, effective=worth_of(story.measurement, spliced, students, law=story.law.name))


def _with_observed(story: Story, run: DistillationRun) -> Story:
    """The story with the floors of its students, and what explains them."""
    measurement, settings = story.measurement, story.settings
    try:
        decomposition = decompose(
            measurement,
            run,
            hook=lone_hook(measurement, story.main),
            importance=story.importance.name,
            law=story.law.name,
            observed=settings.observed,
            max_fvu=None,
            forecasts=[] if story.results.spliced is None else [story.results.spliced],
        )
    except CapacityError as problem:
        return replace(story, observed=observed_floors(run) if story.trained else (), undecomposed=str(problem))
    return replace(story, observed=decomposition.observed, decomposition=decomposition)


def main_hook(measurement: Measurement, settings: ReportSettings) -> HookMeasurement:
    """The hook point of the verdict: the first SAE of the requested one, or else the middle one.

    Raises:
        CapacityError: where the settings do not fit the measurement.
    """
    for hook in measurement:
        hook.estimator(settings.importance)
    if any(width < 1 for width in settings.widths):
        raise CapacityError(f"widths {settings.widths} are not student widths: pass whole numbers of at least 1")
    if settings.observed not in OBSERVED:
        raise CapacityError(
            f"{settings.observed!r} is not a way to read the observed floor: choose one of {', '.join(OBSERVED)}"
        )
    check_goal(None, settings.target_loss)
    if settings.hook is None:
        return middle(measurement)
    named = [hook for hook in measurement if hook.hook == settings.hook]
    return named[0] if named else measurement[settings.hook]


def lone_hook(measurement: Measurement, main: HookMeasurement) -> str | None:
    """The main hook point's name; None if it was measured with several SAEs, as the name is then ambiguous."""
    return main.hook if sum(hook.hook == main.hook for hook in measurement) == 1 else None


def hooks_with_sparsity(measurement: Measurement) -> dict[int, HookMeasurement]:
    """The hook points whose floors can be predicted, by their places in the measurement."""
    return {place: hook for place, hook in enumerate(measurement) if 0 < hook.summary.alpha.value < 1}


def report_widths(results: Results, settings: ReportSettings) -> tuple[int, ...]:
    """The student widths that the page shows."""
    given = settings.widths or (results.run.widths if results.run is not None else ())
    return tuple(sorted(set(given))) or ladder(max(h.width for h in results.measurement))


def shown_latents(measurement: Measurement, settings: ReportSettings, widths: Sequence[int]) -> dict[int, list[int]]:
    """The latents that the page shows, by their hook point's place in the measurement.

    A hook point without a sparsity has none.
    """
    law = plugins().capacity_laws.named(settings.law)
    return {
        place: latents_around(edges(hook, widths, settings.importance, law))
        for place, hook in hooks_with_sparsity(measurement).items()
    }


def latents_around(around: Sequence[Edge]) -> list[int]:
    """All latents on either side of some budgets, in ascending order."""
    return sorted({latent for edge in around for latent in (*edge.kept, *edge.lost)})
