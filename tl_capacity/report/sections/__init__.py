"""The sections of the report: each function takes the story and returns one section, as plain text.

A section without data says in a sentence, with a command, how to get it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tl_capacity.errors import CapacityError
from tl_capacity.report.parts import Section, sentence
from tl_capacity.report.sections.beside import beside
from tl_capacity.report.sections.floors import floors
from tl_capacity.report.sections.measurement import firing_rates, importance, layers, suite
from tl_capacity.report.sections.placement import placement
from tl_capacity.report.sections.probes import probes
from tl_capacity.report.sections.recoverability import recoverability
from tl_capacity.report.sections.spliced import effective, spliced
from tl_capacity.report.sections.students import curves
from tl_capacity.report.story import Story

SECTIONS: tuple[tuple[Section, Callable[[Story, Section], Section]], ...] = (
    (Section("layers", "What each layer holds"), layers),
    (Section("importance", "How importance is spread, and where each width's budget ends"), importance),
    (Section("firing-rates", "How often features fire"), firing_rates),
    (Section("suite", "Critical width and the dictionary's L0"), suite),
    (Section("floors", "Predicted and observed floors"), floors),
    (Section("spliced", "Floors in nats with nothing fitted"), spliced),
    (Section("effective", "Features that students are worth"), effective),
    (Section("training", "Training curves and where they are heading"), curves),
    (Section("probes", "What students still know: probes"), probes),
    (Section("recoverability", "Features that students kept"), recoverability),
    (Section("placement", "What choosing the kept features costs"), placement),
    (Section("beside", "Beside other measurements"), beside),
)
"""The sections in their order, still empty, each with the function that fills it."""


def all_sections(story: Story) -> list[Section]:
    """Every section with its figures and tables, or with the reason why it has none."""
    return [_filled(story, empty, fill) for empty, fill in SECTIONS]


def _filled(story: Story, empty: Section, fill: Callable[[Story, Section], Section]) -> Section:
    try:
        return fill(story, empty)
    except CapacityError as problem:
        return replace(empty, missing=sentence(str(problem)))
