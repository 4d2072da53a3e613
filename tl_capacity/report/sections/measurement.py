"""The sections on the measurement: each layer's features, importance, firing rates, and several SAEs of one
hook point.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

from tl_capacity.predict.budget import table_columns
from tl_capacity.predict.suite import suites
from tl_capacity.report import figures
from tl_capacity.report.parts import PageTable, Section, column_cell, estimate_cell, sentence, text_cell
from tl_capacity.report.story import Story, lone_hook
from tl_capacity.results.columns import (
    ALIVE,
    CHAO2,
    CRITICAL_WIDTH,
    DENSE_LATENTS,
    FVU,
    HETEROGENEOUS_CRITICAL_WIDTH,
    L0,
    LATENTS,
)
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import short_hook
from tl_capacity.show.figures import power_of_ten

SUITE_COLUMNS = (
    LATENTS,
    L0,
    ALIVE,
    replace(CRITICAL_WIDTH, heading=CRITICAL_WIDTH.name),
    HETEROGENEOUS_CRITICAL_WIDTH,
    FVU,
)
"""The figures of each SAE of one hook point."""


def layers(story: Story, empty: Section) -> Section:
    """The headline figures of each hook point."""
    columns = [column for column in table_columns(story.law) if column.heading]
    header = ["hook point", *(column.heading for column in columns)]
    rows = [
        [text_cell(story.name(hook), f"d = {hook.width:,}"), *(column_cell(column, hook) for column in columns)]
        for hook in story.measurement
    ]
    text = [
        "F counts the features whose firing rate exceeds the alive threshold, L0 is the mean number that are active on"
        " a token. One dimension holds g(α) = 1/((1−α) ln(1/(1−α))) features, so d* is the narrowest student that can"
        " keep them all; d*_het = Σ p ln(1/p) lets each feature have its own rate. FVU is the variance that the SAE"
        " leaves unexplained: what it misses is in no feature and in no floor."
    ]
    s, name = story.main.summary, short_hook(story.measurement, story.main.hook)
    named = "" if name == story.main.hook else f"; {name} is {story.main.hook}"
    title = (
        f"{s.n_tokens:,} tokens of {s.n_documents:,} documents, with 95% intervals over documents{named}. A click on a"
        " heading sorts."
    )
    return replace(empty, text=text, tables=[PageTable(title, header, rows)])


def importance(story: Story, empty: Section) -> Section:
    """The features in order of importance, and where the budget of each width ends."""
    hook = lone_hook(story.measurement, story.main)
    figure = figures.importance_figure(story.measurement, story.widths, story.importance.name, story.law.name, hook)
    caption = (
        "Bands are 95% intervals over documents. Markers show where the budget of each student width ends: what is to"
        f" the right is lost. Dotted lines, some labelled with the width, are those of {story.name(story.main)}."
    )
    return replace(empty, figures=[("importance", figure, caption)])


def firing_rates(story: Story, empty: Section) -> Section:
    """How often latents fire, and how many features there are at several thresholds."""
    thresholds = [f"F at p > {power_of_ten(t)}" for t in story.main.summary.alive_at]
    header = ["hook point", *thresholds, CHAO2.heading, "never fired", DENSE_LATENTS.heading]
    rows = [
        [
            text_cell(story.name(hook)),
            *(estimate_cell(alive, ALIVE.digits) for alive in hook.summary.alive_at.values()),
            column_cell(CHAO2, hook),
            estimate_cell(_never_fired(hook), ALIVE.digits),
            column_cell(DENSE_LATENTS, hook),
        ]
        for hook in story.measurement
    ]
    text = [
        "F depends on the threshold, and on how many tokens were read: at a rate of 10⁻⁵ it takes about ten million"
        " to place a feature to within 10%. Chao2 estimates how many features can fire at all, from those that only"
        " one or two documents showed."
    ]
    caption = (
        "The thick line is the alive threshold of this report, thin dotted ones are others; above 1/e a latent is too"
        " dense for g(α). The histogram is of the text that was read; the table has intervals."
    )
    table = PageTable("Features at several thresholds, with 95% intervals", header, rows)
    section = replace(empty, text=text, tables=[table])
    if not any(hook.summary.alive_at[0.0].value for hook in story.measurement):
        return replace(
            section,
            missing=(
                "No latent fired on the text that was read, so there is no rate to draw: count more tokens, or check"
                " the hook point."
            ),
        )
    return replace(section, figures=[("firing-rates", figures.firing_rate_figure(story.measurement), caption)])


def _never_fired(hook: HookMeasurement) -> Estimate:
    """The number of latents that fired on no counted token."""
    fired, latents = hook.summary.alive_at[0.0], hook.summary.d_sae
    if fired.low is None or fired.high is None:
        return Estimate(latents - fired.value)
    return Estimate(latents - fired.value, latents - fired.high, latents - fired.low)


def suite(story: Story, empty: Section) -> Section:
    """The critical width against L0, for several SAEs of one hook point."""
    compared = suites(story.measurement)
    text = [
        "d* = F/g(α) equals L0 · ln(F/L0), so it depends on the dictionary's L0, which was chosen when the SAE was"
        " trained. One d* describes the model and that SAE together. Several SAEs of one hook point show how much of"
        " it is the model's."
    ]
    if not compared:
        return replace(
            empty,
            text=text,
            missing=(
                "Each hook point was measured with one SAE, so it is not known how far d* depends on that choice:"
                " measure several at one hook point."
            ),
            command=(
                f"tl-capacity measure --model {shlex.quote(story.measurement.provenance.model)} --sae SAE --sae"
                " SAE_OF_ANOTHER_L0 --out runs/suite"
            ),
        )
    text += [sentence(each.statement()) for each in compared]
    if any(each.exponent is not None for each in compared):
        text.append("The exponent is of these SAEs alone, which are too few for an interval.")
    rows = [
        [
            text_cell(hook.sae, short_hook(story.measurement, hook.hook)),
            *(column_cell(column, hook) for column in SUITE_COLUMNS),
        ]
        for each in compared
        for hook in each.saes
    ]
    caption = "Error bars are 95% intervals over documents, often smaller than the markers."
    header = ["SAE", *(column.heading for column in SUITE_COLUMNS)]
    return replace(
        empty,
        text=text,
        figures=[("suite", figures.suite_figure(story.measurement), caption)],
        tables=[PageTable("SAEs of one hook point", header, rows)],
    )
