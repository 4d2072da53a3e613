"""Attaching: find the hook points that SAEs belong to, tap them, count while the model runs, and take exactly our own
hooks away again.

A tap watches one hook point with one SAE. The token ids of a forward pass are seen at the model's embedding, so that
special tokens can be masked however the model is called.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.dictionaries.encoding import Encoder, Entries, decoder_vectors_add_up, joined
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError, plugin_code
from tl_capacity.interfaces import ImportanceEstimator, PathGradient, SparseAutoencoder
from tl_capacity.measure.backward import LOSSES, differentiable, frozen, gradients, path_gradient
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.statistics import FeatureStatistics, LatentBatch, document_groups
from tl_capacity.measurement.measurement import HookMeasurement, Measurement, Provenance
from tl_capacity.plugins import plugins
from tl_capacity.results.summary import DOCUMENT_GROUPS, MASK_REASONS, FeatureSummary
from tl_capacity.runtime.checks import checked, checked_but
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream, as_batches, source_of

LIBRARIES = ("tl-capacity", "torch", "transformer-lens", "sae-lens", "transformers", "numpy")

NO_GRADIENTS: Mapping[str, Tensor] = {}

Callback = TypeVar("Callback", bound=Callable[..., Any])
SAEs = SparseAutoencoder | Sequence[SparseAutoencoder] | Mapping[str, SparseAutoencoder | Sequence[SparseAutoencoder]]


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
    taps = [Tap(TapPoint.of(model, hook), sae, hook, estimators, fvu_every, scratch) for hook, sae in _pairs(saes)]
    if not taps:
        raise DictionaryError("no SAE was given: pass one, a list, or a mapping from hook point to SAE")
    masked = (
        special_token_ids(model, getattr(model, "tokenizer", None))
        if mask_token_ids is None
        else sorted(set(mask_token_ids))
    )
    return CapacityHooks(model, taps, alive_threshold, np.array(masked, dtype=np.int64), skip_first_positions)


@dataclass(frozen=True)
class TapPoint:
    """A place in a model where activations can be watched.

    Attributes:
        name: the hook point's name, as asked for.
        find: finds the module again; another one than `module` means that the hook point was replaced.
        module: the module to watch.
        side: "output", or "input" for a module that is watched before it runs.
        width: dimensions per token, where the model's configuration tells.
    """

    name: str
    find: Callable[[], Any]
    module: nn.Module
    side: str = "output"
    width: int | None = None

    @classmethod
    def of(cls, model: Any, name: str) -> TapPoint:
        """The tap point of a hook name.

        Raises:
            HookPointError: where the model has no such hook point.
        """
        if not isinstance(model, nn.Module):
            raise HookPointError(f"{type(model).__name__} is no model: pass a TransformerLens or Hugging Face model")
        if hasattr(model, "hook_dict"):
            return cls._of_hooked(model, name)
        return cls._of_hugging_face(model, name)

    @classmethod
    def _of_hooked(cls, model: Any, name: str) -> TapPoint:
        from transformer_lens.hook_points import HookPoint

        def find() -> Any:
            found: nn.Module | None = model.hook_dict.get(name)
            return found if found is not None else _walk(model, name)

        # A bridge ignores names it does not know, and an SAE bridge lacks the aliases: so the name is resolved here,
        # once.
        module = find()
        if not isinstance(module, HookPoint):
            known = hook_names(model)
            raise HookPointError(f"{name!r} is no hook point of this model: {_nearest(name, known)}")
        return cls(name, find, module, width=_hook_width(model, name))

    @classmethod
    def _of_hugging_face(cls, model: Any, name: str) -> TapPoint:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        family = plugins().family_of(kind)
        if family is None:
            raise HookPointError(
                f"no model family covers {kind!r}: register one (docs/families.md), or wrap the model in a"
                " TransformerBridge"
            )
        place = family.residual(name)
        if place is None:
            raise HookPointError(
                f"{name!r} is no residual-stream hook, the only kind a Hugging Face model offers: wrap the model in a"
                " TransformerBridge"
            )
        module = _walk(model, place[0])
        if not isinstance(module, nn.Module):
            raise HookPointError(f"{name!r} is no hook point of this model: {_nearest(name, hook_names(model))}")
        return cls(name, lambda: _walk(model, place[0]), module, place[1], int(model.config.hidden_size))

    def watch(self, callback: Callable[[Tensor], None], differentiable: bool = False) -> Callable[[], None]:
        """Call `callback` with each activation; returns what takes the hook away again, and nothing else.

        A bridge shows some hooks a view of their own (`hook_z`, cut into heads) and goes on with the activation itself,
        so that the view has no gradient. With `differentiable`, what was seen is handed back unchanged, and the model
        goes on with that.
        """

        def see(activation: Tensor) -> Tensor | None:
            callback(activation)
            return activation if differentiable else None

        # A compiled graph would trace through the bookkeeping; a graph break here costs less.
        return self.edit(_untraced(see))

    def edit(self, change: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Replace each activation by what `change` gives, where it gives one; returns what takes the hook away again,
        and nothing else.
        """
        if hasattr(self.module, "fwd_hooks"):
            point: Any = self.module
            # Permanent, because `reset_hooks` and the end of `run_with_hooks` drop every other kind.
            point.add_hook(lambda activation, hook: change(activation), is_permanent=True)
            handle = point.fwd_hooks[-1]

            def remove() -> None:
                handle.hook.remove()
                point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]

            return remove

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            first = next(iter(kwargs)) if not args else None
            changed = change(args[0] if first is None else kwargs[first])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if first is None else (args, {**kwargs, first: changed})

        def after(_: nn.Module, args: Any, out: Any) -> Any:
            changed = change(out[0] if isinstance(out, tuple) else out)
            return (changed, *out[1:]) if changed is not None and isinstance(out, tuple) else changed

        if self.side == "input":
            return self.module.register_forward_pre_hook(before, with_kwargs=True).remove
        return self.module.register_forward_hook(after).remove


