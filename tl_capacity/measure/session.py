"""Attaching: find the hook points that SAEs belong to, tap them, count while the model runs, and take exactly our own
hooks away again.

A tap watches one hook point with one SAE. The token ids of a forward pass are seen at the model's embedding, so that
special tokens can be masked however the model is called.
"""

from __future__ import annotations

import hashlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.dictionaries.adapter import (
    SAEs,
    dictionary_digest,
    hook_sae_pairs,
)
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import ImportanceEstimator, PathGradient, SparseAutoencoder
from tl_capacity.measure.backward import LOSSES, differentiable, frozen, gradients, path_gradient
from tl_capacity.measure.tap import Tap
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.models.forward import check_token_ids, embedding_of, evaluating, forward_options
from tl_capacity.models.hook_points import TapPoint, untraced
from tl_capacity.plugins import plugins
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.summary import FeatureSummary
from tl_capacity.runtime.checks import checked, checked_but
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.runtime.versions import library_versions
from tl_capacity.text.counting import Batch, special_token_ids
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream, as_batches, source_of


class HookedModel(Protocol):
    """What a model offers once `tl_capacity` is imported: annotate a variable with it and a type checker accepts
    `add_capacity_hooks`.
    """

    def add_capacity_hooks(
        self,
        saes: SAEs,
        *,
        importance: Sequence[str | ImportanceEstimator] = ...,
        alive_threshold: float = ...,
        fvu_every: int = ...,
        mask_token_ids: Iterable[int] | None = ...,
        skip_first_positions: int = ...,
    ) -> CapacityHooks: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@checked_but("saes")
def add_capacity_hooks(
    model: Any,
    saes: SAEs,
    *,
    importance: Sequence[str | ImportanceEstimator] = ("second_moment",),
    alive_threshold: float = 1e-5,
    fvu_every: int = 8,
    mask_token_ids: Iterable[int] | None = None,
    skip_first_positions: int = 0,
) -> CapacityHooks:
    """Tap a model's hook points and count what the SAEs' features do, until the handle is removed.

    Args:
        model: a `HookedTransformer`, `TransformerBridge`, their SAE variants, or a Hugging Face causal language model
            of a registered family.
        saes: one SAE (its metadata names the hook point), a list, or a mapping from hook point to one or several SAEs.
        importance: importance estimators, by name or as objects. Those that need only the sums of z and z² can also be
            chosen later.
        alive_threshold: a feature is alive where its firing rate exceeds this; the paper's is 1e-5.
        fvu_every: check the reconstruction on one document in this many; 1 is all.
        mask_token_ids: ids not to count; by default every special token of the model's tokenizer, BOS among them.
        skip_first_positions: do not count the first positions of each row, whose activations have huge norms in many
            models.

    Returns:
        A handle, itself a context manager.

    Raises:
        HookPointError: unknown hook point, or one of another width than the SAE's d_in.
        DictionaryError: an SAE that cannot be measured as it is.
    """
    if skip_first_positions < 0 or fvu_every < 1:
        raise CapacityError(
            f"skip_first_positions = {skip_first_positions} and fvu_every = {fvu_every} must be at least 0 and 1"
        )
    if isinstance(model, SparseAutoencoder):
        raise HookPointError(
            f"{type(model).__name__} is an SAE, not a model: call add_capacity_hooks on the model and pass the SAE"
            " to it"
        )
    FeatureSummary.check_threshold(alive_threshold)
    estimators = [plugins().importance_estimators[e] if isinstance(e, str) else e for e in importance]
    names = [estimator.name for estimator in estimators]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CapacityError(
            f"the importance estimator {twice!r} is given twice, and both would add to the same sums: give it once, or"
            " two under two names"
        )
    scratch = Scratch()
    taps = [
        Tap(TapPoint.of(model, hook), sae, hook, estimators, fvu_every, scratch) for hook, sae in hook_sae_pairs(saes)
    ]
    if not taps:
        raise DictionaryError("no SAE was given: pass one, a list, or a mapping from hook point to SAE")
    masked = (
        special_token_ids(model, getattr(model, "tokenizer", None))
        if mask_token_ids is None
        else sorted(set(mask_token_ids))
    )
    return CapacityHooks(model, taps, alive_threshold, np.array(masked, dtype=np.int64), skip_first_positions)


class _EveryTapFiredError(Exception):
    """Ends a forward pass whose rest nobody looks at."""


