"""Tap: one SAE at one hook point, and the sums of what it saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.dictionaries.adapter import _decoder_norms, check_dictionary, dictionary_name, target_hook
from tl_capacity.dictionaries.encoding import Encoder, Entries, decoder_vectors_add_up, joined
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError, plugin_code
from tl_capacity.interfaces import ImportanceEstimator, LatentBatch, SparseAutoencoder
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.counting import Batch
from tl_capacity.text.documents import DOCUMENT_GROUPS

NO_GRADIENTS: Mapping[str, Tensor] = {}


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
