"""The examination: every check in order, on the first thousand tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tl_capacity.dictionaries.adapter import NamedDictionary
from tl_capacity.doctor.costs import cost_findings
from tl_capacity.doctor.finding import OK, STOP, Finding, refusal_found
from tl_capacity.doctor.running import Trial, tap_findings
from tl_capacity.doctor.setup import (
    bos_finding,
    context_finding,
    dictionary_finding,
    model_finding,
    positions_findings,
    vocabulary_finding,
)
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measure.setup import began_with_bos, dictionaries, rule_for, spec_of, stream_for, tapped_model
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import LoadedModel, hub_revision, load_model
from tl_capacity.plugins import plugins
from tl_capacity.runtime.devices import AUTO
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import TokenBatch

SAMPLE_TOKENS = 1_000


def examine(settings: MeasureSettings) -> list[Finding]:
    """Check what `measure` would do with these settings. Nothing is written."""
    return list(_findings(settings))


def examine_folder(folder: Path, tokens: int = MeasureSettings.tokens, device: str = AUTO) -> list[Finding]:
    """Check the measurement or checkpoint in a folder, and whether it can be continued: its files, and the model, SAEs
    and text that it names.
    """
    findings: list[Finding] = []
    with refusal_found("folder", findings):
        measurement = Measurement.load(folder)
        state = "a complete measurement" if measurement.complete else ("a checkpoint, from which --resume continues")
        findings.append(
            Finding(
                "folder",
                OK,
                f"{folder} holds {state}: {measurement.hooks[0].summary.n_tokens:,} tokens of"
                f" {measurement.provenance.source}",
            )
        )
        findings += _findings(settings_of(measurement, folder, tokens, device), measurement)
    return findings


def settings_of(measurement: Measurement, folder: Path, tokens: int, device: str) -> MeasureSettings:
    """The settings of a measurement, as far as it records them."""
    p = measurement.provenance
    estimators = dict.fromkeys(name for hook in measurement for name in hook.estimators)
    return MeasureSettings(
        model=p.model,
        out=folder,
        saes=tuple(spec_of(h, p.model) for h in measurement),
        tokens=tokens,
        source=p.source,
        importance=tuple(name for name in estimators if name in plugins().importance_estimators),
        context=p.settings.get("context"),
        batch_rows=p.settings.get("batch_rows", MeasureSettings.batch_rows),
        prepend_bos=began_with_bos(p),
        special_tokens=bool(p.settings.get("special_tokens")),
        alive_threshold=measurement.hooks[0].summary.alive_threshold,
        fvu_every=p.settings.get("fvu_every", MeasureSettings.fvu_every),
        # A slice of positions is the SAE's own, for which no option stands.
        skip_first_positions=None if "stop_position" in p.settings else p.settings.get("skip_first_positions", 0),
        shard=(p.shards[0], p.shard_count),
        device=device,
        dtype=p.dtype,
        revision=hub_revision(p.model, p.revision),
    )


def _findings(settings: MeasureSettings, earlier: Measurement | None = None) -> Iterator[Finding]:
    """The findings of all checks. Each check needs what earlier ones prepared, and is left out if that is missing."""
    findings: list[Finding] = []
    loaded = saes = text = readable = None
    with refusal_found("model", findings):
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            revision=settings.revision,
            device_map=settings.device_map,
        )
        findings.append(model_finding(loaded, settings, earlier))
    if loaded is not None:
        with refusal_found("SAE", findings):
            saes = dictionaries(settings, loaded)
            findings += [dictionary_finding(dictionary, earlier) for dictionary in saes]
    if loaded is not None and saes is not None:
        with refusal_found("text", findings):
            stream = stream_for(settings, loaded, [d.sae for d in saes])
            rule = rule_for(settings, loaded, [d.sae for d in saes])
            text = _sample(stream, rule)
            findings += [
                context_finding(stream.context, saes),
                bos_finding(stream, saes),
                *positions_findings(rule, saes),
            ]
    if loaded is not None and text is not None:
        with refusal_found("vocabulary", findings):
            findings.append(vocabulary_finding(text, loaded))
            readable = text  # or the embedding could not even be asked
    yield from findings
    if loaded is not None and saes is not None and readable is not None:
        yield from _run(settings, loaded, saes, readable)


def _sample(stream: Iterable[TokenBatch], rule: CountingRule) -> list[TokenBatch]:
    """The first batches, up to a thousand tokens that will be counted."""
    batches, counted = [], 0
    for batch in stream:
        batches.append(batch)
        counted += int(rule.counted(batch.tokens).sum())
        if counted >= SAMPLE_TOKENS:
            break
    return batches


def _run(
    settings: MeasureSettings, loaded: LoadedModel, saes: Sequence[NamedDictionary], batches: Sequence[TokenBatch]
) -> Iterator[Finding]:
    """The findings that need the running model. Each SAE is tried alone first, so that a failing one hides nothing
    about the others. Then all run together, for the time.
    """
    findings: list[Finding] = []
    with refusal_found("hook", findings):
        model = tapped_model(loaded, [d.sae for d in saes], [d.hook for d in saes])
    yield from findings
    if findings:
        return
    rule = rule_for(settings, loaded, [d.sae for d in saes])
    trial, fitting = Trial(settings, model, rule, batches), []
    for dictionary in saes:
        findings = list(tap_findings(trial, dictionary))
        fitting += [dictionary] if all(finding.level != STOP for finding in findings) else []
        yield from findings
    yield from cost_findings(trial, fitting)
