"""Tap: one SAE at one hook point, and the sums of what it saw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import (
    NamedDictionary,
    check_dictionary,
    decoder_norms,
    decoder_vectors,
    inputs_for,
    target_hook,
    unhooked,
)
from tl_capacity.dictionaries.decoding import Decoder
from tl_capacity.dictionaries.encoding import Encoder, Entries, joined
from tl_capacity.dictionaries.reading import Reading
from tl_capacity.errors import DictionaryError, HookPointError
from tl_capacity.interfaces import ImportanceEstimator, LatentBatch
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.estimators import accumulate, accumulating, empty_states
from tl_capacity.measure.finite import FirstBad, not_finite
from tl_capacity.measure.layout import Layout
from tl_capacity.measure.on_device import DeviceCounting, checked_target
from tl_capacity.measure.statistics import FeatureStatistics, device_of_sum
from tl_capacity.models.processing import CENTRING
from tl_capacity.runtime.devices import exact, exact_device, is_accelerator
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.counting import CountedTokens

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

outside_inference_mode = torch.inference_mode(False)
"""Decorates what makes sums: a tensor that is made under `torch.inference_mode` can't be added to outside of it."""


def counting(method: Callable[Concatenate[Tap, Tensor, Arguments], Result]) -> Callable[..., Result]:
    """A method that counts an activation: in the SAE's own precision, without gradients, into sums that can be added
    to, in whichever mode of PyTorch the model runs.
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


class Written(NamedTuple):
    """What a transcoder wrote for some tokens, until its target is seen: [token, width] and each token's group."""

    reconstruction: Tensor
    groups: Tensor
    layout: Layout | None = None


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
                f"{self.hook} has width {width}, but the SAE's d_in is {self.d_in}: it belongs to another hook"
                " point or model, so pass one that was trained on this"
            )
        device = self.sae.W_dec.device
        self.device = exact_device(device)
        self.target_hook = target_hook(self.sae, self.hook)
        self._accumulating = accumulating(estimators)
        norms = decoder_norms(self.sae, self.device)
        if not bool(norms.isfinite().all()):
            raise DictionaryError(
                f"the SAE at {self.hook} has NaN or infinite decoder weights: save it again, or choose another"
            )
        self.statistics = FeatureStatistics.empty(self.d_sae, decoder_vectors(self.sae).shape[1], norms, self.device)
        self.statistics.state.update(empty_states(estimators, self.sae, self.device))
        self._open = OpenDocuments(self.d_sae, self.device)
        on_device = is_accelerator(device) if on_device is None else on_device
        self._on_device: DeviceCounting | None = None
        if on_device and not self._accumulating:
            self._on_device = DeviceCounting(self.encoder, self._decoder, FirstBad(self.hook, self.device))

    def differences(self) -> tuple[str, ...]:
        """How the model at hand differs from the one that the SAE was trained on, a sentence each: what is made up for,
        and what is not.
        """
        made_up_for = (
            f"{self.hook}: the SAE was trained on a model with {CENTRING}, by its own account, and this one is without:"
            " activations are counted less their mean over d_model, which makes them the same"
        )
        return (*((made_up_for,) if self.point.centred else ()), *self.notes)

    @property
    def has_seen(self) -> bool:
        """Whether any token has come by, counted or not."""
        return bool(self.statistics.tokens.sum() or self.statistics.masked.sum())

    @property
    def linear(self) -> bool | None:
        """Whether the SAE writes the sum of its decoder vectors; None before a latent was seen to be active."""
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
        still_open = {*tokens.unique_documents, *open_elsewhere}
        in_model = any(self.sae is sae for sae in self.point.carried())
        with unhooked(self.sae) if in_model else nullcontext():
            if self._on_device is not None:
                return self._observe_on_device(self._on_device, activation, tokens, batch, still_open)
            return self._observe_entries(activation, tokens, batch, gradients, still_open)

    def _observe_on_device(
        self,
        counting: DeviceCounting,
        activation: Tensor,
        tokens: CountedTokens,
        batch: int,
        still_open: Collection[int],
    ) -> list[Written]:
        self._begin(tokens, still_open)
        self.statistics.masked += tokens.masked
        activation = activation.to(self.device)  # the model may run elsewhere
        layout = Layout.of(tokens, self.fvu_every, self.device)
        reconstruction = counting.count(activation, layout, batch, self.statistics, self._open)
        written = Written(reconstruction, layout.checked_group, layout)
        if not len(layout.checked_groups):
            return []
        if self.target_hook is not None:
            return [written]
        self._compare(checked_target(activation, layout, self.device), [written])
        return []

    def _observe_entries(
        self,
        activation: Tensor,
        tokens: CountedTokens,
        batch: int,
        gradients: Mapping[str, Tensor],
        still_open: Collection[int],
    ) -> list[Written]:
        """The same, with active latents picked out."""
        self._check_finite(activation, tokens, batch)
        norms = exact(activation.float().flatten(2).square().sum(-1))
        self.statistics.update_masked(
            tokens.masked,
            counted_norm=norms[tokens.counted.to(norms.device)].sum(),
            masked_norm=norms[tokens.unwanted.to(norms.device)].sum(),
        )
        self._begin(tokens, still_open)
        counted = tokens.counted.flatten().to(activation.device)
        inputs = inputs_for(self.sae, activation.flatten(0, 1)[counted])
        along = {loss: gradient.flatten(0, 1)[counted].flatten(1) for loss, gradient in gradients.items()}
        rows, positions = tokens.row_of_token.to(self.device), tokens.position_of_token.to(self.device)
        written: list[Written] = []
        for start in range(0, len(inputs), self.encoder.chunk):
            chunk = slice(start, start + self.encoder.chunk)
            some = {loss: gradient[chunk] for loss, gradient in along.items()}
            written += self._count(inputs[chunk], rows[chunk], positions[chunk], tokens, batch, some)
        return written

    def _begin(self, tokens: CountedTokens, still_open: Collection[int]) -> None:
        """What the host knows of a batch; documents that are not `still_open` have ended."""
        self._open.end(self.statistics, but=still_open)
        self._open.open(tokens.counted_documents)
        self.statistics.update_tokens(tokens.groups[tokens.row_of_token])

    def check_finite(self) -> None:
        """Whether all that was counted is finite, where that was not asked for batch by batch.

        Raises:
            CapacityError: where it is not; the sums are worth nothing then.
        """
        if self._on_device is not None:
            self._on_device.first_bad.check()

    def _check_shape(self, activation: Tensor, tokens: CountedTokens) -> None:
        rows, positions = tokens.counted.shape
        if activation.shape[0] == rows and activation.shape[1] > positions and activation[0, 0].numel() == self.d_in:
            raise HookPointError(
                f"{self.hook} has {activation.shape[1]} positions, of which only {positions} came as token ids"
                " (generate without a cache?): generate with use_past_kv_cache=True, which counts each token once"
            )
        if activation.shape[:2] != tokens.counted.shape:
            raise HookPointError(
                f"{self.hook} has shape {tuple(activation.shape)}, but the tokens have shape"
                f" {tuple(tokens.counted.shape)}: tap a hook point with one vector per token"
            )
        if activation[0, 0].numel() != self.d_in:
            raise HookPointError(
                f"{self.hook} has width {activation[0, 0].numel()}, but the SAE's d_in is {self.d_in}: it belongs to"
                " another hook point or model, so pass one that was trained on this"
            )

    def _check_finite(self, activation: Tensor, tokens: CountedTokens, batch: int) -> None:
        # A sum is finite exactly where its terms are, short of overflow in float32, and needs no temporary of the
        # activation's size. What stands at padding is no part of the text.
        if not bool(torch.isfinite(activation.sum(dtype=torch.float32))) and not bool(
            torch.isfinite(activation[tokens.valid.to(activation.device)].sum(dtype=torch.float32))
        ):
            raise not_finite("activations", self.hook, batch)

    def _count(
        self,
        inputs: Tensor,
        rows: Tensor,
        positions: Tensor,
        tokens: CountedTokens,
        batch: int,
        gradients: Mapping[str, Tensor],
    ) -> Iterator[Written]:
        """Add some tokens to the sums; yields what a transcoder wrote for those that are checked."""
        device = self.sae.W_dec.device  # the model may run elsewhere
        inputs = inputs.to(device)
        gradients = {loss: gradient.to(device) for loss, gradient in gradients.items()}
        groups, documents = tokens.groups.to(self.device)[rows], tokens.documents.tolist()
        checked = tokens.checked(self.fvu_every).to(self.device)[rows]
        entries = self._count_latents(inputs, groups, self._open.rows(documents)[rows], checked, batch)
        self._decoder.settle(inputs)
        if gradients:
            self.refuse_unless_linear()
        if self._accumulating:
            latents = LatentBatch(
                features=entries[1],
                tokens=entries[0],
                groups=groups[entries[0]],
                values=entries[2],
                activations=inputs,
                documents=tokens.documents.to(self.device)[rows],
                token_groups=groups,
                rows=rows,
                positions=positions,
                counted=tokens.counted,
                sae=self.sae,
                gradients=gradients,
                scale=self._decoder.scale,
            )
            for estimator in self._accumulating:
                accumulate(estimator, self.statistics.state, latents)
        if bool(checked.any()):
            targets = inputs[checked.to(inputs.device)]
            written = Written(self._decoder(entries, checked, targets), groups[checked])
            if not bool(written.reconstruction.sum(dtype=torch.float32).isfinite()):
                raise not_finite("written", self.hook, batch)
            if self.target_hook is None:
                self._compare(targets.flatten(1).to(self.device), [written])
            else:
                yield written

    def _count_latents(self, inputs: Tensor, groups: Tensor, open_rows: Tensor, checked: Tensor, batch: int) -> Entries:
        """Count what is active, a few features at a time; returns what is needed together: the active latents of all
        tokens where an estimator accumulates, else those of tokens whose reconstruction is checked.
        """
        kept: list[Entries] = []
        for part in self.encoder.parts(inputs):
            tokens, features, values = (t.to(self.device) for t in part)
            values = values.double()
            if not bool(torch.isfinite(values.sum())):
                raise not_finite("latents", self.hook, batch)
            self.statistics.update_latents(features, values, groups[tokens])
            self._open.mark(open_rows[tokens], features)
            if not self._accumulating:
                few = torch.nonzero(checked[tokens]).view(-1)
                tokens, features, values = tokens[few], features[few], values[few]
            kept.append((tokens, features, values))
        return joined(kept)

    def refuse_unless_linear(self) -> None:
        """Refuse a gradient along decoder vectors where the SAE does not write the sum of those at its own hook point.

        Raises:
            DictionaryError: where it does not.
        """
        if self._decoder.linear is False or self.target_hook is not None:
            what = (
                "writes to another hook point"
                if self.target_hook is not None
                else "does not write the sum of its decoder vectors"
            )
            raise DictionaryError(
                f"the SAE at {self.hook} {what}, so the gradient of its latents is not known: choose an importance that"
                " needs none"
            )

    @counting
    def observe_target(self, activation: Tensor, tokens: CountedTokens, written: Sequence[Written]) -> None:
        """Compare what a transcoder wrote with what it should have written, [row, position, ...] at its output hook.

        Raises:
            HookPointError: where that has another width.
        """
        layout = written[0].layout if written else None
        if layout is not None:
            self._compare(checked_target(activation.detach(), layout, self.device), written)
            return
        outputs = activation.detach().flatten(0, 1)[tokens.counted.flatten().to(activation.device)]
        checked = tokens.checked(self.fvu_every)[tokens.row_of_token]
        self._compare(outputs[checked.to(outputs.device)].flatten(1).to(self.device), written)

    def _compare(self, target: Tensor, written: Sequence[Written]) -> None:
        """Add how far a reconstruction is from what it should be [token, width]."""
        reconstruction = torch.cat([part.reconstruction for part in written]).to(self.device)
        if target.shape != reconstruction.shape:
            raise HookPointError(
                f"{self.target_hook} has {target.shape[-1]} dimensions, but the transcoder writes"
                f" {reconstruction.shape[-1]}: it belongs to another model"
            )
        groups = torch.cat([part.groups for part in written])
        known = written[0].layout.checked_groups if written[0].layout is not None else None
        self.statistics.update_reconstruction(target, reconstruction, groups, known)

    def close_open_documents(self) -> None:
        """Count the documents seen so far as ended: what comes next is another stream, whatever numbers its documents
        have.
        """
        self._open.end(self.statistics)

    def snapshot(self, close: bool) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The sums so far, and the open documents for a later `restore`.

        Args:
            close: count the open documents as ended, in the copy.

        Raises:
            CapacityError: where something that was counted is not finite.
        """
        self.check_finite()
        statistics, (documents, seen) = self.statistics.clone(), self._open.arrays()
        if close:
            self._open.added_to(statistics)
        sums = {name: value.cpu().numpy() for name, value in statistics.tensors().items()}
        return sums, {"open_documents": documents, "open_seen": seen}

    def leave_out(self, documents: Sequence[int], seen: NDArray[Any]) -> None:
        """Count of documents that another process has begun only what they have not shown it, [document, feature]."""
        self._open.leave_out(documents, seen)

    @outside_inference_mode
    def restore(
        self, arrays: Mapping[str, NDArray[Any]], open_documents: Mapping[str, NDArray[Any]], linear: bool | None
    ) -> None:
        """Go on from a `snapshot` whose documents were left open, and from what was seen of the SAE until then."""
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
