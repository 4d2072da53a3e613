"""How the figures were made: measurement, dictionaries, predictions and distillation, as titled lists."""

from __future__ import annotations

from tl_capacity.distillation.run import DistillationRun
from tl_capacity.report.parts import settings_text
from tl_capacity.report.story import Story
from tl_capacity.results.estimate import REPLICATES
from tl_capacity.text.documents import DOCUMENT_GROUPS

Entries = list[tuple[str, str]]
"""Names and values, in the order of the list."""


def method(story: Story) -> list[tuple[str, Entries]]:
    """Titled lists of everything that decided the figures."""
    groups = [
        ("Measurement", _measured(story)),
        ("Dictionaries", _dictionaries(story)),
        ("Predictions", _predicted(story)),
    ]
    if story.results.run is not None:
        title = "Students as they came" if story.results.run.observed else "Distillation"
        groups.append((title, _distilled(story.results.run)))
    return groups


def _measured(story: Story) -> Entries:
    p, s = story.measurement.provenance, story.main.summary
    masked = ", ".join(f"{count:,} {reason}" for reason, count in s.masked.items())
    settings = {name: value for name, value in p.settings.items() if name != "masked_token_ids"}
    shards = f"; shard {', '.join(map(str, p.shards))} of {p.shard_count}" if p.shard_count > 1 else ""
    return [
        ("model", f"{p.model}, {p.dtype}, revision {(p.revision or 'unknown')[:16]}"),
        ("text", f"{p.source}: {s.n_tokens:,} counted tokens of {s.n_documents:,} documents{shards}"),
        (
            "masked tokens",
            f"{masked}; special and first positions (BOS) hold {s.masked_norm_share:.1%} of Σ‖x‖² and are not counted",
        ),
        ("settings", settings_text(settings) or "none recorded"),
        ("alive", f"firing rate > {s.alive_threshold:g}"),
        ("time", f"{p.seconds:,.0f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in p.versions.items()) or "not recorded"),
    ]


def _dictionaries(story: Story) -> Entries:
    return [
        (
            story.name(hook),
            f"{hook.sae}: {hook.architecture}, {hook.summary.d_sae:,} latents, SHA-256 {hook.sae_digest[:12]}",
        )
        for hook in story.measurement
    ]


def _predicted(story: Story) -> Entries:
    return [
        ("importance", f"{story.importance.name}: {story.importance.summary or 'no description'} ({story.unit})"),
        ("law", f"{story.law.name}: {story.law.summary}"),
        ("intervals", f"95%, bootstrap over documents in {DOCUMENT_GROUPS} groups, {REPLICATES} replicates"),
    ]


def _distilled(run: DistillationRun) -> Entries:
    if run.observed:
        return _judged(run)
    intervals = (
        "95%: of floors, moving-block bootstrap of what the fit leaves; of C, B and exponent, bootstrap over widths and"
        " seeds"
    )
    return [
        ("teacher", f"{run.teacher}, d = {run.teacher_width:,}"),
        ("text", f"{run.source}; held out: {run.heldout_tokens:,} tokens of {run.heldout_source or run.source}"),
        ("settings", settings_text(run.settings)),
        ("intervals", intervals),
        ("time", f"{run.seconds:,.0f} s"),
    ]


def _judged(run: DistillationRun) -> Entries:
    """The entries for students that were judged as they came."""
    return [
        ("teacher", f"{run.teacher}, d = {run.teacher_width:,}"),
        ("students", "; ".join(f"{s.name}: {s.place or 'given in a session'}, {s.revision or ''}" for s in run)),
        ("text", f"{run.heldout_tokens:,} tokens of {run.heldout_source}"),
        ("settings", settings_text(run.settings)),
        ("intervals", "95%, bootstrap over documents"),
        ("time", f"{run.seconds:,.0f} s"),
    ]
