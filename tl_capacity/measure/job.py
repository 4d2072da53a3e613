"""`measure`: from names to a measurement on disk, with checkpoints. `tl-capacity measure` runs it.

Residual-stream hooks are tapped on the Hugging Face model itself, whose attention is fused; other hooks need
TransformerLens' bridge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_capacity.dictionaries.bases import LargestOfABasis
from tl_capacity.errors import CapacityError, MeasurementError, SourceCutOffError
from tl_capacity.measure.attach import attach
from tl_capacity.measure.memory import fit_memory
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measure.setup import dictionaries, rule_for, stream_for, tapped_model
from tl_capacity.measurement.folder import JSON_NAME, read_folder, remove_leftovers, write_folder
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.identity import Identity
from tl_capacity.models.sharding import spread_blocks
from tl_capacity.predict.caveats import advice_on_fit
from tl_capacity.runtime.logs import figures, log
from tl_capacity.runtime.processes import Processes
from tl_capacity.runtime.progress import peak_memory
from tl_capacity.storage.files import last_whole
from tl_capacity.text.streams import TokenStream

FVU_TOKENS_BEFORE_REFUSAL = 2_000


def measure(settings: MeasureSettings) -> Measurement:
    """Measure in this process and save. The folder always holds the last complete checkpoint.

    Raises:
        CapacityError: on anything that the user can mend; what was saved before stays.
        SourceCutOffError: where the text stops in its midst; what was counted is saved.
    """
    earlier = earlier_in(settings.out, settings.resume)
    with attached(settings) as (capacity, stream):
        if earlier is not None:
            check_settings(earlier[0], capacity, stream)
            if earlier[0].complete:
                return _as_it_is(earlier[0], settings)
            capacity.resume(*earlier)
        count(capacity, stream, settings)
        measurement = capacity.measurement()
    measurement.save(settings.out)
    return measurement


def count(capacity: CapacityHooks, stream: TokenStream, settings: MeasureSettings) -> None:
    """Count, with checkpoints.

    Raises:
        CapacityError: on anything that the user can mend; what was saved before stays.
        NothingCountedError: where there was no token to count.
        SourceCutOffError: where the text stops in its midst; what was counted is saved.
    """
    if settings.max_memory is not None:
        fit_memory(capacity, settings.max_memory)
    checkpoints = _Checkpoints(settings)
    try:
        capacity.run(stream, settings.tokens, progress=settings.progress, after_batch=checkpoints.after_batch)
    except SourceCutOffError:
        checkpoints.save(capacity)
        raise
    _refuse_bad_fit(capacity, settings.max_fvu)
    _refuse_bad_importance(capacity)
    if settings.max_memory is not None and peak_memory() > settings.max_memory:
        log.warning(
            f"the peak was {peak_memory() / 1e9:.2f} GB, more than --max-memory: the model itself takes more than was"
            " left for it"
        )


@contextmanager
def attached(settings: MeasureSettings) -> Iterator[tuple[CapacityHooks, TokenStream]]:
    """The model with its hook points tapped, and the text to read."""
    from tl_capacity.models.loading import load_model

    loaded = load_model(
        settings.model,
        device="cpu" if settings.shard_model else settings.device,
        dtype=settings.dtype,
        revision=settings.revision,
        device_map=settings.device_map,
    )
    if settings.shard_model:
        processes = Processes.of_launch().connected(settings.device)
        spread_blocks(loaded.model, processes.device, processes.count)
    named = dictionaries(settings, loaded)
    saes = [sae for _, _, sae in named]
    stream, rule = stream_for(settings, loaded, saes), rule_for(settings, loaded, saes)
    model = tapped_model(loaded, saes, [hook for hook, _, _ in named])
    identity = Identity(loaded.name, loaded.revision)
    with attach(
        model, named, rule, settings.importance or None, settings.alive_threshold, settings.fvu_every, identity
    ) as capacity:
        yield capacity, stream


class _Checkpoints:
    """Saves checkpoints. Stops a run early if an SAE does not fit the model or an estimator does not work."""

    def __init__(self, settings: MeasureSettings) -> None:
        self.settings, self.last, self.fit_checked = settings, time.monotonic(), False

    def after_batch(self, capacity: CapacityHooks) -> None:
        if not self.fit_checked and all(
            int(t.statistics.fvu_tokens.sum()) >= FVU_TOKENS_BEFORE_REFUSAL for t in capacity.taps
        ):
            _refuse_bad_fit(capacity, self.settings.max_fvu)
            _refuse_bad_importance(capacity)
            self.fit_checked = True
        if time.monotonic() - self.last >= self.settings.checkpoint_seconds:
            self.save(capacity)

    def save(self, capacity: CapacityHooks) -> None:
        """Save what was counted so far, if anything."""
        if capacity.n_tokens == 0:
            return
        measurement, extra = capacity.checkpoint()
        write_folder(self.settings.out, measurement.to_json(), measurement.arrays() | extra, keep_previous=True)
        log.info("checkpoint saved", extra=figures(folder=str(self.settings.out), tokens=capacity.n_tokens))
        self.last = time.monotonic()


def _refuse_bad_fit(capacity: CapacityHooks, max_fvu: float) -> None:
    for tap in capacity.taps:
        if int(tap.statistics.tokens.sum()) == 0:
            continue
        fvu = tap.statistics.compute(capacity.alive_threshold).fvu
        if fvu is not None and fvu.value > max_fvu:
            basis = isinstance(tap.sae, LargestOfABasis)
            raise CapacityError(
                f"the {'basis' if basis else 'SAE'} {tap.name} leaves FVU = {fvu.value:.3g} of the variance at "
                f"{tap.hook} unexplained, more than {max_fvu:g}: {advice_on_fit(basis)} (--max-fvu inf measures it "
                "anyway)"
            )


def _refuse_bad_importance(capacity: CapacityHooks) -> None:
    for tap in capacity.taps:
        summary = tap.statistics.compute(capacity.alive_threshold)
        for estimator in tap.estimators:
            summary.importance(estimator.compute, estimator.name)  # raises on what no importance can be


def earlier_in(folder: Path, resume: bool) -> tuple[Measurement, dict[str, Any]] | None:
    """The measurement in a folder and its resumable state, if there is one.

    Raises:
        MeasurementError: where there is one, and it is not to be gone on with.
    """
    if not (folder / JSON_NAME).exists():
        return None
    if not resume:
        raise MeasurementError(f"{folder} already holds a measurement: continue with --resume, or choose another --out")
    return last_whole(folder / JSON_NAME, _resumable)


def _resumable(path: Path) -> tuple[Measurement, dict[str, Any]]:
    """A measurement, and the arrays from which its handle can resume."""
    measurement = Measurement.read(path)
    return measurement, {k: v for k, v in read_folder(path.parent, path.name)[1].items() if k.startswith("resume/")}


def finished(settings: MeasureSettings) -> Measurement | None:
    """The completed measurement in the output folder, if there is one.

    Raises:
        MeasurementError: where it is of something else, or not to be gone on with.
    """
    earlier = earlier_in(settings.out, settings.resume)
    if earlier is None or not earlier[0].complete:
        return None
    with attached(settings) as (capacity, stream):
        check_settings(earlier[0], capacity, stream)
    return _as_it_is(earlier[0], settings)


def _as_it_is(finished: Measurement, settings: MeasureSettings) -> Measurement:
    """A completed measurement, if it is what was asked for. Logs it if the text had fewer tokens."""
    remove_leftovers(settings.out)  # a run that was killed after its last write has not come to it
    counted = max(hook.summary.n_tokens for hook in finished)
    if counted < settings.tokens:
        log.warning(
            f"{settings.out} is complete with {counted:,} tokens, fewer than the {settings.tokens:,} asked for now: "
            "its text had no more, or an earlier command asked for fewer; choose another --out to count again"
        )
    return finished


def check_settings(earlier: Measurement, capacity: CapacityHooks, stream: TokenStream) -> None:
    """Check that a measurement or checkpoint was made with the settings of this run."""
    what = "measurement" if earlier.complete else "checkpoint"
    odd = earlier.provenance.difference(capacity.planned_provenance(stream))
    if odd is not None:
        raise MeasurementError(
            f"the {what} was made with {odd.name} {odd.mine!r}, and this run has {odd.theirs!r}: resume with the same,"
            " or choose another --out"
        )
    thresholds = {hook.summary.alive_threshold for hook in earlier}
    if thresholds != {capacity.alive_threshold}:
        raise MeasurementError(
            f"the {what} was made with an alive threshold of {', '.join(f'{t:g}' for t in thresholds)}, and this run"
            f" has {capacity.alive_threshold:g}: resume with the same, or choose another --out"
        )
    capacity.check_same(earlier)
