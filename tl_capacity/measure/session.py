"""Sessions: hook points are tapped, and counted while the model is called or runs over a stream. Afterwards our own
hooks are removed and no others.

A tap watches one hook point with one SAE. The token ids of a forward pass are seen at the model's embedding, so that
special tokens can be masked however the model is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import dictionary_digest
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.errors import CapacityError, DictionaryError, NothingToReadError
from tl_capacity.measure.attachment import Attachment, weakly
from tl_capacity.measure.by_name import stream_of
from tl_capacity.measure.calls import Call, Calls
from tl_capacity.measure.current import CurrentPasses
from tl_capacity.measure.cursor import Cursor, batches_after
from tl_capacity.measure.ending import Ending
from tl_capacity.measure.gradient_pass import GradientPass, kind_of_pass
from tl_capacity.measure.passes import ForwardPass, RefusedCall, StreamingPass
from tl_capacity.measure.session_record import SessionRecord
from tl_capacity.measure.tap import Tap
from tl_capacity.measure.wanted_gradients import WantedGradients
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.models.forward import check_row_length, check_token_ids, device_of, drops_out, evaluating
from tl_capacity.models.identity import Identity
from tl_capacity.models.sharding import Pace
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.devices import uploaded
from tl_capacity.runtime.logs import ended_early, log
from tl_capacity.runtime.out_of_memory import within_device_memory
from tl_capacity.runtime.progress import token_progress
from tl_capacity.text.counting import CountedTokens, CountingRule, special_token_ids
from tl_capacity.text.shares import Place
from tl_capacity.text.streams import Fillers, TokenBatch, TokenStream

Counted = TypeVar("Counted")

LESS_MEMORY = (
    "choose a smaller --batch-rows, a shorter --context or --dtype bfloat16; --resume continues from the "
    "last checkpoint"
)
"""Advice for a device whose memory is full."""


class CapacityHooks:
    """The handle of `add_capacity_hooks`. It counts while the model is called, or while `run` goes over a stream. As a
    context manager it removes its own hooks only.

    Attributes:
        model: the model that is watched.
        taps: what is counted at each hook point.
        alive_threshold: a feature is alive where its firing rate exceeds this.
        rule: which tokens count.
        model_name, revision: the model as the measurement will name it.
    """

    def __init__(
        self, model: Any, taps: Sequence[Tap], alive_threshold: float, rule: CountingRule, identity: Identity
    ) -> None:
        self.model, self.taps, self.alive_threshold, self.rule = model, taps, alive_threshold, rule
        self.model_name, self.revision = identity.name, identity.revision
        self._gradients = WantedGradients.by(taps)
        self._cursor, self._goes_over_again = Cursor(), False
        self._record = SessionRecord(model, taps, alive_threshold, rule)
        self._passes = CurrentPasses(taps)
        self._seen_training = self._said_assumption = False
        self._blocks = 0
        special = special_token_ids(model, getattr(model, "tokenizer", None))
        self._fillers = Fillers(special, [token for token in special if token not in rule.special_ids])
        self._pace = Pace(model)
        self._attachment = Attachment(self)
        try:
            self._calls = Calls(model, weakly(self._on_call))
            self._attachment.add(self._calls.remove)
            for tap in taps:
                self._attachment.watch(tap.point, self._on_activation, tap, differentiable=bool(self._gradients))
                if tap.target_hook is not None:
                    self._attachment.watch(reading_of(model, tap.sae, tap.target_hook).point, self._on_target, tap)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> CapacityHooks:
        self._attachment.check()
        self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if not self._blocks:  # of blocks inside each other, the outermost ends
            self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._attachment.ended else "attached"
        return f"CapacityHooks({', '.join(t.hook for t in self.taps)}; {self.n_tokens:,} tokens counted, {state})"

    @property
    def n_tokens(self) -> int:
        """Tokens counted so far."""
        return int(self.taps[0].statistics.tokens.sum())

    @property
    def rows(self) -> int:
        """Rows consumed so far: the cursor of a stream."""
        return self._cursor.rows

    @property
    def place(self) -> Place:
        """The last document of which rows were consumed, and how many rows."""
        return self._cursor.place

    def remove(self) -> None:
        """Remove this handle's hooks and no others. The counts stay available. May be called twice."""
        self._attachment.end()
        for tap in self.taps:
            tap.encoder.scratch.release()

    @checked
    def run(
        self,
        stream: str | Path | TokenStream | Tensor | Iterable[Any],
        max_tokens: int | None = None,
        *,
        progress: bool = True,
        after_batch: Callable[[CapacityHooks], None] | None = None,
    ) -> CapacityHooks:
        """Run the model over a stream and count. Each forward pass stops at the last tapped layer.

        Args:
            stream: a source by name, such as a file or `embedded`, which is read with the model's own tokenizer; a
                `TokenStream`, a tensor of token ids [row, position], or an iterable of either or of
                `{"input_ids": …}`.
            max_tokens: stop after the batch that brings the tokens counted from this stream to this many.
            progress: show tokens per second and the remaining time once the run takes longer than two seconds.
            after_batch: called after each batch, for example to save a checkpoint.

        Raises:
            CapacityError: where nothing was counted, a token is not in the model's vocabulary, an activation is not
                finite, or a tap did not fire.
        """
        self._attachment.check()
        self._gradients.check_possible(self.model)
        if isinstance(stream, (str, Path)):
            stream = stream_of(self.model, str(stream), [tap.sae for tap in self.taps])
        self._record.begin_stream(stream)
        # A resumed run goes over its own stream again, up to where it was; any other run adds to what was counted.
        again, self._goes_over_again = self._goes_over_again, False
        earlier_tokens = 0 if again else self.n_tokens
        if not again:
            for tap in self.taps:
                tap.close_open_documents()
        with self._passes.running(), evaluating(self.model), token_progress(max_tokens, progress) as advance:
            self._pace = Pace(self.model)
            ending = Ending(whole=self._pace.together)
            kind = kind_of_pass(self._gradients, ending, self._pace.together)
            for batch, cursor in self._in_step(batches_after(stream, self._cursor, again, self._fillers)):
                if max_tokens is not None and self.n_tokens - earlier_tokens >= max_tokens:
                    break  # the checkpoint that is gone on from had reached the end
                check_token_ids(self.model, batch.ids)
                check_row_length(self.model, batch.tokens)
                self._attachment.check()
                self._cursor = cursor
                self._pace.step()
                self._forward(batch, kind)
                advance(self.n_tokens - earlier_tokens)
                if after_batch is not None:
                    after_batch(self)
                if max_tokens is not None and self.n_tokens - earlier_tokens >= max_tokens:
                    break
            self._run_beside_others()
        for tap in self.taps:
            tap.check_sums()
        counted = self.n_tokens - earlier_tokens
        if max_tokens is not None and counted < max_tokens:
            log.warning(ended_early(counted, max_tokens))
        if self.n_tokens == 0:
            self.taps[0].statistics.compute(self.alive_threshold)  # raises, and says what was masked
        return self

    def keep_step(self) -> None:
        """For a model spread over processes: run as many passes as the others still run, and count nothing."""
        with self._passes.running(), evaluating(self.model):
            self._pace = Pace(self.model)
            self._run_beside_others()

    def measurement(self, complete: bool = True) -> Measurement:
        """What was counted so far, as an immutable result. Counting may continue.

        Raises:
            CapacityError: where nothing was counted, or a tap never fired.
        """
        self._passes.check_fired()
        if incomplete := self._passes.incomplete:
            warnings.warn(
                f"{incomplete:,} of {self._passes.begun:,} forward passes did not reach every tapped hook point; there "
                "those passes were left out",
                stacklevel=2,
            )
        return self.measurement_of(self.sums(), complete)

    def sums(self) -> list[dict[str, NDArray[Any]]]:
        """The sums of each tap so far, also if nothing was counted. Unfinished documents are counted as ended."""
        with self._passes.lock:
            return [tap.snapshot(close=True)[0] for tap in self.taps]

    def measurement_of(self, sums: Sequence[Mapping[str, NDArray[Any]]], complete: bool = True) -> Measurement:
        """A measurement with the given sums, one set for each tap, such as those over several processes.

        Raises:
            NothingCountedError: where they are of no token.
        """
        return self._record.measurement(sums, self._identity, self._cursor, complete)

    def leave_out(self, documents: Sequence[int], seen: Sequence[NDArray[np.bool_]]) -> None:
        """From documents that another process began, count only what it has not counted.

        Args:
            documents: their numbers.
            seen: for each tap, the features that they have shown there, [document, feature].
        """
        for tap, flags in zip(self.taps, seen, strict=True):
            tap.leave_out(documents, flags)

    def checkpoint(self) -> tuple[Measurement, dict[str, NDArray[Any]]]:
        """An incomplete measurement, and the arrays from which `resume` continues exactly here."""
        sums, open_documents = zip(*(tap.snapshot(close=False) for tap in self.taps), strict=True)
        still_open = {
            f"resume/{i}/{name}": value for i, arrays in enumerate(open_documents) for name, value in arrays.items()
        }
        still_open["resume/place"] = np.array(self._cursor.place, dtype=np.int64)
        return self.measurement_of(sums, complete=False), still_open

    def check_same(self, measurement: Measurement) -> None:
        """Check that a measurement is of the SAEs and estimators of this handle.

        Raises:
            CapacityError: where it is of other hook points, SAE weights or estimators.
        """
        mine = [(t.hook, dictionary_digest(t.sae), tuple(e.name for e in t.estimators)) for t in self.taps]
        theirs = [(h.hook, h.sae_digest, h.estimators) for h in measurement.hooks]
        for ours, saved in zip(mine, theirs, strict=False):
            if ours[0] == saved[0] and ours[1] != saved[1]:
                raise DictionaryError(
                    f"the SAE at {ours[0]} has other weights than the one measured before: resume with the same "
                    "SAE, or choose another folder"
                )
        if mine != theirs:
            raise CapacityError(
                f"the earlier run measured {[(h, *e) for h, _, e in theirs]}, not {[(h, *e) for h, _, e in mine]}:"
                " resume with the same SAEs and estimators"
            )

    def resume(self, measurement: Measurement, extra: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a `checkpoint`. The next `run` skips the rows that were already consumed.

        Raises:
            CapacityError: where the checkpoint is of other hook points, SAE weights or estimators.
        """
        self.check_same(measurement)
        for i, tap in enumerate(self.taps):
            prefix = f"resume/{i}/"
            still_open = {key.removeprefix(prefix): value for key, value in extra.items() if key.startswith(prefix)}
            if still_open.keys() != {"open_documents", "open_seen"}:
                raise CapacityError(
                    "the earlier run is complete, or its checkpoint was altered, so it cannot be resumed: choose "
                    "another folder"
                )
            earlier = measurement.hooks[i]
            tap.restore(earlier.summary.arrays, still_open, earlier.linear)
        self._record.continue_from(measurement)
        provenance = measurement.provenance
        self._cursor, self._goes_over_again = Cursor(provenance.cursor, provenance.tokens_digest), True

    def planned_provenance(self, stream: TokenStream) -> Provenance:
        """The provenance that a run over `stream` will record, before it begins."""
        self._record.begin_stream(stream)
        return self._record.provenance(self._identity, self._cursor)

    @property
    def _identity(self) -> Identity:
        return Identity(self.model_name, self.revision)

    def _on_call(self, call: Call) -> NDArray[np.int64]:
        """Begin a forward pass that the user runs, in any thread. Returns the documents of its rows."""
        if not call.masked and not self._said_assumption and (assumption := self._fillers.assumption(call.tokens)):
            self._said_assumption = True
            warnings.warn(assumption, stacklevel=2)
        with self._passes.lock:
            self._attachment.check()
            self._record.note_saes()
            goes_on = call.documents is not None
            first = self._cursor.rows
            documents = np.arange(first, first + len(call.tokens)) if call.documents is None else call.documents
            batch = TokenBatch(call.tokens, documents, call.before)
            kind = partial(RefusedCall, wanted=self._gradients) if self._gradients else ForwardPass
            self._passes.begin(kind, self.rule.apply(batch))
            self._cursor = self._cursor.after(batch, goes_on)
            return documents

    def _on_activation(self, tap: Tap, activation: Tensor) -> None:
        if self.model.training and not self._seen_training:
            self._seen_training = True
            self._warn_of_dropout()
        self._calls.begin_waiting()
        with self._passes.lock:
            self._passes.current(tap.hook).see(tap, activation)

    def _warn_of_dropout(self) -> None:
        if drops_out(self.model):
            warnings.warn(
                "the model is called in training mode, where dropout changes its activations at random: call "
                "model.eval() first, or use run(), which does so",
                stacklevel=2,
            )

    def _on_target(self, tap: Tap, activation: Tensor) -> None:
        self._calls.begin_waiting()
        with self._passes.lock:
            self._passes.current(tap.hook).see_target(tap, activation)

    def _in_step(self, batches: Iterator[Counted]) -> Iterator[Counted]:
        """The same batches. When they run out, this process keeps running passes with the others."""
        try:
            yield from batches
        except NothingToReadError:
            self._run_beside_others()
            raise

    def _run_beside_others(self) -> None:
        idle = TokenBatch(np.full((1, 2), self.rule.filler), np.array([-1]))
        while self._pace.another_runs():
            self._forward(idle, kind_of_pass(self._gradients, Ending(whole=True), together=True, idle=True))

    def _forward(
        self, batch: TokenBatch, kind: Callable[[int, CountedTokens, Sequence[Tap]], StreamingPass | GradientPass]
    ) -> None:
        """One forward pass of `run`."""
        self._record.note_saes()
        begun = self._passes.begin(kind, self.rule.apply(batch))
        ids = uploaded(torch.from_numpy(batch.filled(self.rule.filler)), device_of(self.model))
        with (
            self._calls.paused(),
            within_device_memory("a batch of {} rows of {} tokens".format(*ids.shape), LESS_MEMORY),
        ):
            # Seeded by the tokens themselves, so that an interrupted run draws what an uninterrupted one does.
            begun.run(self.model, ids, int(self._cursor.digest[:12] or "0", 16))
        self._pace.release()
        begun.check_targets()
        self._passes.check_fired()
