"""Tap: one SAE at one hook point, and the sums of what it saw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import (
    NamedDictionary,
    check_dictionary,
    decoder_norms,
    decoder_vectors,
    target_hook,
    unhooked,
)
from tl_capacity.dictionaries.decoding import Decoder
from tl_capacity.dictionaries.encoding import Encoder
from tl_capacity.dictionaries.reading import Reading
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import ImportanceEstimator
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.entries import EntryCounting, refuse_unless_linear
from tl_capacity.measure.estimators import accumulating, empty_states
from tl_capacity.measure.finite import FirstBad
from tl_capacity.measure.layout import Layout
from tl_capacity.measure.on_device import DeviceCounting, checked_target
from tl_capacity.measure.statistics import FeatureStatistics, device_of_sum
from tl_capacity.measure.written import Written, joined_writing
from tl_capacity.models.processing import CENTRING
from tl_capacity.runtime.devices import exact_device, is_accelerator
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.counting import CountedTokens

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

outside_inference_mode = torch.inference_mode(False)
"""Decorates functions that make sums. A tensor made under `torch.inference_mode` cannot be added to outside of it."""


def counting(method: Callable[Concatenate[Tap, Tensor, Arguments], Result]) -> Callable[..., Result]:
    """Decorates a method that counts an activation. It runs in the SAE's own precision, without gradients, and into
    sums that can be added to, whichever mode of PyTorch the model runs in.
    """

    @wraps(method)
    def counts(tap: Tap, activation: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # It allows gradients again, so that `no_grad` comes after it.
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as modes:
            for device in {activation.device.type, tap.device.type, tap.sae.W_dec.device.type}:
                if torch.amp.is_autocast_available(device):
                    modes.enter_context(torch.autocast(device, enabled=False))
            return method(tap, activation, *args, **kwargs)

    return counts


NO_GRADIENTS: Mapping[str, Tensor] = {}


class Tap:
    """One SAE at one hook point, and the sums of what it saw.

    Attributes:
        point: where it watches.
        hook, name, sae: the hook point's name, and the SAE with the name it is known by.
        target_hook: the hook point that a transcoder writes to; None for an SAE.
        estimators: the importance estimators that were asked for.
        fvu_every: the reconstruction is checked on one document in this many.
        processing: options of TransformerLens' weight processing that are made up for.
        notes: what a reader must know of the model and the SAE, a sentence each.
        statistics: the sums.
    """

    @outside_inference_mode
    def __init__(
        self,
        reading: Reading,
        dictionary: NamedDictionary,
        estimators: Sequence[ImportanceEstimator],
        fvu_every: int,
        scratch: Scratch,
        on_device: bool | None = None,
    ) -> None:
        """
        Args:
            reading: where the dictionary reads.
            dictionary: the SAE, its hook point and its name.
            estimators: importance estimators that were asked for.
            fvu_every: the reconstruction is checked on one document in this many.
            scratch: memory that taps share.
            on_device: count without waiting for the device; by default where that is an accelerator.
        """
        self.hook, self.name, self.sae = dictionary
        check_dictionary(self.sae, self.hook)
        self.point, self.estimators, self.fvu_every = reading.point, estimators, fvu_every
        self.processing, self.notes = reading.processing, reading.notes
        self.encoder, self._decoder = Encoder(self.sae, scratch), Decoder(self.sae)
        self.d_in, self.d_sae = int(self.sae.cfg.d_in), len(self.sae.W_dec)
        width = self.point.width
        if width is not None and width != self.d_in:
            raise HookPointError(
                f"{self.hook} has width {width:,}, but the SAE's d_in is {self.d_in:,}: it belongs to another hook"
                " point or model, so pass an SAE that was trained on this one"
            )
        device = self.sae.W_dec.device
        self.device = exact_device(device)
        self.target_hook = target_hook(self.sae, self.hook)
        norms = decoder_norms(self.sae, self.device)
        if not bool(norms.isfinite().all()):
            raise DictionaryError(
                f"the SAE at {self.hook} has NaN or infinite decoder weights: save it again, or choose another"
            )
        self.statistics = FeatureStatistics.empty(self.d_sae, decoder_vectors(self.sae).shape[1], norms, self.device)
        self.statistics.state.update(empty_states(estimators, self.sae, self.device))
        self._open = OpenDocuments(self.d_sae, self.device)
        self._counting: int | None = None
        on_device = is_accelerator(device) if on_device is None else on_device
        own = accumulating(estimators)
        self._entries = EntryCounting(self.hook, self.encoder, self._decoder, own, fvu_every, self.device)
        self._on_device = (
            DeviceCounting(self.encoder, self._decoder, FirstBad(self.hook, self.device))
            if on_device and not own
            else None
        )

    def differences(self) -> tuple[str, ...]:
        """How the model at hand differs from the SAE's own, a sentence each, whether the difference is corrected or
        not.
        """
        made_up_for = (
            f"{self.hook}: the SAE's metadata says that it was trained on a model with {CENTRING}, and this model is "
            "without: the mean over d_model is subtracted from activations before counting, which makes them the "
            "same"
        )
        return (*((made_up_for,) if self.point.centred else ()), *self.notes)

    @property
    def has_seen(self) -> bool:
        """Whether any token has come by, counted or not."""
        return bool(self.statistics.tokens.sum() or self.statistics.masked.sum())

    @property
    def linear(self) -> bool | None:
        """Whether the SAE writes the sum of its decoder vectors; None before any latent was active."""
        return self._decoder.linear

    @counting
    def observe(
        self,
        activation: Tensor,
        tokens: CountedTokens,
        batch: int,
        gradients: Mapping[str, Tensor] = NO_GRADIENTS,
        open_elsewhere: Collection[int] = (),
    ) -> list[Written]:
        """Count one forward pass's activations.

        Args:
            activation: [row, position, ...].
            tokens: which tokens count.
            batch: the number of the forward pass, for what is refused.
            gradients: those that estimators asked for, of the activation's shape.
            open_elsewhere: documents that other threads read meanwhile; all but these and this pass' own have ended.

        Returns:
            What a transcoder wrote for the tokens that are checked; nothing for an SAE.

        Raises:
            HookPointError: where the activation does not have one vector of the SAE's width for each token.
            CapacityError: where an activation or a latent is not finite.
        """
        self._check_shape(activation, tokens)
        if self._on_device is None:
            self._entries.check_finite(activation, tokens, batch)
        in_model = any(self.sae is sae for sae in self.point.carried())
        awaiting: list[Written] = []
        self._counting = batch
        self._begin(tokens, {*tokens.unique_documents, *open_elsewhere})
        with unhooked(self.sae) if in_model else nullcontext():
            for target, written in self._written(activation, tokens, batch, gradients):
                if self.target_hook is None:
                    self._compare(target, written)
                else:
                    awaiting.append(written)
        self._counting = None
        return awaiting

    def _written(
        self, activation: Tensor, tokens: CountedTokens, batch: int, gradients: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Written]]:
        """Count, and yield the checked tokens with what was written for them."""
        if self._on_device is None:
            yield from self._entries.count(activation, tokens, batch, self.statistics, self._open, gradients)
            return
        activation = activation.to(self.device)  # the model may run elsewhere
        layout = Layout.of(tokens, self.fvu_every, self.device)
        written = self._on_device.count(activation, layout, batch, self.statistics, self._open)
        if written is not None:
            yield checked_target(activation, layout), written

    def _begin(self, tokens: CountedTokens, still_open: Collection[int]) -> None:
        """Count what the host knows of a batch. Documents that are not `still_open` have ended."""
        self._open.end(self.statistics, but=still_open)
        self._open.open(tokens.counted_documents)
        self.statistics.update_tokens(tokens.groups[tokens.row_of_token])
        self.statistics.update_masked(tokens.masked)

    def check_sums(self) -> None:
        """Check that every batch was counted whole, and that everything counted is finite, unless that was checked for
        each batch.

        Raises:
            CapacityError: where they are not; the sums are worth nothing then.
        """
        if self._counting is not None:
            raise CapacityError(
                f"counting at {self.hook} ended in the midst of batch {self._counting}, and its sums hold a part of it:"
                " attach again and count anew, or resume from a checkpoint"
            )
        if self._on_device is not None:
            self._on_device.first_bad.check()

    def _check_shape(self, activation: Tensor, tokens: CountedTokens) -> None:
        rows, positions = tokens.counted.shape
        if activation.shape[0] == rows and activation.shape[1] > positions and activation[0, 0].numel() == self.d_in:
            raise HookPointError(
                f"{self.hook} has {activation.shape[1]:,} positions, but only {positions:,} of them came as token ids "
                "(generate without a cache?): generate with use_past_kv_cache=True, so that each token counts once"
            )
        if activation.shape[:2] != tokens.counted.shape:
            raise HookPointError(
                f"{self.hook} has shape {tuple(activation.shape)}, but the tokens have shape"
                f" {tuple(tokens.counted.shape)}: tap a hook point with one vector per token"
            )
        if activation[0, 0].numel() != self.d_in:
            raise HookPointError(
                f"{self.hook} has width {activation[0, 0].numel():,}, but the SAE's d_in is {self.d_in:,}: it belongs"
                " to another hook point or model, so pass an SAE that was trained on this one"
            )

    def refuse_unless_linear(self) -> None:
        """Refuse a gradient along decoder vectors if the SAE does not write the sum of its decoder vectors at its own
        hook point.

        Raises:
            DictionaryError: where it does not.
        """
        refuse_unless_linear(self.hook, self.linear, self.target_hook is not None)

    @counting
    def observe_target(self, activation: Tensor, tokens: CountedTokens, written: Sequence[Written]) -> None:
        """Compare what a transcoder wrote with the activations [row, position, ...] at its output hook.

        Raises:
            HookPointError: where that has another width.
        """
        whole, activation = joined_writing(written), activation.detach()
        if whole.layout is not None:
            self._compare(checked_target(activation, whole.layout), whole)
            return
        outputs = activation.flatten(0, 1)[tokens.counted.flatten().to(activation.device)]
        checked = tokens.checked(self.fvu_every)[tokens.row_of_token]
        self._compare(outputs[checked.to(outputs.device)], whole)

    def _compare(self, target: Tensor, written: Written) -> None:
        """Add the error of a reconstruction against its target [token, ...]."""
        target, reconstruction = target.flatten(1).to(self.device), written.reconstruction.to(self.device)
        if target.shape != reconstruction.shape:
            raise HookPointError(
                f"{self.target_hook} has {target.shape[-1]:,} dimensions, but the transcoder writes "
                f"{reconstruction.shape[-1]:,}: it belongs to another model, so pass one that was trained on this one"
            )
        self.statistics.update_reconstruction(target, reconstruction, written.groups, written.known_groups)

    def close_open_documents(self) -> None:
        """Count the documents seen so far as ended. The next stream may use the same document numbers."""
        self._open.end(self.statistics)

    def snapshot(self, close: bool) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The sums so far, and the open documents for a later `restore`.

        Args:
            close: count the open documents as ended, in the copy.

        Raises:
            CapacityError: where something that was counted is not finite.
        """
        self.check_sums()
        statistics, (documents, seen) = self.statistics.clone(), self._open.arrays()
        if close:
            self._open.added_to(statistics)
        sums = {name: value.cpu().numpy() for name, value in statistics.tensors().items()}
        return sums, {"open_documents": documents, "open_seen": seen}

    def leave_out(self, documents: Sequence[int], seen: NDArray[Any]) -> None:
        """From documents that another process began, count only features that they have not shown it, [document,
        feature].
        """
        self._open.leave_out(documents, seen)

    @outside_inference_mode
    def restore(
        self, arrays: Mapping[str, NDArray[Any]], open_documents: Mapping[str, NDArray[Any]], linear: bool | None
    ) -> None:
        """Continue from a `snapshot` whose documents were left open, and from what was known of the SAE by then."""
        self.statistics = FeatureStatistics.from_tensors(
            {
                name: torch.from_numpy(value.copy()).to(device_of_sum(name, self.device))
                for name, value in arrays.items()
            }
        )
        self._open = OpenDocuments.from_arrays(
            open_documents["open_documents"], open_documents["open_seen"], self.device
        )
        self._decoder.linear = linear