class Tap:
    """One SAE at one hook point, and the sums of what it saw."""

    def __init__(
        self,
        point: TapPoint,
        sae: SparseAutoencoder,
        hook: str,
        estimators: Sequence[ImportanceEstimator],
        fvu_every: int,
        scratch: Scratch,
    ) -> None:
        check_dictionary(sae, hook)
        self.point, self.sae, self.hook, self.estimators, self.fvu_every = point, sae, hook, estimators, fvu_every
        self.name, self.encoder = dictionary_name(sae), Encoder(sae, scratch)
        self.d_in, self.d_sae = int(sae.cfg.d_in), int(sae.W_dec.shape[0])
        if point.width is not None and point.width != self.d_in:
            raise HookPointError(
                f"{hook} has width {point.width}, but the SAE's d_in is {self.d_in}: it belongs to another hook point"
                " or model"
            )
        device = sae.W_dec.device
        # MPS has no float64, so there the sums live on the CPU.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.target_hook = target_hook(sae, hook)
        # Those that add up something of their own are given the active latents of a token together.
        self._accumulating = [e for e in estimators if type(e).update is not ImportanceEstimator.update]
        self.statistics = FeatureStatistics.empty(
            self.d_sae, sae.W_dec[0].numel(), _decoder_norms(sae, self.device), self.device
        )
        for estimator in estimators:
            with plugin_code("importance estimator", estimator.name, estimator):
                state = dict(estimator.start(sae, DOCUMENT_GROUPS, self.device))
            for key, zeros in state.items():
                if not isinstance(zeros, Tensor):
                    raise CapacityError(
                        f"the importance estimator {estimator.name!r} starts with {key!r}, a {type(zeros).__name__}:"
                        " make it a tensor"
                    )
                if zeros.shape[:1] != (DOCUMENT_GROUPS,):
                    raise CapacityError(
                        f"the importance estimator {estimator.name!r} starts with {key!r} of shape"
                        f" {tuple(zeros.shape)}: its first axis must be the {DOCUMENT_GROUPS} document groups"
                    )
                self.statistics.state[f"{estimator.name}/{key}"] = zeros
        self.fired = 0
        self._open = OpenDocuments(self.d_sae, self.device)
        self._decodes_linearly: bool | None = None
        self._awaiting_target: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def observe(self, activation: Tensor, batch: Batch, gradients: Mapping[str, Tensor] = NO_GRADIENTS) -> None:
        """Count one forward pass's activations [row, position, ...], given the gradients there that estimators asked
        for.
        """
        self.fired += 1
        if self.fired > 1:
            raise HookPointError(
                f"{self.hook} fired {self.fired} times in one forward pass, so it cannot be counted: tap a hook point"
                " that fires once"
            )
        if activation.shape[:2] != batch.counted.shape:
            raise HookPointError(
                f"{self.hook} has shape {tuple(activation.shape)}, but the tokens have shape"
                f" {tuple(batch.counted.shape)}: tap a hook point with one vector per token"
            )
        if activation[0, 0].numel() != self.d_in:
            raise HookPointError(
                f"{self.hook} has width {activation[0, 0].numel()}, but the SAE's d_in is {self.d_in}: it belongs to"
                " another hook or model"
            )
        # A sum is finite exactly where its terms are, short of overflow in float32, and needs no temporary of the
        # activation's size.
        if not bool(torch.isfinite(activation.sum(dtype=torch.float32))):
            raise CapacityError(
                f"{self.hook} has NaN or infinite activations in batch {batch.number}: check the model's dtype and"
                " weights"
            )
        norms = activation.float().flatten(2).square().sum(-1).double()
        sums = self.statistics
        sums.counted_norm += norms[batch.counted.to(norms.device)].sum().to(self.device)
        sums.masked_norm += norms[batch.unwanted.to(norms.device)].sum().to(self.device)
        sums.masked += batch.masked.to(self.device)
        self._open.end(sums, but=batch.unique_documents)
        self._open.open(batch.counted_documents)
        counted = batch.counted.flatten().to(activation.device)
        inputs = activation.flatten(0, 1)[counted]
        if not getattr(self.sae, "hook_z_reshaping_mode", False):
            inputs = inputs.flatten(1)  # only such an SAE joins the heads itself
        along = {loss: gradient.flatten(0, 1)[counted].flatten(1) for loss, gradient in gradients.items()}
        rows, positions = batch.row_of_token.to(self.device), batch.position_of_token.to(self.device)
        for start in range(0, len(inputs), self.encoder.chunk):
            chunk = slice(start, start + self.encoder.chunk)
            self._count(
                inputs[chunk],
                rows[chunk],
                positions[chunk],
                batch,
                {loss: gradient[chunk] for loss, gradient in along.items()},
            )

    def _count(
        self, inputs: Tensor, rows: Tensor, positions: Tensor, batch: Batch, gradients: Mapping[str, Tensor]
    ) -> None:
        token_groups, open_rows = batch.groups.to(self.device)[rows], self._open.rows(batch.documents.tolist())[rows]
        checked = batch.checked(self.fvu_every).to(self.device)[rows]
        self.statistics.update_tokens(token_groups)
        kept: list[Entries] = []
        # What is active is counted a few features at a time; only what is needed together is kept.
        for part in self.encoder.parts(inputs):
            tokens, features, values = (t.to(self.device) for t in part)
            values = values.double()
            if not bool(torch.isfinite(values.sum())):
                raise CapacityError(
                    f"the SAE at {self.hook} gives NaN or infinite latents in batch {batch.number}: check its weights"
                )
            self.statistics.update_latents(features, values, token_groups[tokens])
            self._open.mark(open_rows[tokens], features)
            if not self._accumulating:
                few = torch.nonzero(checked[tokens]).view(-1)
                tokens, features, values = tokens[few], features[few], values[few]
            kept.append((tokens, features, values))
        if self._decodes_linearly is None:
            self._decodes_linearly = decoder_vectors_add_up(self.sae, inputs)
        if gradients:
            self.refuse_unless_linear()
        entries = joined(kept)
        if self._accumulating:
            tokens, features, values = entries
            latents = LatentBatch(
                features=features,
                tokens=tokens,
                groups=token_groups[tokens],
                values=values,
                activations=inputs,
                documents=batch.documents.to(self.device)[rows],
                token_groups=token_groups,
                rows=rows,
                positions=positions,
                counted=batch.counted,
                sae=self.sae,
                gradients=gradients,
            )
            for estimator in self._accumulating:
                self._accumulate(estimator, latents)
        if bool(checked.any()):
            self._check_reconstruction(inputs, entries, token_groups, checked)

    def _accumulate(self, estimator: ImportanceEstimator, latents: LatentBatch) -> None:
        prefix = f"{estimator.name}/"
        kept = {k.removeprefix(prefix): v for k, v in self.statistics.state.items() if k.startswith(prefix)}
        own = dict(kept)
        with plugin_code("importance estimator", estimator.name, estimator):
            estimator.update(own, latents)
        if any(own.get(key) is not tensor for key, tensor in kept.items()):
            raise CapacityError(
                f"the importance estimator {estimator.name!r} replaces its state, and what it added is lost: add to the"
                " tensors in place"
            )

    def refuse_unless_linear(self) -> None:
        """A latent's gradient is taken along its decoder vector, which says something only where the SAE writes the sum
        of those at its own hook point.
        """
        if self._decodes_linearly is False or self.target_hook is not None:
            what = (
                "writes to another hook point"
                if self.target_hook is not None
                else "does not write the sum of its decoder vectors"
            )
            raise DictionaryError(
                f"the SAE at {self.hook} {what}, so the gradient of its latents is not known: choose an importance that"
                " needs none"
            )

    def _check_reconstruction(self, inputs: Tensor, entries: Entries, groups: Tensor, checked: Tensor) -> None:
        inputs, groups = inputs[checked.to(inputs.device)], groups[checked]
        reconstruction = (
            self._decode_sparsely(entries, checked, inputs) if self._decodes_linearly else self._decode_densely(inputs)
        )
        if self.target_hook is None:
            self.statistics.update_reconstruction(
                inputs.flatten(1).to(self.device), reconstruction.to(self.device), groups
            )
        else:
            self._awaiting_target.append((reconstruction, groups))

    def _decode_densely(self, inputs: Tensor) -> Tensor:
        return self._with_skip(self.sae.decode(self.sae.encode(inputs)).flatten(1), inputs)

    def _decode_sparsely(self, entries: Entries, checked: Tensor, inputs: Tensor) -> Tensor:
        """The reconstruction of the checked tokens, given the active latents of all or of just these."""
        decoder = self.sae.W_dec.detach().flatten(1)
        tokens, features, values = entries
        kept = torch.nonzero(checked[tokens]).view(-1)
        position = (torch.cumsum(checked, 0) - 1)[tokens[kept]]
        kept = kept[position.argsort(stable=True)]  # a bag for each token
        counts = torch.bincount(position, minlength=len(inputs))
        starts = torch.cumsum(counts, 0) - counts
        features, values = features[kept].to(decoder.device), values[kept].to(decoder.device, decoder.dtype)
        summed = nn.functional.embedding_bag(
            features, decoder, starts.to(decoder.device), mode="sum", per_sample_weights=values
        )
        bias = getattr(self.sae, "b_dec", None)
        return self._with_skip(summed if bias is None else summed + bias.detach().flatten(), inputs)

    def _with_skip(self, reconstruction: Tensor, inputs: Tensor) -> Tensor:
        skip = getattr(self.sae, "W_skip", None)  # SAELens' skip transcoders add it in forward, not in decode
        return reconstruction if skip is None else reconstruction + inputs.to(skip.dtype) @ skip.detach().T

    @torch.no_grad()
    def observe_target(self, activation: Tensor, batch: Batch) -> None:
        """Compare what a transcoder wrote with what it should have written, [row, position, ...] at its output hook."""
        if not self._awaiting_target:
            return
        outputs = activation.detach().flatten(0, 1)[batch.counted.flatten().to(activation.device)]
        checked = batch.checked(self.fvu_every)[batch.row_of_token]
        target = outputs[checked.to(outputs.device)].flatten(1).to(self.device)
        reconstruction = torch.cat([r for r, _ in self._awaiting_target]).to(self.device)
        groups = torch.cat([g for _, g in self._awaiting_target])
        self._awaiting_target = []
        if target.shape != reconstruction.shape:
            raise HookPointError(
                f"{self.target_hook} has {target.shape[-1]} dimensions, but the transcoder writes"
                f" {reconstruction.shape[-1]}: it belongs to another model"
            )
        self.statistics.update_reconstruction(target, reconstruction, groups)

    def close_open_documents(self) -> None:
        """Count the documents seen so far as ended: what comes next is another stream, whatever numbers its documents
        have.
        """
        self._open.end(self.statistics)

    def snapshot(self, close: bool) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The sums so far, with open documents closed in the copy or not, and the open documents, for a later
        `restore`.
        """
        statistics, (documents, seen) = self.statistics.clone(), self._open.arrays()
        if close:
            statistics.update_documents(documents, torch.from_numpy(seen).to(self.device))
        return {name: value.cpu().numpy() for name, value in statistics.tensors().items()}, {
            "open_documents": documents,
            "open_seen": seen,
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]], open_documents: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `snapshot` whose documents were left open."""
        self.statistics = FeatureStatistics.from_tensors(
            {name: torch.from_numpy(value.copy()).to(self.device) for name, value in arrays.items()}
        )
        self._open = OpenDocuments.from_arrays(
            open_documents["open_documents"], open_documents["open_seen"], self.device
        )


