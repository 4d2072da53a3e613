"""`doctor`: what would spoil a long measurement, found on its first thousand tokens: a hook that stays silent, an SAE
of another model, a full disk.

Every check ends in one `Finding`; a check that cannot be made because an earlier one failed is left out.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_capacity.dictionaries.adapter import check_dictionary, dictionary_digest, target_hook
from tl_capacity.errors import CapacityError
from tl_capacity.measure.attach import add_capacity_hooks
from tl_capacity.measure.memory import SUMS_AT_ONCE, sums_of
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measure.setup import dictionaries, importance_asked_for, row_length, spec_of, tapped_model
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.forward import check_token_ids
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.runtime.progress import peak_memory
from tl_capacity.text.counting import CountingRule, special_token_ids
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream

SAMPLE_TOKENS = 1_000
OK, CHANGE, STOP = "ok", "change", "stop"
HIGH_FVU = 0.5
"""Above it the SAE misses half of the variance, and its features with it."""
UNKNOWN_SHARE = 0.01
FIRST_NORM_RATIO = 10.0
"""Attention sinks have norms a hundred times those of other positions; nothing else comes near ten."""
FILES_AT_ONCE = 3
"""The last checkpoint, the one before it, and the one that is being written."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was checked.
        level: `ok`; `change`, where a run would work but another setting would serve better; `stop`, where it would
            fail or mean nothing.
        says: the figures, and what to change.
    """

    check: str
    level: str
    says: str


def examine(settings: MeasureSettings) -> list[Finding]:
    """Check what `measure` would do with these settings; nothing is written."""
    return list(_findings(settings))


def examine_folder(folder: Path, tokens: int = MeasureSettings.tokens, device: str = "cpu") -> list[Finding]:
    """Check the measurement or checkpoint in a folder, and that it could be gone on with: its files, and the model,
    SAEs and text that it names.
    """
    found: list[Finding] = []
    with _finding_of("folder", found):
        measurement = Measurement.load(folder)
        state = "a measurement that has ended" if measurement.complete else "a checkpoint, which --resume goes on from"
        found.append(
            Finding(
                "folder",
                OK,
                f"{folder} holds {state}: {measurement.hooks[0].summary.n_tokens:,} tokens of"
                f" {measurement.provenance.source}",
            )
        )
        found += _findings(_settings_of(measurement, folder, tokens, device), measurement)
    return found


def _settings_of(measurement: Measurement, folder: Path, tokens: int, device: str) -> MeasureSettings:
    """The settings that a measurement was made with, as far as it records them."""
    p = measurement.provenance
    return MeasureSettings(
        model=p.model,
        out=folder,
        saes=tuple(spec_of(h, p.model) for h in measurement),
        tokens=tokens,
        source=p.source,
        context=p.settings.get("context"),
        batch_rows=p.settings.get("batch_rows", MeasureSettings.batch_rows),
        prepend_bos=p.settings.get("bos") is not None,
        alive_threshold=measurement.hooks[0].summary.alive_threshold,
        skip_first_positions=p.settings.get("skip_first_positions", 0),
        shard=(p.shards[0], p.shard_count),
        device=device,
        dtype=p.dtype,
    )


def _findings(settings: MeasureSettings, earlier: Measurement | None = None) -> Iterator[Finding]:
    found: list[Finding] = []
    loaded = saes = stream = text = sample = None
    with _finding_of("model", found):
        loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype)
        found.append(_model(loaded, settings, earlier))
    if loaded is not None:
        with _finding_of("SAE", found):
            saes = dictionaries(settings, loaded)
            found += [_dictionary(hook, name, sae, earlier) for hook, name, sae in saes]
    if loaded is not None and saes is not None:
        with _finding_of("text", found):
            context = row_length(settings, loaded.model, [sae for _, _, sae in saes])
            stream = TokenStream(
                loaded.source(settings.source or ""),
                loaded.tokenizer,
                context,
                settings.batch_rows,
                settings.prepend_bos,
                settings.shard,
            )
            text = _sample(stream, special_token_ids(loaded.model, loaded.tokenizer))
            found += [*_context(context, saes), *_bos(stream, saes)]
    if loaded is not None and text is not None:
        with _finding_of("vocabulary", found):
            found.append(_vocabulary(text, loaded))
            sample = text  # which the model can read
    yield from found
    if loaded is not None and saes is not None and sample is not None:
        yield from _run(settings, loaded, saes, sample)


@contextmanager
def _finding_of(check: str, found: list[Finding]) -> Iterator[None]:
    """A refusal of the tool's own becomes a finding."""
    try:
        yield
    except CapacityError as problem:
        found.append(Finding(check, STOP, str(problem)))


