"""Rows: how the training text of a dictionary was cut into rows, as SAELens' metadata says. From it follow the defaults
for several dictionaries, and notes on differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tl_capacity.dictionaries.adapter import metadata_of
from tl_capacity.errors import DictionaryError
from tl_capacity.text.counting import EVERY_POSITION, Positions


@dataclass(frozen=True)
class TrainedRows:
    """The rows that a dictionary was trained on. A field is None if the metadata does not say.

    Attributes:
        prepend_bos: whether rows began with BOS.
        context: positions in a row.
        positions: of these, the ones whose activations it saw.
        dataset: where the text was from.
    """

    prepend_bos: bool | None
    context: int | None
    positions: Positions
    dataset: str | None

    @classmethod
    def of(cls, sae: Any) -> TrainedRows:
        """The rows that a dictionary's metadata describes.

        Raises:
            DictionaryError: where it names positions that no row has.
        """
        bos, dataset = metadata_of(sae, "prepend_bos"), metadata_of(sae, "dataset_path")
        context = int(metadata_of(sae, "context_size") or 0) or None
        return cls(
            bos if isinstance(bos, bool) else None,
            context,
            positions_in(metadata_of(sae, "seqpos_slice"), context),
            dataset if isinstance(dataset, str) and dataset else None,
        )


def positions_in(seqpos_slice: Any, context: int | None) -> Positions:
    """The positions that SAELens' `seqpos_slice` selects in rows of a given length.

    Raises:
        DictionaryError: where it is no slice, or takes none.
    """
    if seqpos_slice is None:
        return EVERY_POSITION
    try:
        # Without a context nothing says where a row ends, from which negative numbers count.
        meant = slice(*seqpos_slice)
        taken = range(context or 2**31)[meant]
    except (TypeError, ValueError) as problem:
        raise DictionaryError(
            f"seqpos_slice = {seqpos_slice!r} in an SAE's metadata is not a slice of positions: write it as [first, "
            "last] or null"
        ) from problem
    if len(taken) == 0 or taken.step < 0:
        raise DictionaryError(
            f"seqpos_slice = {seqpos_slice!r} in an SAE's metadata selects none of {context or 'any'} positions: "
            "write it as [first, last] or null"
        )
    ends = meant.stop is not None and (context is not None or meant.stop >= 0)
    return Positions(taken.start, taken.stop if ends else None, taken.step)


def default_bos(saes: Sequence[Any]) -> bool:
    """Whether rows begin with BOS by default: as in the dictionaries' own training. If they disagree or do not say,
    rows begin with BOS, as in TransformerLens.
    """
    return {bos for sae in saes if (bos := TrainedRows.of(sae).prepend_bos) is not None} != {False}


def counted_positions(skip_first: int | None, saes: Sequence[Any]) -> Positions:
    """The positions that count. Either the given number of first positions is skipped, or by default the positions that
    every dictionary was trained on count.
    """
    if skip_first is not None:
        return Positions(skip_first)
    each = [TrainedRows.of(sae).positions for sae in saes]
    stops = [positions.stop for positions in each if positions.stop is not None]
    same = len({(positions.first, positions.step) for positions in each}) == 1
    return Positions(max((p.first for p in each), default=0), min(stops, default=None), each[0].step if same else 1)


def advised_source(saes: Sequence[Any]) -> str:
    """The end of a sentence that asks for a source: the text that the dictionaries were trained on. Empty
    if none says.
    """
    own = dict.fromkeys(dataset for sae in saes if (dataset := TrainedRows.of(sae).dataset))
    return f"; the SAEs were trained on {', '.join(f'--source {dataset}' for dataset in own)}" if own else ""


def rows_differ(
    sae: Any, hook: str, begins_with_bos: bool | None, context: int | None, counted: Positions
) -> Iterator[str]:
    """How rows differ from those that a dictionary was trained on, one sentence for each difference.

    Args:
        begins_with_bos, context: of the rows; None where that is not known.
        counted: positions that count.
    """
    own = TrainedRows.of(sae)
    if None not in (own.prepend_bos, begins_with_bos) and own.prepend_bos != begins_with_bos:
        theirs, ours = ("that begin with BOS", "do not") if own.prepend_bos else ("without BOS", "begin with it")
        yield f"{hook}: the SAE's metadata says that it was trained on rows {theirs}, and these {ours}"
    if own.context is not None and context is not None and context > own.context:
        yield (
            f"{hook}: the SAE's metadata says that it was trained on rows of {own.context:,} positions, and these have "
            f"{context:,}"
        )
    if not counted.are_among(own.positions):
        yield (
            f"{hook}: the SAE's metadata says that it was trained on {own.positions} of each row, and others are "
            "counted here"
        )
