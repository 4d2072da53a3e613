"""Counting on an accelerator: the host decides everything from the tokens alone, so it never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_capacity.dictionaries.adapter import inputs_for
from tl_capacity.dictionaries.decoding import Decoder
from tl_capacity.dictionaries.dense import BlockLatents, DenseEncoder, LargestLatents
from tl_capacity.dictionaries.encoding import Encoder
from tl_capacity.measure.documents import OpenDocuments
from tl_capacity.measure.finite import FirstBad
from tl_capacity.measure.layout import Layout
from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.measure.written import Written


class DeviceCounting:
    """Adds one SAE's latents to sums on the SAE's device.

    Attributes:
        first_bad: the first batch in which something was not finite.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, first_bad: FirstBad) -> None:
        self._dense, self._decoder, self.first_bad = DenseEncoder(encoder), decoder, first_bad

    def count(
        self,
        activation: Tensor,
        layout: Layout,
        batch: int,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
    ) -> Written | None:
        """Count the activations [row, position, ...] of one batch. Returns what the SAE wrote for the checked tokens.

        Args:
            activation: on the device of the sums.
            layout: of its tokens.
            batch: its number.
            statistics: the sums.
            open_documents: where the documents are open.
        """
        self._count_norms(activation, layout, batch, statistics)
        sae = self._dense.sae
        inputs = inputs_for(sae, activation.flatten(0, 1).index_select(0, layout.token))
        if not len(inputs):
            return None
        rows = open_documents.rows(layout.documents)
        chunk = max(1, self._dense.chunk(inputs) // layout.length)
        written: list[Tensor] = []
        for start in range(0, layout.pieces, chunk):
            stop = min(start + chunk, layout.pieces)
            places = slice(start * layout.length, stop * layout.length)
            checked = max(0, min(layout.checked, stop) - start) * layout.length
            empty = slice(int(layout.padding_before[start]), int(layout.padding_before[stop]))
            padding = layout.padding[empty] - places.start
            reconstruction = self._count_chunk(
                inputs[places],
                padding,
                layout,
                layout.document[start:stop],
                checked,
                rows,
                batch,
                statistics,
                open_documents,
            )
            if reconstruction is not None:
                written.append(reconstruction)
        if not written:
            return None
        reconstruction = torch.cat(written).index_select(0, layout.checked_place)
        self.first_bad.note("written", ~reconstruction.sum(dtype=torch.float32).isfinite(), batch)
        return Written(reconstruction, layout.checked_group, layout)

    def _count_norms(self, activation: Tensor, layout: Layout, batch: int, statistics: FeatureStatistics) -> None:
        vectors = activation.flatten(2)
        norms = vectors.float().square().sum(-1).double()
        statistics.update_norms(
            torch.where(layout.kind == 1, norms, 0.0).sum(), torch.where(layout.kind == 2, norms, 0.0).sum()
        )
        # What stands at padding is no part of the text.
        bad = ~vectors.sum(-1, dtype=torch.float32).isfinite() & (layout.kind > 0)
        self.first_bad.note("activations", bad.any(), batch)

    def _count_chunk(
        self,
        inputs: Tensor,
        padding: Tensor,
        layout: Layout,
        document: Tensor,
        checked: int,
        rows: Tensor,
        batch: int,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
    ) -> Tensor | None:
        """Count some pieces. Returns what the SAE writes for the first `checked` places, if there are any."""
        self._decoder.settle(inputs)
        adding_up = self._decoder.adding_up(checked) if checked and self._decoder.linear else None
        for part in self._dense.parts(inputs, padding, layout.length, checked):
            if isinstance(part, LargestLatents):
                sums = self._add_largest(part, layout, document, rows, statistics, open_documents)
                if adding_up is not None:
                    adding_up.add_largest(part.features[:checked], part.values[:checked])
            else:
                sums = self._add_block(part, layout, document, rows, statistics, open_documents)
                if adding_up is not None:
                    adding_up.add_block(part.features, part.checked)
            self.first_bad.note("latents", ~sums.isfinite(), batch)
        if not checked:
            return None
        return self._decoder.directly(inputs[:checked]) if adding_up is None else adding_up.written(inputs[:checked])

    def _add_block(
        self,
        part: BlockLatents,
        layout: Layout,
        document: Tensor,
        rows: Tensor,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
    ) -> Tensor:
        """Add the sums of pieces. Returns their total, which is finite only if all of them are."""
        groups, some = layout.groups.index_select(0, document), part.features
        counts = part.sums.counts
        by_document = counts.new_zeros(len(layout.documents), counts.shape[1]).index_add_(0, document, counts)
        open_documents.mark_block(rows, some, by_document > 0)
        statistics.counts[:, some].index_add_(0, layout.groups, by_document)
        sums, squares = part.sums.sums.double(), part.sums.squares.double()
        statistics.sums[:, some].index_add_(0, groups, sums)
        statistics.squares[:, some].index_add_(0, groups, squares)
        return sums.sum() + squares.sum()

    def _add_largest(
        self,
        part: LargestLatents,
        layout: Layout,
        document: Tensor,
        rows: Tensor,
        statistics: FeatureStatistics,
        open_documents: OpenDocuments,
    ) -> Tensor:
        documents = document.repeat_interleave(layout.length, output_size=len(document) * layout.length)
        values = part.values.double()
        statistics.update_latents(
            part.features.flatten(),
            values.flatten(),
            layout.groups[documents, None].expand_as(part.features).flatten(),
            part.active.flatten(),
        )
        open_documents.mark_where(rows[documents, None].expand_as(part.features), part.features, part.active)
        return values.sum() + values.square().sum()


def checked_target(activation: Tensor, layout: Layout) -> Tensor:
    """The values at the checked tokens [token, ...] of an activation [row, position, ...], which may be on another
    device.
    """
    return activation.flatten(0, 1).index_select(0, layout.checked_token.to(activation.device))