def _model(loaded: LoadedModel, settings: MeasureSettings, earlier: Measurement | None) -> Finding:
    if earlier is not None and earlier.provenance.revision != loaded.revision:
        return Finding(
            "model",
            STOP,
            f"{settings.model} is now {loaded.revision}, and was {earlier.provenance.revision} when it was measured:"
            " get that one, or start anew",
        )
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return Finding(
        "model",
        OK,
        f"{settings.model}: {loaded.model.config.model_type}, {parameters:,} parameters, {settings.dtype} on"
        f" {settings.device}",
    )


def _dictionary(hook: str, name: str, sae: Any, earlier: Measurement | None) -> Finding:
    if earlier is not None and dictionary_digest(sae) not in {h.sae_digest for h in earlier if h.hook == hook}:
        return Finding(
            "SAE", STOP, f"{name} at {hook} has other weights than when it was measured: get those, or start anew"
        )
    return Finding("SAE", OK, f"{name} at {hook}: {type(sae).__name__}, {len(sae.W_dec):,} latents")


def _metadata(sae: Any, name: str) -> Any:
    return getattr(getattr(sae.cfg, "metadata", None), name, None)


def _sample(stream: TokenStream, masked: Sequence[int]) -> list[TokenBatch]:
    """The first batches, until they have a thousand tokens that will be counted."""
    batches, counted = [], 0
    for batch in stream:
        batches.append(batch)
        counted += int((~np.isin(batch.tokens, [PADDING, *masked])).sum())
        if counted >= SAMPLE_TOKENS:
            break
    return batches


def _context(context: int, saes: Sequence[tuple[str, str, Any]]) -> Iterator[Finding]:
    own = [int(c) for _, _, sae in saes if (c := _metadata(sae, "context_size"))]
    if own and context > min(own):
        yield Finding(
            "context",
            CHANGE,
            f"rows have {context} positions, and the SAE was trained on {min(own)}: pass --context {min(own)}",
        )
    else:
        yield Finding("context", OK, f"rows of {context} positions")


def _bos(stream: TokenStream, saes: Sequence[tuple[str, str, Any]]) -> Iterator[Finding]:
    trained = {_metadata(sae, "prepend_bos") for _, _, sae in saes}
    if stream.prepend_bos and stream.bos is None:
        yield Finding(
            "BOS", CHANGE, "rows are to begin with BOS, and the tokenizer has none: pass --no-bos to say that you know"
        )
    elif trained == {True} and stream.bos is None:
        yield Finding("BOS", CHANGE, "the SAE was trained on rows that begin with BOS, and these do not: pass --bos")
    elif trained == {False} and stream.bos is not None:
        yield Finding("BOS", CHANGE, "the SAE was trained on rows without BOS, and these begin with it: pass --no-bos")
    else:
        yield Finding(
            "BOS",
            OK,
            (
                "rows begin without BOS"
                if stream.bos is None
                else f"rows begin with BOS (id {stream.bos}), which is not counted"
            ),
        )


def _vocabulary(sample: Sequence[TokenBatch], loaded: LoadedModel) -> Finding:
    """
    Raises:
        CapacityError: where a token is not in the model's vocabulary.
    """
    ids = np.concatenate([batch.tokens[batch.tokens != PADDING] for batch in sample])
    check_token_ids(loaded.model, ids)
    unknown = getattr(loaded.tokenizer, "unk_token_id", None)
    share = (
        0.0
        if unknown is None or unknown in (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id)
        else float((ids == unknown).mean())
    )
    if share > UNKNOWN_SHARE:
        return Finding(
            "vocabulary",
            CHANGE,
            f"{share:.0%} of the tokens are unknown to the tokenizer: choose text of the kind that the model was"
            " trained on",
        )
    return Finding(
        "vocabulary",
        OK,
        f"token ids up to {int(ids.max()):,} of {int(loaded.model.get_input_embeddings().weight.shape[0]):,}",
    )