class Batch:
    """What every tap must know of one forward pass: which tokens count, and which documents they are from."""

    def __init__(self, tokens: TokenBatch, mask_ids: NDArray[np.int64], skip_first: int, number: int) -> None:
        padding = tokens.tokens == PADDING
        special = np.isin(tokens.tokens, mask_ids) & ~padding
        position = (
            np.broadcast_to(np.arange(tokens.tokens.shape[1]) < skip_first, tokens.tokens.shape) & ~padding & ~special
        )
        unwanted = special | position
        counted = ~(padding | unwanted)
        self.number = number
        self.valid = torch.from_numpy(~padding)
        self.counted, self.unwanted = torch.from_numpy(counted), torch.from_numpy(unwanted)
        self.masked = torch.tensor([int(m.sum()) for m in (padding, special, position)])
        assert len(self.masked) == len(MASK_REASONS)
        self.n_counted = int(counted.sum())
        self._documents = tokens.documents
        self.documents = torch.from_numpy(tokens.documents)
        self.groups = torch.from_numpy(document_groups(tokens.documents))
        self.row_of_token, self.position_of_token = (torch.from_numpy(place) for place in np.nonzero(counted))
        self.unique_documents: list[int] = list(dict.fromkeys(tokens.documents.tolist()))
        self.counted_documents: list[int] = tokens.documents[counted.any(1)].tolist()

    def checked(self, every: int) -> Tensor:
        """bool [row]: whether the reconstruction is checked on the row's document; the first document always is, the
        others by another hash.
        """
        chosen = (document_groups(self._documents + 2**40, every) == 0) | (self._documents == 0)
        return torch.from_numpy(chosen)


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
            self._removers.append(module.register_forward_pre_hook(_untraced(see), with_kwargs=True).remove)

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
            take_away = tap.point.edit(_untraced(move))
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


