"""SessionRecord: what a measurement records of a session besides the sums: its text, its time, and notes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from tl_capacity.dictionaries.adapter import architecture_of, dictionary_digest, neuronpedia_id_of
from tl_capacity.dictionaries.rows import rows_differ
from tl_capacity.measure.behind import behind_note, reconstructed_before
from tl_capacity.measure.cursor import Cursor
from tl_capacity.measure.stream_record import StreamRecord
from tl_capacity.measure.tap import Tap
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.models.carried import carried_saes
from tl_capacity.models.hook_points import residual_width
from tl_capacity.models.identity import Identity
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.summary import FeatureSummary
from tl_capacity.runtime.versions import library_versions
from tl_capacity.text.counting import CountingRule


class SessionRecord:
    """What a session records besides the sums. With the sums of its taps it becomes a `Measurement`.

    The time runs from construction. `continue_from` adds the time of an earlier run.
    """

    def __init__(self, model: Any, taps: Sequence[Tap], alive_threshold: float, rule: CountingRule) -> None:
        self._model, self._taps, self._alive_threshold, self._rule = model, taps, alive_threshold, rule
        self._text = StreamRecord()
        self._behind: dict[Tap, set[str]] = {tap: set() for tap in taps}
        self._earlier_notes: dict[Tap, tuple[str, ...]] = {}
        self._started, self._earlier_seconds = time.monotonic(), 0.0

    def begin_stream(self, stream: Any) -> None:
        """Record which text is counted from now on."""
        self._text = StreamRecord.describing(stream, self._text)

    def note_saes(self) -> None:
        """Record which SAEs the model carries in the pass that begins."""
        if carried_saes(self._model):
            for tap in self._taps:
                self._behind[tap].update(reconstructed_before(self._model, tap.point))

    def continue_from(self, earlier: Measurement) -> None:
        """Add the notes and the time of an earlier run. Its SAEs must be those of the taps, in the same order."""
        self._earlier_notes = {tap: hook.notes for tap, hook in zip(self._taps, earlier.hooks, strict=True)}
        self._earlier_seconds, self._started = earlier.provenance.seconds, time.monotonic()

    def measurement(
        self, sums: Sequence[Mapping[str, NDArray[Any]]], identity: Identity, cursor: Cursor, complete: bool
    ) -> Measurement:
        """The measurement with these sums, one set for each tap."""
        hooks = tuple(self._hook_measurement(tap, arrays) for tap, arrays in zip(self._taps, sums, strict=True))
        return Measurement(hooks, self.provenance(identity, cursor), complete)

    def provenance(self, identity: Identity, cursor: Cursor) -> Provenance:
        """The model, text, settings, versions and time so far."""
        index, count = self._text.shard
        processing = {tap.hook: list(tap.processing) for tap in self._taps if tap.processing}
        return Provenance(
            model=identity.name,
            revision=identity.revision,
            dtype=str(next(self._model.parameters()).dtype).removeprefix("torch."),
            source=self._text.source,
            shards=(index,),
            shard_count=count,
            cursor=cursor.rows,
            tokens_digest=cursor.digest,
            settings={
                **self._text.settings,
                **self._rule.settings,
                "fvu_every": self._taps[0].fvu_every,
                **({"processing": processing} if processing else {}),
            },
            versions=library_versions(),
            seconds=round(self._earlier_seconds + time.monotonic() - self._started, 1),
        )

    def _hook_measurement(self, tap: Tap, sums: Mapping[str, NDArray[Any]]) -> HookMeasurement:
        return HookMeasurement(
            hook=tap.hook,
            sae=tap.name,
            sae_digest=dictionary_digest(tap.sae),
            architecture=architecture_of(tap.sae),
            width=tap.d_in,
            summary=FeatureSummary(sums, self._alive_threshold),
            estimators=tuple(estimator.name for estimator in tap.estimators),
            d_model=residual_width(self._model),
            notes=tuple(dict.fromkeys((*self._notes_on(tap), *self._earlier_notes.get(tap, ())))),
            linear=tap.linear,
            neuronpedia_id=neuronpedia_id_of(tap.sae),
        )

    def _notes_on(self, tap: Tap) -> Iterator[str]:
        yield from tap.notes
        if self._behind[tap]:
            yield behind_note(tap.hook, self._behind[tap])
        yield from rows_differ(tap.sae, tap.hook, self._text.begins_with_bos, self._text.context, self._rule.positions)