def _run(
    settings: MeasureSettings, loaded: LoadedModel, saes: Sequence[tuple[str, str, Any]], sample: Sequence[TokenBatch]
) -> Iterator[Finding]:
    """What only the running model tells: each SAE by itself first, so that one which fails hides nothing of the others;
    then all together, for the time.
    """
    found: list[Finding] = []
    with _finding_of("hook", found):
        model = tapped_model(loaded, [sae for _, _, sae in saes], [hook for hook, _, _ in saes])
    yield from found
    if found:
        return
    good = []
    for hook, _, sae in saes:
        found = list(_tap(settings, loaded, model, hook, sae, sample))
        good += [(hook, sae)] if all(finding.level != STOP for finding in found) else []
        yield from found
    yield from _costs(settings, loaded, model, good, sample)


def _attached(
    settings: MeasureSettings, loaded: LoadedModel, model: Any, saes: Sequence[tuple[str, Any]], fvu_every: int
) -> CapacityHooks:
    at: dict[str, list[Any]] = {}
    for hook, sae in saes:
        at.setdefault(hook, []).append(sae)
    masked = special_token_ids(loaded.model, loaded.tokenizer)
    return add_capacity_hooks(
        model,
        at,
        importance=importance_asked_for(settings),
        fvu_every=fvu_every,
        mask_token_ids=masked,
        skip_first_positions=settings.skip_first_positions,
    )


def _tap(
    settings: MeasureSettings, loaded: LoadedModel, model: Any, hook: str, sae: Any, sample: Sequence[TokenBatch]
) -> Iterator[Finding]:
    """One SAE: normalisation, hook point, width, whether it fires, and how much it explains."""
    found: list[Finding] = []
    with _finding_of("normalisation", found):
        check_dictionary(sae, hook)
    if found:
        yield from found
        return
    activations: list[Tensor] = []
    with _finding_of("hook", found):
        point = TapPoint.of(model, hook)
        if point.width is not None and point.width != sae.cfg.d_in:
            raise CapacityError(
                f"{hook} has width {point.width}, but the SAE's d_in is {sae.cfg.d_in}: it belongs to another hook"
                " point or model"
            )
        unwatch = point.watch(lambda activation: activations.append(activation.detach().flatten(2)))
        try:
            with _attached(settings, loaded, model, [(hook, sae)], fvu_every=1) as capacity:
                capacity.run(sample, progress=False)
        finally:
            unwatch()
        summary = capacity.measurement().hooks[0].summary
        found.append(
            Finding(
                "hook",
                OK,
                f"{hook} fires, with {sae.cfg.d_in} dimensions as the SAE has; {summary.n_tokens:,} tokens counted",
            )
        )
        rule = CountingRule.for_model(loaded.model, loaded.tokenizer, settings.skip_first_positions)
        counted = [torch.from_numpy(rule.counted(batch.tokens)) for batch in sample]
        found.append(_first_positions(hook, activations, counted))
        assert summary.fvu is not None
        inputs = torch.cat([x[c.to(x.device)] for x, c in zip(activations, counted, strict=True)])
        found.append(_fit(hook, sae, summary.fvu.value, inputs, settings.max_fvu))
    yield from found


def _first_positions(hook: str, activations: Sequence[Tensor], counted: Sequence[Tensor]) -> Finding:
    """Whether the first counted position of a row outweighs all others, as an attention sink does where no BOS takes
    its place.
    """
    norms = [torch.where(c, x.float().norm(dim=-1).cpu(), torch.nan) for x, c in zip(activations, counted, strict=True)]
    first, rest = (
        torch.cat([n[:, where].flatten() for n in norms]).nanmedian().item() for where in (slice(0, 1), slice(1, None))
    )
    if first > FIRST_NORM_RATIO * rest:
        return Finding(
            "first position",
            CHANGE,
            f"{hook}: ‖x‖ is {first:.3g} at the first position and {rest:.3g} elsewhere: pass --skip-first-positions 1,"
            " or --bos",
        )
    return Finding(
        "first position", OK, f"{hook}: no counted position outweighs the others; ‖x‖ has the median {rest:.3g}"
    )