def check_dictionary(sae: Any, hook: str) -> None:
    """Whether an SAE can be measured as it is.

    Raises:
        DictionaryError: training-time BatchTopK, unfolded activation normalisation, or no SAE at all.
    """
    _check_is_sae(sae)
    if "BatchTopKTraining" in type(sae).__name__:
        raise DictionaryError(
            f"{type(sae).__name__} at {hook} is a training-time BatchTopK, whose latents depend on the whole batch: "
            "save it and load it back, which makes it JumpReLU"
        )
    if type(sae).__name__ == "TemporalSAE":
        raise DictionaryError(
            f"the SAE at {hook} is a TemporalSAE, whose latents depend on the tokens before: choose one that encodes"
            " each token by itself"
        )
    normalisation = getattr(sae.cfg, "normalize_activations", "none")
    if normalisation in ("expected_average_only_in", "covariance_whitening"):
        fold = (
            "fold_activation_whitening"
            if normalisation == "covariance_whitening"
            else "fold_activation_norm_scaling_factor"
        )
        raise DictionaryError(
            f"the SAE at {hook} expects activations normalised by {normalisation!r}, which encode does not apply: fold"
            f" it in first with sae.{fold}(…)"
        )


def target_hook(sae: Any, hook: str) -> str | None:
    """The hook point that a transcoder writes to; None for an SAE, which reconstructs what it reads."""
    target = getattr(getattr(sae.cfg, "metadata", None), "hook_name_out", None)
    return str(target) if target and target != hook else None