class CapacityHooks:
    """The handle of `add_capacity_hooks`: counts while the model is called or `run` goes over a stream; a context
    manager that removes its own hooks only.
    """

    def __init__(
        self, model: Any, taps: Sequence[Tap], alive_threshold: float, mask_ids: NDArray[np.int64], skip_first: int
    ) -> None:
        self.model, self.taps, self.alive_threshold = model, taps, alive_threshold
        self._mask_ids, self._skip_first = mask_ids, skip_first
        config = getattr(model, "cfg", None) or getattr(model, "config", None)
        self.model_name = str(
            getattr(config, "model_name", None) or getattr(config, "name_or_path", None) or type(model).__name__
        )
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self._batch: Batch | None = None
        self._streaming = False
        self._forwards = self._rows = self._resumed_rows = self._unfired = 0
        self._digest = ""
        self._source, self._shard = Provenance.source, (0, 1)
        self._stream_settings: dict[str, Any] = {}
        self._started = time.monotonic()
        self._seconds = 0.0
        self._removers: list[Callable[[], None]] = []
        self._points: list[TapPoint] = []
        wanted = {loss for tap in taps for estimator in tap.estimators for loss in estimator.gradient_of}
        self._losses = sorted(loss for loss in wanted if isinstance(loss, str))
        self._paths = sorted(
            (along for along in wanted if isinstance(along, PathGradient)), key=lambda along: along.name
        )
        self._gradients = [*self._losses, *(along.name for along in self._paths)]
        self._on_a_path = False
        self._awaiting_gradient: list[tuple[Tap, Tensor]] = []
        self._asking = next(
            (estimator.name for tap in taps for estimator in tap.estimators if estimator.gradient_of), None
        )
        if unknown := {*self._losses, *(along.loss for along in self._paths)} - set(LOSSES):
            raise CapacityError(
                f"no gradient of {', '.join(sorted(unknown))} can be had: an estimator's gradient_of names"
                f" {', '.join(LOSSES)}"
            )
        self._options = forward_options(model)
        self._embedding = embedding_of(model)
        try:
            self._watch_embedding()
            for tap in taps:
                self._watch(tap.point, partial(self._on_activation, tap), differentiable=bool(self._gradients))
                if tap.target_hook is not None:
                    self._watch(TapPoint.of(model, tap.target_hook), partial(self._on_target, tap))
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> CapacityHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self._removers else "removed"
        return f"CapacityHooks({', '.join(t.hook for t in self.taps)}; {self.n_tokens:,} tokens counted, {state})"

    @property
    def n_tokens(self) -> int:
        """Tokens counted so far."""
        return int(self.taps[0].statistics.tokens.sum())

    @property
    def rows(self) -> int:
        """Rows consumed so far: the cursor of a stream."""
        return self._rows

    def remove(self) -> None:
        """Take this handle's hooks away, and nobody else's; what was counted stays available. May be called twice."""
        for remove in self._removers:
            remove()
        self._removers = []
        for tap in self.taps:
            tap.encoder.scratch.release()

    @checked
    def run(
        self,
        stream: TokenStream | Tensor | Iterable[Any],
        max_tokens: int | None = None,
        *,
        progress: bool = True,
        after_batch: Callable[[CapacityHooks], None] | None = None,
    ) -> CapacityHooks:
        """Run the model over a stream and count, stopping each forward pass at the last tapped layer.

        Args:
            stream: a `TokenStream`, a tensor of token ids [row, position], or an iterable of either or of
                `{"input_ids": …}`.
            max_tokens: stop after the batch that brings the tokens counted from this stream to this many.
            progress: show tokens per second and the remaining time once the run takes longer than two seconds.
            after_batch: called after each batch, for example to save a checkpoint.

        Raises:
            CapacityError: where nothing was counted, a token is not in the model's vocabulary, an activation is not
                finite, or a tap did not fire.
        """
        if not self._removers:
            raise CapacityError("these capacity hooks were removed: attach new ones with add_capacity_hooks")
        if self._gradients and (
            torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in self.model.parameters())
        ):
            raise CapacityError(
                f"the importance estimator {self._asking!r} needs the gradient of {', '.join(self._gradients)}, which"
                " torch.inference_mode does not give: load the model and call run() outside of it"
            )
        self._describe_stream(stream)
        device = next(self.model.parameters()).device
        filler = int(self._mask_ids[0]) if len(self._mask_ids) else 0
        # A resumed run goes over its own stream again, up to where it was; any other run adds to what was counted.
        skip, self._resumed_rows = self._resumed_rows, 0
        earlier_rows, earlier_tokens = (0, 0) if skip else (self._rows, self.n_tokens)
        seen, digest = 0, "" if skip else self._digest
        if not skip:
            for tap in self.taps:
                tap.close_open_documents()
        with evaluating(self.model), token_progress(max_tokens, progress) as advance:
            for tokens in as_batches(stream, earlier_rows):
                seen += len(tokens.tokens)
                digest = _chained(digest, tokens)
                if seen - len(tokens.tokens) < skip:
                    if seen > skip or (seen == skip and digest != self._digest):
                        raise CapacityError(
                            "the stream does not begin with the tokens counted before: resume with the same source,"
                            " tokenizer and batches, or start anew"
                        )
                    continue
                if max_tokens is not None and self.n_tokens - earlier_tokens >= max_tokens:
                    break  # the checkpoint that is gone on from had reached the end
                check_token_ids(self.model, tokens.tokens[tokens.tokens != PADDING])
                self._begin(tokens)
                self._rows, self._digest = earlier_rows + seen, digest
                self._forward(torch.from_numpy(np.where(tokens.tokens == PADDING, filler, tokens.tokens)).to(device))
                advance(self.n_tokens - earlier_tokens)
                if after_batch is not None:
                    after_batch(self)
                if max_tokens is not None and self.n_tokens - earlier_tokens >= max_tokens:
                    break
        if seen < skip:
            raise CapacityError(
                f"the stream ends after {seen:,} rows, but {skip:,} were counted before: resume with the same source,"
                " or start anew"
            )
        if self.n_tokens == 0:
            self.taps[0].statistics.compute(self.alive_threshold)  # raises, and says what was masked
        return self

    def measurement(self, complete: bool = True) -> Measurement:
        """What was counted so far, as an immutable result; counting may go on.

        Raises:
            CapacityError: where nothing was counted, or a tap never fired.
        """
        self._check_fired()
        if unfired := self._unfired + self._last_left_out():
            warnings.warn(
                f"{unfired} of {self._forwards} forward passes did not reach every tapped hook point; those were left"
                " out there",
                stacklevel=2,
            )
        return Measurement(
            tuple(self._hook_measurement(tap, tap.snapshot(close=True)[0]) for tap in self.taps),
            self._provenance(),
            complete,
        )

    def checkpoint(self) -> tuple[Measurement, dict[str, NDArray[Any]]]:
        """An incomplete measurement, and the arrays that let `resume` go on exactly where this handle is."""
        hooks: list[HookMeasurement] = []
        extra: dict[str, NDArray[Any]] = {}
        for i, tap in enumerate(self.taps):
            arrays, still_open = tap.snapshot(close=False)
            hooks.append(self._hook_measurement(tap, arrays))
            extra |= {f"resume/{i}/{name}": value for name, value in still_open.items()}
        return Measurement(tuple(hooks), self._provenance(), complete=False), extra

    def check_same(self, measurement: Measurement) -> None:
        """Whether a measurement is of what this handle taps.

        Raises:
            CapacityError: where it is of other hook points, SAE weights or estimators.
        """
        mine = [(t.hook, dictionary_digest(t.sae), tuple(e.name for e in t.estimators)) for t in self.taps]
        theirs = [(h.hook, h.sae_digest, h.estimators) for h in measurement.hooks]
        for ours, saved in zip(mine, theirs, strict=False):
            if ours[0] == saved[0] and ours[1] != saved[1]:
                raise DictionaryError(
                    f"the SAE at {ours[0]} has other weights than the one measured before: resume with the same SAE, or"
                    " choose another folder"
                )
        if mine != theirs:
            raise CapacityError(
                f"the earlier run measured {[(h, *e) for h, _, e in theirs]}, not {[(h, *e) for h, _, e in mine]}:"
                " resume with the same SAEs and estimators"
            )

    def resume(self, measurement: Measurement, extra: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `checkpoint`; the next `run` skips the rows that it had consumed.

        Raises:
            CapacityError: where the checkpoint is of other hook points, SAE weights or estimators.
        """
        self.check_same(measurement)
        for i, tap in enumerate(self.taps):
            own = {
                key.removeprefix(f"resume/{i}/"): value
                for key, value in extra.items()
                if key.startswith(f"resume/{i}/")
            }
            if own.keys() != {"open_documents", "open_seen"}:
                raise CapacityError(
                    "the earlier run was completed or its checkpoint was altered, so it cannot be resumed: choose"
                    " another folder"
                )
            tap.restore(measurement.hooks[i].summary.arrays, own)
        self._rows = self._resumed_rows = measurement.provenance.cursor
        self._digest = measurement.provenance.tokens_digest
        self._seconds, self._started = measurement.provenance.seconds, time.monotonic()

    def _watch(self, point: TapPoint, callback: Callable[[Tensor], None], differentiable: bool = False) -> None:
        self._removers.append(point.watch(callback, differentiable))
        self._points.append(point)

    def _watch_embedding(self) -> None:
        parameters = list(inspect.signature(self.model.forward).parameters)
        mask: Any = None

        def see_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal mask
            mask = {**dict(zip(parameters, args, strict=False)), **kwargs}.get("attention_mask")

        def see_tokens(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal mask
            ids = next(
                (v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and not v.is_floating_point()), None
            )
            if ids is not None and not self._streaming:
                rows = ids.detach().cpu().numpy().astype(np.int64)
                own, mask = mask, None  # the next call may go past the model's own forward, and then has none
                # With a cache it is of the earlier tokens too; other kinds, such as one for each attention layer, say
                # nothing of padding.
                if (
                    isinstance(own, Tensor)
                    and own.ndim == 2
                    and len(own) == len(rows)
                    and own.shape[1] >= rows.shape[1]
                ):
                    rows[own[:, -rows.shape[1] :].numpy(force=True) == 0] = PADDING
                batch = TokenBatch(rows, np.arange(self._rows, self._rows + len(rows)))
                self._begin(batch)
                self._rows, self._digest = self._rows + len(rows), _chained(self._digest, batch)

        for module, see in ((self.model, see_mask), (self._embedding, see_tokens)):
            self._removers.append(module.register_forward_pre_hook(untraced(see), with_kwargs=True).remove)

    def _begin(self, tokens: TokenBatch) -> None:
        for point in self._points:
            if point.find() is not point.module:
                raise HookPointError(
                    f"the hook point {point.name} was replaced since the capacity hooks were attached (by add_sae or"
                    " reset_saes?): attach them again"
                )
        self._unfired += self._last_left_out()
        for tap in self.taps:
            tap.fired, tap._awaiting_target = 0, []
        self._forwards += 1
        self._batch = Batch(tokens, self._mask_ids, self._skip_first, self._forwards)

    def _last_left_out(self) -> bool:
        """Whether the latest forward pass did not reach every tap."""
        return self._forwards > 0 and any(tap.fired == 0 for tap in self.taps)

    def _on_activation(self, tap: Tap, activation: Tensor) -> None:
        if self._on_a_path:
            return
        batch = self._current(tap.hook)
        if not self._gradients:
            tap.observe(activation.detach(), batch)
            self._stop_when_done()
        elif self._streaming:
            self._awaiting_gradient.append((tap, activation))
        else:
            raise CapacityError(
                f"the importance estimator {self._asking!r} needs the gradient of {', '.join(self._gradients)}, which a"
                " plain call of the model does not give: use run()"
            )

    def _on_target(self, tap: Tap, activation: Tensor) -> None:
        if self._on_a_path:
            return
        tap.observe_target(activation, self._current(tap.hook))
        self._stop_when_done()

    def _current(self, hook: str) -> Batch:
        if self._batch is None:
            raise CapacityError(
                f"{hook} fired but no token ids were seen (inputs_embeds or start_at_layer?): run the model on token"
                " ids, so that special ones can be masked"
            )
        return self._batch

    def _stop_when_done(self) -> None:
        if self._streaming and all(t.fired and not t._awaiting_target for t in self.taps):
            raise _EveryTapFiredError

    def _forward(self, tokens: Tensor) -> None:
        self._streaming = True
        try:
            if self._gradients:
                self._forward_and_backward(tokens)
            else:
                with torch.no_grad():
                    self.model(tokens, **self._options)
        except _EveryTapFiredError:
            pass
        finally:
            self._streaming = False
        for tap in self.taps:
            if tap._awaiting_target:
                raise HookPointError(
                    f"{tap.target_hook} did not fire after {tap.hook}, so the transcoder cannot be checked there: pass"
                    " another hook_name_out"
                )
        self._check_fired()

    def _forward_and_backward(self, tokens: Tensor) -> None:
        assert self._batch is not None
        self._awaiting_gradient = []
        with differentiable(self.model, self._embedding):
            output = self.model(tokens, **self._options)
            if not self._awaiting_gradient:
                return
            taps, activations = zip(*self._awaiting_gradient, strict=True)
            # Seeded by the tokens themselves, so that an interrupted run draws what an uninterrupted one does.
            seed = int(self._digest[:12], 16)
            found = gradients(
                getattr(output, "logits", output), tokens, self._batch.valid, activations, self._losses, seed
            )
        del output  # and with it the graph, before others are built
        self._awaiting_gradient = []
        for tap, activation, own in zip(taps, activations, found, strict=True):
            own |= {along.name: self._path_gradient(tap, tokens, along, seed) for along in self._paths}
            tap.observe(activation.detach(), self._batch, own)

    def _path_gradient(self, tap: Tap, tokens: Tensor, along: PathGradient, seed: int) -> Tensor:
        """The gradient at a tap, averaged along the path from the decoder's bias; other taps stay as they are, and
        nothing is counted meanwhile.
        """
        assert self._batch is not None
        tap.refuse_unless_linear()

        def logits_with(move: Callable[[Tensor], Tensor]) -> Tensor:
            take_away = tap.point.edit(untraced(move))
            try:
                output: Any = self.model(tokens, **self._options)
            finally:
                take_away()
            logits: Tensor = getattr(output, "logits", output)
            return logits

        bias = getattr(tap.sae, "b_dec", None)
        baseline = torch.zeros(tap.d_in) if bias is None else bias.detach().flatten()
        self._on_a_path = True
        try:
            with frozen(self.model):
                return path_gradient(logits_with, baseline, self._batch.counted, tokens, self._batch.valid, along, seed)
        finally:
            self._on_a_path = False

    def _check_fired(self) -> None:
        for tap in self.taps:
            if (
                self._forwards
                and tap.fired == 0
                and tap.statistics.tokens.sum() == 0
                and tap.statistics.masked.sum() == 0
            ):
                raise HookPointError(
                    f"{tap.hook} did not fire in {self._forwards} forward passes: the model does not run it, tap"
                    " another hook point"
                )

    def _describe_stream(self, stream: Any) -> None:
        self._source = source_of(stream)
        if isinstance(stream, TokenStream):
            self._shard, self._stream_settings = (
                stream.shard,
                {
                    "context": stream.context,
                    "bos": stream.bos,
                    "batch_rows": stream.batch_rows,
                },
            )

    def planned_provenance(self, stream: TokenStream) -> Provenance:
        """What the provenance of a run over `stream` will say, before it begins."""
        self._describe_stream(stream)
        return self._provenance()

    def _hook_measurement(self, tap: Tap, arrays: Mapping[str, NDArray[Any]]) -> HookMeasurement:
        architecture = getattr(tap.sae.cfg, "architecture", None)
        return HookMeasurement(
            hook=tap.hook,
            sae=tap.name,
            sae_digest=dictionary_digest(tap.sae),
            architecture=str(architecture() if callable(architecture) else architecture or type(tap.sae).__name__),
            width=tap.d_in,
            summary=FeatureSummary(arrays, self.alive_threshold),
            estimators=tuple(e.name for e in tap.estimators),
        )

    def _provenance(self) -> Provenance:
        return Provenance(
            model=self.model_name,
            revision=self.revision,
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            source=self._source,
            shards=(self._shard[0],),
            shard_count=self._shard[1],
            cursor=self._rows,
            tokens_digest=self._digest,
            settings={
                **self._stream_settings,
                "masked_token_ids": self._mask_ids.tolist(),
                "skip_first_positions": self._skip_first,
                "fvu_every": self.taps[0].fvu_every,
            },
            versions=library_versions(),
            seconds=round(self._seconds + time.monotonic() - self._started, 1),
        )


def _chained(previous: str, batch: TokenBatch) -> str:
    """A running hash of the tokens consumed: two measurements with the same one saw the same tokens."""
    return hashlib.sha256(previous.encode() + batch.tokens.tobytes() + batch.documents.tobytes()).hexdigest()