def _fit(hook: str, sae: Any, fvu: float, inputs: Float[Tensor, "token d_in"], max_fvu: float) -> Finding:
    """The FVU, and where it is high, whether the SAE fits activations that were normalised as training often does."""
    if fvu <= HIGH_FVU:
        return Finding("FVU", OK, f"{hook}: {fvu:.3f} on {len(inputs):,} tokens")
    level = STOP if fvu > max_fvu else CHANGE
    mean_norm = float(inputs.float().norm(dim=-1).mean())
    scale = sqrt(inputs.shape[1]) / mean_norm
    scaled = (
        f"scaled to the mean norm √{inputs.shape[1]}: fold the factor in first, with"
        f" sae.fold_activation_norm_scaling_factor({scale:.4g})"
    )
    centred = (
        "centred over the dimensions: measure a HookedTransformer in a session, whose weights are processed to that end"
    )
    normalised = {scaled: inputs * scale, centred: inputs - inputs.mean(-1, keepdim=True)}
    if target_hook(sae, hook) is None and not getattr(sae, "hook_z_reshaping_mode", False):
        for how, x in normalised.items():
            if (better := _fvu(sae, x)) <= HIGH_FVU:
                return Finding(
                    "FVU", level, f"{hook}: {fvu:.3g} as the activations are, but {better:.3g} with them {how}"
                )
    return Finding(
        "FVU",
        level,
        f"{hook}: {fvu:.3g} of the variance is unexplained: wrong hook point, wrong model, or other text than the SAE"
        " knows?",
    )


@torch.no_grad()
def _fvu(sae: Any, x: Float[Tensor, "token d_in"]) -> float:
    """Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    x = x.to(sae.W_dec)
    value = float((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum())
    return value if isfinite(value) else float("inf")


def _costs(
    settings: MeasureSettings,
    loaded: LoadedModel,
    model: Any,
    saes: Sequence[tuple[str, Any]],
    sample: Sequence[TokenBatch],
) -> Iterator[Finding]:
    """Time, memory and disk that the whole run will take, from a second run over the sample, in which nothing is loaded
    or compiled any more.
    """
    if not saes:
        yield disk(settings.out, 0)
        return
    with _attached(settings, loaded, model, saes, settings.fvu_every) as capacity:
        started = time.monotonic()
        capacity.run(sample, progress=False)
        seconds = time.monotonic() - started
    sums = sums_of(capacity)
    rate = capacity.n_tokens / seconds
    yield Finding(
        "duration", OK, f"{settings.tokens:,} tokens at {rate:,.0f} tokens/s: about {duration(settings.tokens / rate)}"
    )
    yield memory(int(SUMS_AT_ONCE * sums))
    yield disk(settings.out, FILES_AT_ONCE * sums)


def memory(further: int, available: int | None = None) -> Finding:
    """Whether there is memory for what a run takes beyond what was taken already, in bytes."""
    import psutil

    free = psutil.virtual_memory().available if available is None else available
    says = (
        f"about {gigabytes(peak_memory() + further)} at the peak, {gigabytes(further)} of them for the sums and for"
        f" saving them; {gigabytes(free)} are free"
    )
    return (
        Finding("memory", OK, says)
        if further <= free
        else Finding("memory", STOP, f"{says}: measure fewer SAEs at once")
    )


def disk(out: Path, needed: int) -> Finding:
    """Whether a folder can be written and has room for `needed` bytes."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir():
        return Finding("disk", STOP, f"{place} is a file, so {out} cannot be a folder: choose another --out")
    if not os.access(place, os.W_OK):
        return Finding("disk", STOP, f"{place} cannot be written: choose another --out")
    free = shutil.disk_usage(place).free
    if free < needed:
        return Finding(
            "disk",
            STOP,
            f"{gigabytes(needed)} are needed at {out}, and {gigabytes(free)} are free: free space, or choose another"
            " --out",
        )
    return Finding("disk", OK, f"{gigabytes(needed)} are needed at {out}, and {gigabytes(free)} are free")


def gigabytes(count: int) -> str:
    """Bytes, in the unit that shows them best."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, in the unit that shows them best."""
    return (
        f"{seconds:,.0f} s"
        if seconds < 120
        else f"{seconds / 60:,.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.1f} h"
    )