@torch.no_grad()
def _decoder_norms(sae: Any, device: torch.device) -> Tensor:
    """float64 [feature]: the length of what each latent writes where it is 1."""
    norms = torch.ones(len(sae.W_dec), dtype=torch.float64, device=device)
    if not getattr(
        sae.cfg, "rescale_acts_by_decoder_norm", False
    ):  # where it is set, SAELens' decode divides by the norms
        # A few rows at a time and in place: a float64 copy of a wide decoder is larger than all else that is kept.
        for rows, place in zip(torch.split(sae.W_dec.detach().flatten(1), 64), torch.split(norms, 64), strict=True):
            torch.linalg.vector_norm(rows.to(device, torch.float64), dim=1, out=place)
    return norms


def dictionary_digest(sae: Any) -> str:
    """SHA-256 over an SAE's weights, in the order of their names."""
    named = (
        sae.state_dict()
        if hasattr(sae, "state_dict")
        else {k: v for k, v in vars(sae).items() if isinstance(v, Tensor)}
    )
    sha = hashlib.sha256()
    for name in sorted(named):
        values = named[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        sha.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def dictionary_name(sae: Any) -> str:
    """The name an SAE is known by: release and id where SAELens recorded them, else its kind and size."""
    metadata = getattr(sae.cfg, "metadata", None)
    release, sae_id = (
        (getattr(metadata, key, None) for key in ("sae_lens_release", "release")),
        getattr(metadata, "sae_id", None),
    )
    named = next((r for r in release if r), None)
    return f"{named}/{sae_id}" if named and sae_id else f"{type(sae).__name__} with {len(sae.W_dec):,} latents"


def hook_names(model: Any) -> list[str]:
    """The hook points of a model that can be tapped."""
    if hasattr(model, "hook_dict"):
        return list(model.hook_dict)
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    return [f"blocks.{layer}.{side}" for layer in range(layers) for side in ("hook_resid_pre", "hook_resid_post")]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a measurement depends on, where installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def _pairs(saes: SAEs) -> Iterator[tuple[str, SparseAutoencoder]]:
    """`(hook point, SAE)` of everything that was passed."""
    if isinstance(saes, Mapping):
        for hook, several in saes.items():
            for sae in _several(several):
                yield hook, sae
    else:
        for sae in _several(saes):
            _check_is_sae(sae)
            yield _metadata_hook(sae), sae


def _check_is_sae(sae: Any) -> None:
    if isinstance(sae, str):
        raise DictionaryError(
            f"{sae!r} is no SAE but a name: load it, as with sae_lens.SAE.from_pretrained or"
            " tl_capacity.models.loading.load_sae"
        )
    if not isinstance(sae, SparseAutoencoder):
        raise DictionaryError(
            f"{type(sae).__name__} is no SAE: it needs encode, decode, W_dec and cfg, as SAELens' inference classes"
            " have"
        )


def _several(saes: Any) -> list[Any]:
    """One or several as a list; an SAE is iterable, so it is recognised before anything is iterated."""
    return [saes] if isinstance(saes, (SparseAutoencoder, str)) or not isinstance(saes, Iterable) else list(saes)


def _metadata_hook(sae: Any) -> str:
    hook = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "hook_name", None)
    if not hook:
        raise DictionaryError(
            f"this {type(sae).__name__} does not name its hook point: pass a mapping such as"
            " {'blocks.3.hook_resid_post': sae}"
        )
    return str(hook)


