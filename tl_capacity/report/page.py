"""The report: one HTML page that contains everything and opens without a network.

Text from models, files and tokenizers reaches it escaped and never as HTML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tl_capacity import __version__
from tl_capacity.errors import CapacityError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.report.parts import sentence
from tl_capacity.report.results import Results
from tl_capacity.report.sections import all_sections
from tl_capacity.report.sections.features import features, features_missing
from tl_capacity.report.sections.method import method
from tl_capacity.report.sections.verdict import intervals_apart, notes, tiles, verdict
from tl_capacity.report.snippets import Snippets, stream_of, top_snippets
from tl_capacity.report.story import ReportSettings, main_hook, report_widths, shown_latents, story_of
from tl_capacity.runtime.devices import AUTO
from tl_capacity.storage import files as storage

CONTROLS = dict.fromkeys(c for c in range(32) if c not in (9, 10))
"""Control characters, which HTML does not allow."""


def write_report(
    path: Path,
    results: Results,
    settings: ReportSettings | None = None,
    snippets: Snippets | None = None,
    snippets_note: str = "",
) -> Path:
    """Write the page to `path`. The file is whole or not there.

    Raises:
        CapacityError: where the settings do not fit the measurement, or the file cannot be written.
    """
    page = report_page(results, settings, snippets, snippets_note)
    storage.make_folder(path.parent)
    storage.write_bytes(path, page.encode())
    return path


def measurement_page(measurement: Measurement, path: Path, widths: tuple[int, ...] = ()) -> Path:
    """Write the page of one measurement, without examples of text; `Measurement.report` calls it.

    Raises:
        CapacityError: as `write_report`.
    """
    note = "`tl-capacity report` runs the model and shows text on which features are active."
    return write_report(path, Results(measurement), ReportSettings(widths=widths), snippets_note=note)


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

    story = story_of(results, settings or ReportSettings(), snippets or {}, snippets_note)
    sections = all_sections(story)
    drawn = {key: json.loads(figure.to_json()) for section in sections for key, figure, _ in section.figures}
    loader = PackageLoader("tl_capacity.report", ".")
    environment = Environment(loader=loader, autoescape=True, finalize=_clean, trim_blocks=True, lstrip_blocks=True)
    page: str = environment.get_template("template.html").render(
        version=__version__,
        model=story.measurement.provenance.model,
        verdict=[intervals_apart(said) for said in verdict(story)],
        tiles=tiles(story),
        notes=notes(story),
        sections=sections,
        features=features(story),
        features_missing=features_missing(story),
        snippets_note=snippets_note,
        method=method(story),
        figures=drawn,
        plotly=get_plotlyjs(),
    )
    return page


def _clean(value: Any) -> Any:
    """Text that UTF-8 and HTML can hold: without lone surrogates and control characters.

    Text that is marked as safe is left as it is.
    """
    return value.encode("utf-8", "replace").decode().translate(CONTROLS) if type(value) is str else value


def find_snippets(
    results: Results,
    settings: ReportSettings,
    model: str | None = None,
    source: str | None = None,
    tokens: int = 20_000,
    device: str = AUTO,
) -> tuple[Snippets, str]:
    """The text on which the shown features are most active; if there is none, the reason.

    Args:
        model: None for the one that was measured.
        source: None for the text that was measured.
        tokens: how much of it to read.

    Raises:
        CapacityError: where a model or a source that was named cannot be used; if it is only what the measurement
            names, that becomes the reason.
    """
    from tl_capacity.models.loading import load_measured_model, load_model

    measurement = results.measurement
    main_hook(measurement, settings)  # before a model is loaded, in case it is refused
    if tokens < 1:
        raise CapacityError(f"{tokens} tokens show no feature: read at least 1, or pass --no-snippets")
    shown = shown_latents(measurement, settings, report_widths(results, settings))
    try:
        p = measurement.provenance
        loaded = (
            load_model(model, device=device, dtype=p.dtype)
            if model
            else load_measured_model(p.model, p.revision, device=device, dtype=p.dtype)
        )
        return top_snippets(loaded, measurement, shown, stream_of(measurement, loaded.tokenizer, source), tokens), ""
    except CapacityError as problem:
        if model or source:
            raise
        reason = (
            f"no text is shown, because it could not be read again ({problem}): name the model with --model and the"
            " text with --source"
        )
        return {}, sentence(reason)
