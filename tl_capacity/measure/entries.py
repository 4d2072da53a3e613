"""Counting by entries: active latents are picked out, a few features at a time. This is fast on a CPU, and importance
estimators with sums of their own need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tl_capacity.dictionaries.adapter import inputs_for, target_hook
from tl_capacity.dictionaries.decoding import Decoder
from tl_capacity.dictionaries.encoding import Encoder, Entries, joined
from tl_capacity.errors import DictionaryError
from tl_capacity.interfaces import ImportanceEstimator, LatentBatch
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.estimators import accumulate
from tl_capacity.measure.finite import not_finite
from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.measure.written import Written
from tl_capacity.runtime.devices import exact, uploaded
from tl_capacity.text.counting import CountedTokens


class EntryCounting:
    """Adds one SAE's active latents to sums.

    Attributes:
        hook: the hook point, by name.
        sae: the SAE.
        accumulating: importance estimators with sums of their own.
    """

    def __init__(
        self,
        hook: str,
        encoder: Encoder,
        decoder: Decoder,
        accumulating: Sequence[ImportanceEstimator],
        fvu_every: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            hook: the hook point, by name.
            encoder, decoder: of the SAE.
            accumulating: importance estimators with sums of their own.
            fvu_every: the reconstruction is checked on one document in this many.
            device: where the sums are.
        """
        self.hook, self.sae, self.accumulating = hook, encoder.sae, accumulating
        self._encoder, self._decoder, self._fvu_every, self._device = encoder, decoder, fvu_every, device

    def check_finite(self, activation: Tensor, tokens: CountedTokens, batch: int) -> None:
        """
        Raises:
            CapacityError: where an activation of the text is not finite.
        """
        # A sum is finite exactly where its terms are, short of overflow in float32, and needs no temporary of the
        # activation's size. What stands at padding is no part of the text.
        if not bool(torch.isfinite(activation.sum(dtype=torch.float32))) and not bool(
            torch.isfinite(activation[tokens.valid.to(activation.device)].sum(dtype=torch.float32))
        ):
            raise not_finite("activations", self.hook, batch)

    def count(
        self,
        activation: Tensor,
        tokens: CountedTokens,
        batch: int,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
        gradients: Mapping[str, Tensor],
    ) -> Iterator[tuple[Tensor, Written]]:
        """Count the activations [row, position, ...] of one batch. Yields the checked inputs [token, ...] and what the
        SAE wrote for them.

        Args:
            activation: where the model runs.
            tokens: which count.
            batch: its number.
            statistics: the sums.
            open_documents: where the documents are open.
            gradients: those that estimators asked for, of the activation's shape.
        """
        norms = exact(activation.float().flatten(2).square().sum(-1))
        statistics.update_norms(
            counted_norm=norms[tokens.counted.to(norms.device)].sum(),
            masked_norm=norms[tokens.unwanted.to(norms.device)].sum(),
        )
        flat = tokens.row_of_token * tokens.counted.shape[1] + tokens.position_of_token
        counted = uploaded(flat, activation.device)
        inputs = inputs_for(self.sae, activation.flatten(0, 1).index_select(0, counted))
        along = {loss: grad.flatten(0, 1).index_select(0, counted).flatten(1) for loss, grad in gradients.items()}
        rows, positions = uploaded(tokens.row_of_token, self._device), uploaded(tokens.position_of_token, self._device)
        for start in range(0, len(inputs), self._encoder.chunk):
            chunk = slice(start, start + self._encoder.chunk)
            some = {loss: gradient[chunk] for loss, gradient in along.items()}
            yield from self._count(
                inputs[chunk], rows[chunk], positions[chunk], tokens, batch, statistics, open_documents, some
            )

    def _count(
        self,
        inputs: Tensor,
        rows: Tensor,
        positions: Tensor,
        tokens: CountedTokens,
        batch: int,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
        gradients: Mapping[str, Tensor],
    ) -> Iterator[tuple[Tensor, Written]]:
        device = self.sae.W_dec.device  # the model may run elsewhere
        inputs = inputs.to(device)
        gradients = {loss: gradient.to(device) for loss, gradient in gradients.items()}
        groups, documents = tokens.groups.to(self._device)[rows], tokens.documents.tolist()
        checked = tokens.checked(self._fvu_every).to(self._device)[rows]
        open_rows = open_documents.rows(documents)[rows]
        entries = self._count_latents(inputs, groups, open_rows, checked, batch, statistics, open_documents)
        self._decoder.settle(inputs)
        if gradients:
            refuse_unless_linear(self.hook, self._decoder.linear, target_hook(self.sae, self.hook) is not None)
        if self.accumulating:
            latents = LatentBatch(
                features=entries[1],
                tokens=entries[0],
                groups=groups[entries[0]],
                values=entries[2],
                activations=inputs,
                documents=tokens.documents.to(self._device)[rows],
                token_groups=groups,
                rows=rows,
                positions=positions,
                counted=tokens.counted,
                sae=self.sae,
                gradients=gradients,
                scale=self._decoder.scale,
            )
            for estimator in self.accumulating:
                accumulate(estimator, statistics.state, latents)
        if bool(checked.any()):
            targets = inputs[checked.to(inputs.device)]
            written = Written(self._decoder(entries, checked, targets, self._encoder.own_tokens), groups[checked])
            if not bool(written.reconstruction.sum(dtype=torch.float32).isfinite()):
                raise not_finite("written", self.hook, batch)
            yield targets, written

    def _count_latents(
        self,
        inputs: Tensor,
        groups: Tensor,
        open_rows: Tensor,
        checked: Tensor,
        batch: int,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
    ) -> Entries:
        """Count active latents, a few features at a time. Returns the active latents that are needed together: of all
        tokens if an estimator accumulates, otherwise of the tokens whose reconstruction is checked.
        """

        def count(part: Entries) -> Entries:
            tokens, features, values = (t.to(self._device) for t in part)
            values = values.double()
            if not bool(torch.isfinite(values.sum())):
                raise not_finite("latents", self.hook, batch)
            statistics.update_latents(features, values, groups[tokens])
            open_documents.mark(open_rows[tokens], features)
            if self.accumulating:
                return tokens, features, values
            few = torch.nonzero(checked[tokens]).view(-1)
            return tokens[few], features[few], values[few]

        return joined(self._encoder.each_part(inputs, count))


def refuse_unless_linear(hook: str, linear: bool | None, writes_elsewhere: bool = False) -> None:
    """Refuse a gradient along decoder vectors if the SAE does not write the sum of its decoder vectors at its own hook
    point.

    Args:
        hook: the hook point, by name.
        linear: whether the SAE adds up decoder vectors; None where that is not known yet.
        writes_elsewhere: whether it is a transcoder.

    Raises:
        DictionaryError: where it does not.
    """
    if linear is False or writes_elsewhere:
        what = "writes to another hook point" if writes_elsewhere else "does not write the sum of its decoder vectors"
        raise DictionaryError(
            f"the SAE at {hook} {what}, so the gradient of its latents is unknown: choose an importance estimator "
            "that needs no gradient"
        )