def special_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of every special token that the tokenizer or the model's configuration names. Id 0 is valid (GPT-NeoX); some
    configurations list several, some -1 for none.
    """
    ids = set(getattr(tokenizer, "all_special_ids", None) or ())
    for holder in (getattr(model, "config", None), tokenizer):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            ids |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return sorted(int(i) for i in ids if int(i) >= 0)


def forward_options(model: Any) -> dict[str, Any]:
    """What a forward pass is called with: a cache of keys and values that nobody reads costs memory; TransformerLens
    keeps none by default.
    """
    return (
        {"use_cache": False}
        if not hasattr(model, "hook_dict") and "use_cache" in inspect.signature(model.forward).parameters
        else {}
    )


class _ReachedError(Exception):
    """Ends a forward pass whose rest nobody looks at."""


@torch.no_grad()
def activation_at(model: Any, point: TapPoint, tokens: Int[Tensor, "row position"]) -> Tensor | None:
    """Run a model up to a hook point and return what it carries [row, position, ...]; None where the hook point does
    not fire.

    Raises:
        CapacityError: where a token is not in the model's vocabulary.
    """
    check_token_ids(model, tokens.numpy(force=True))
    seen: list[Tensor] = []

    def keep(activation: Tensor) -> None:
        seen.append(activation.detach())
        raise _ReachedError

    remove = point.watch(keep)
    try:
        model(tokens.to(next(model.parameters()).device), **forward_options(model))
    except _ReachedError:
        pass
    finally:
        remove()
    return seen[0] if seen else None


def embedding_of(model: Any) -> nn.Module:
    """The module that turns token ids into vectors.

    Raises:
        HookPointError: where the model has none.
    """
    embedding = (
        model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else getattr(model, "embed", None)
    )
    if not isinstance(embedding, nn.Module):
        raise HookPointError(
            f"{type(model).__name__} has no embedding at which its tokens can be seen: pass a TransformerLens or"
            " Hugging Face model"
        )
    return embedding


def check_token_ids(model: Any, ids: NDArray[np.integer[Any]], who: str = "the model") -> None:
    """Whether a model has a vector for each token.

    Raises:
        CapacityError: where it has not.
    """
    vocabulary = int(next(embedding_of(model).parameters()).shape[0])
    strange = ids[(ids < 0) | (ids >= vocabulary)]
    if len(strange):
        raise CapacityError(
            f"the text has token id {strange[0]}, but {who}'s vocabulary has {vocabulary:,}: tokenise it with {who}'s"
            " own tokenizer"
        )


def _hook_width(model: Any, name: str) -> int | None:
    config, last = model.cfg, name.rsplit(".", 1)[-1]
    if last in (
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_mlp_out",
        "hook_attn_out",
        "hook_embed",
    ) or (name.count(".") == 2 and last in ("hook_in", "hook_out")):
        return int(config.d_model)
    return int(config.n_heads * config.d_head) if last == "hook_z" else None


def _untraced(function: Callback) -> Callback:
    untraced: Callback = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced


def _walk(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = (
            root[int(part)]
            if part.isdigit() and isinstance(root, nn.ModuleList) and int(part) < len(root)
            else getattr(root, part, None)
        )
    return root


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, see `tl-capacity hooks --model …`"


def _chained(previous: str, batch: TokenBatch) -> str:
    """A running hash of the tokens consumed: two measurements with the same one saw the same tokens."""
    return hashlib.sha256(previous.encode() + batch.tokens.tobytes() + batch.documents.tobytes()).hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
