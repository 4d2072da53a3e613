"""The report: one HTML page with everything inside it, which opens without a network.

Text from models, files and tokenizers reaches it escaped and never as HTML.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_capacity import __version__
from tl_capacity.distillation.decomposition import OBSERVED, decompose
from tl_capacity.distillation.observed import observed_floors
from tl_capacity.errors import CapacityError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plan import ladder
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import hook_floors
from tl_capacity.report import sections
from tl_capacity.report.results import Results
from tl_capacity.report.sections import ReportSettings, Snippets, Story
from tl_capacity.report.snippets import edges, stream_of, top_snippets
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import middle
from tl_capacity.storage import files as storage

CONTROLS = dict.fromkeys(c for c in range(32) if c not in (9, 10))
"""Characters that HTML has no place for."""


def write_report(
    path: Path,
    results: Results,
    settings: ReportSettings | None = None,
    snippets: Snippets | None = None,
    snippets_note: str = "",
) -> Path:
    """Write the page to `path`, whole or not at all.

    Raises:
        CapacityError: where the settings do not fit the measurement, or the file cannot be written.
    """
    page = report_page(results, settings, snippets, snippets_note)
    storage.make_folder(path.parent)
    storage.write_bytes(path, page.encode())
    return path


def report_page(
    results: Results, settings: ReportSettings | None = None, snippets: Snippets | None = None, snippets_note: str = ""
) -> str:
    """The page as HTML.

    Args:
        snippets: by `(place of the hook point, latent)`, as `top_snippets` finds them.
        snippets_note: why there are none.

    Raises:
        CapacityError: where there is no such hook point, importance, law or width.
    """
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    story = _story(results, settings or ReportSettings(), snippets or {}, snippets_note)
    told = sections.all_sections(story)
    drawn = {key: json.loads(figure.to_json()) for section in told for key, figure, _ in section.figures}
    loader = PackageLoader("tl_capacity.report", ".")
    environment = Environment(loader=loader, autoescape=True, finalize=_clean, trim_blocks=True, lstrip_blocks=True)
    page: str = environment.get_template("template.html").render(
        version=__version__,
        model=story.measurement.provenance.model,
        verdict=[sections.intervals_apart(sentence) for sentence in sections.verdict(story)],
        tiles=sections.tiles(story),
        notes=sections.notes(story),
        sections=told,
        features=sections.features(story),
        features_missing=sections.features_missing(story),
        snippets_note=snippets_note,
        method=sections.method(story),
        figures=drawn,
        plotly=get_plotlyjs(),
    )
    return page


def _clean(value: Any) -> Any:
    """Text that UTF-8 and HTML can hold: without lone surrogates and control characters. What is marked as safe is left
    as it is.
    """
    return value.encode("utf-8", "replace").decode().translate(CONTROLS) if type(value) is str else value


def _story(results: Results, settings: ReportSettings, snippets: Snippets, snippets_note: str) -> Story:
    measurement, law = results.measurement, plugins().capacity_laws[settings.law]
    main, widths = _main_hook(measurement, settings), report_widths(results, settings)
    sparse = {place: hook for place, hook in enumerate(measurement) if 0 < hook.summary.alpha.value < 1}
    floors = {place: hook_floors(hook, widths, settings.importance, law) for place, hook in sparse.items()}
    around = {place: edges(hook, widths, settings.importance, law) for place, hook in sparse.items()}
    story = Story(results, settings, widths, law, main, floors, around, snippets=snippets, snippets_note=snippets_note)
    if results.run is None:
        return story
    hook_name = main.hook if sum(h.hook == main.hook for h in measurement) == 1 else None
    try:
        found = decompose(
            measurement,
            results.run,
            hook=hook_name,
            importance=settings.importance,
            law=settings.law,
            observed=settings.observed,
            max_fvu=None,
        )
    except CapacityError as problem:
        evaluated = all(len(student.tokens) > 1 for student in results.run)
        return replace(story, observed=observed_floors(results.run) if evaluated else (), undecomposed=str(problem))
    return replace(story, observed=found.observed, decomposition=found)


def _main_hook(measurement: Measurement, settings: ReportSettings) -> HookMeasurement:
    """The hook point that the verdict is about: the first SAE of the one asked for, else the middle one.

    Raises:
        CapacityError: where the settings do not fit the measurement.
    """
    for hook in measurement:
        hook.estimator(settings.importance)
    if any(width < 1 for width in settings.widths):
        raise CapacityError(f"widths {settings.widths} are no student widths: pass whole numbers of at least 1")
    if settings.observed not in OBSERVED:
        raise CapacityError(f"{settings.observed!r} is no observed floor: choose one of {', '.join(OBSERVED)}")
    if settings.hook is None:
        return middle(measurement)
    named = [hook for hook in measurement if hook.hook == settings.hook]
    return named[0] if named else measurement[settings.hook]


def report_widths(results: Results, settings: ReportSettings) -> tuple[int, ...]:
    """The student widths that the page shows."""
    given = settings.widths or (results.run.widths if results.run is not None else ())
    return tuple(sorted(set(given))) or ladder(max(h.width for h in results.measurement))


def shown_latents(measurement: Measurement, settings: ReportSettings, widths: Sequence[int]) -> dict[int, list[int]]:
    """The latents that the page shows, by the place of their hook point in the measurement; none where a hook point has
    no sparsity.
    """
    law, found = plugins().capacity_laws[settings.law], {}
    for place, hook in enumerate(measurement):
        if 0 < hook.summary.alpha.value < 1:
            around = edges(hook, widths, settings.importance, law)
            found[place] = sorted({latent for edge in around for latent in (*edge.kept, *edge.lost)})
    return found


def find_snippets(
    results: Results,
    settings: ReportSettings,
    model: str | None = None,
    source: str | None = None,
    tokens: int = 20_000,
    device: str = "cpu",
) -> tuple[Snippets, str]:
    """The text on which the shown features are most active, and where there is none, why.

    Args:
        model: None for the one that was measured.
        source: None for the text that was measured.
        tokens: how much of it to read.

    Raises:
        CapacityError: where a model or a source that was named cannot be used; if it is only what the measurement
            names, that becomes the reason.
    """
    from tl_capacity.models.loading import load_model

    measurement = results.measurement
    _main_hook(measurement, settings)  # before a model is loaded, in case it is refused
    if tokens < 1:
        raise CapacityError(f"{tokens} tokens show no feature: read at least 1, or pass --no-snippets")
    shown = shown_latents(measurement, settings, report_widths(results, settings))
    try:
        loaded = load_model(model or measurement.provenance.model, device=device, dtype=measurement.provenance.dtype)
        return top_snippets(loaded, measurement, shown, stream_of(measurement, loaded.tokenizer, source), tokens), ""
    except CapacityError as problem:
        if model or source:
            raise
        reason = (
            f"no text is shown, as it could not be read again ({problem}); name the model with --model, the text with"
            " --source"
        )
        return {}, sections.sentence(reason)
