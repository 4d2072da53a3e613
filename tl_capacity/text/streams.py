"""Token streams: documents cut into rows of one length, each row from one document. The order depends only on the
source.

A row is `[BOS, tokens…]`, padded at the end; teacher, students and SAE see exactly these tokens. A shard takes every
n-th document.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import NothingToReadError, TokenSourceError, plugin_code
from tl_capacity.interfaces import TokenSource
from tl_capacity.plugins import plugins
from tl_capacity.text.shares import Share
from tl_capacity.text.tokenizing import bos_of, tokens_of_each, without_nulls

Item = TypeVar("Item")

PADDING = -1
"""Marks a padded place in `TokenBatch.tokens` until the tokens go to a model."""


SEVERAL = 3
"""This many equal ids at an end of a row may be padding."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, each from one document.

    Attributes:
        tokens: int64 [row, position] token ids; `PADDING` where the row has ended.
        documents: int64 [row] number of the document that each row is from; rows of one document are neighbours.
        before: int64 [row] tokens of the row that came in an earlier batch, as where a text is generated token by
            token; None for whole rows.
    """

    tokens: NDArray[np.int64]
    documents: NDArray[np.int64]
    before: NDArray[np.int64] | None = None

    @property
    def present(self) -> NDArray[np.bool_]:
        """[row, position] whether there is a token, and not padding."""
        return np.asarray(self.tokens != PADDING)

    @property
    def ids(self) -> NDArray[np.int64]:
        """[token] the ids of all tokens, without padding."""
        return self.tokens[self.present]

    def padded_at_the_end(self) -> TokenBatch:
        """The same rows, moved so that each begins at the first position.

        Padding in front of a row or inside it would be attended to, or would have to be masked in every model's own
        way. Behind a row, nothing depends on it.
        """
        padding = ~self.present
        if not (padding[:, :-1] & ~padding[:, 1:]).any():
            return self
        order = np.argsort(padding, axis=1, kind="stable")
        longest = max(1, int((~padding).sum(1).max()))
        return replace(self, tokens=np.take_along_axis(self.tokens, order, axis=1)[:, :longest])

    def filled(self, filler: int) -> NDArray[np.int64]:
        """[row, position] the ids as a model takes them, with a filler in place of padding."""
        return np.where(self.present, self.tokens, filler)


@dataclass(frozen=True)
class TokenStream:
    """A repeatable stream of token batches.

    Attributes:
        source: what the documents are read from: a specification for a registered token source, the texts themselves,
            or rows of token ids [row, position], of which longer ones are cut as texts are.
        tokenizer: a Hugging Face tokenizer; not needed for rows of token ids.
        context: positions in a row, BOS included.
        batch_rows: rows in a batch.
        prepend_bos: begin each row with the tokenizer's BOS, or its EOS where it has no BOS, as TransformerLens does; a
            row that begins with it already gets no second.
        shard: `(index, of)`: take the documents whose number is `index` modulo `of`.
        special_tokens: read a special token that is spelled in a text, such as `<|endoftext|>`, as that token; by
            default text is text.
        share: of these documents, what one of several processes reads of what earlier launches have left.
    """

    source: str | Sequence[str | None] | NDArray[np.int64]
    tokenizer: Any = None
    context: int = 256
    batch_rows: int = 8
    prepend_bos: bool = True
    shard: tuple[int, int] = (0, 1)
    special_tokens: bool = False
    share: Share = Share()

    def __post_init__(self) -> None:
        if self.context < 2 or self.batch_rows < 1:
            raise TokenSourceError(
                f"context = {self.context} and batch_rows = {self.batch_rows} hold no token to predict: use at least "
                "2 positions and 1 row"
            )
        index, of = self.shard
        if not 0 <= index < of:
            raise TokenSourceError(f"shard {index} of {of} does not exist: choose an index from 0 to {of - 1}")
        if isinstance(self.source, np.ndarray) and (self.source.ndim != 2 or self.source.dtype.kind not in "iu"):
            raise TokenSourceError(
                "rows of token ids are whole numbers [row, position], not"
                f" {self.source.dtype}{list(self.source.shape)}: pass such an array, or texts"
            )
        if not isinstance(self.source, np.ndarray) and self.tokenizer is None:
            raise TokenSourceError("a stream of text needs a tokenizer: pass the model's, or rows of token ids")

    @property
    def bos(self) -> int | None:
        """The id that begins each row, or None."""
        return bos_of(self.tokenizer) if self.prepend_bos else None

    @property
    def is_text(self) -> bool:
        """Whether rows are made from text here, and not given as token ids."""
        return not isinstance(self.source, np.ndarray)

    def name(self) -> str:
        """What the stream reads, as a measurement records it."""
        if isinstance(self.source, str):
            return self.source
        return (
            f"{len(self.source):,} {'rows of token ids' if isinstance(self.source, np.ndarray) else 'texts'} given in a"
            " session"
        )

    def __iter__(self) -> Iterator[TokenBatch]:
        """The batches, the same each time.

        Raises:
            TokenSourceError: where the source is missing or unreadable.
            NothingToReadError: where it is empty.
        """
        rows, empty = self._rows(), True
        while batch := list(islice(rows, self.batch_rows)):
            empty = False
            tokens = np.full((len(batch), max(len(ids) for _, ids in batch)), PADDING, dtype=np.int64)
            for row, (_, ids) in enumerate(batch):
                tokens[row, : len(ids)] = ids
            yield TokenBatch(tokens, np.array([document for document, _ in batch], dtype=np.int64))
        if empty:
            raise NothingToReadError(f"{self.name()} yields no tokens: it is empty, or this shard has no document")

    def _rows(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """`(document number, ids)` of each row."""
        if isinstance(self.source, np.ndarray):
            for number, done, ids in self.share(self._of_shard(self.source)):
                for start in range(done * self.context, len(ids), self.context):
                    yield number, ids[start : start + self.context].astype(np.int64)
            return
        numbered = (((number, done), text) for number, done, text in self.share(self._of_shard(self._texts())))
        for (number, done), pieces in tokens_of_each(self.tokenizer, numbered, self.special_tokens):
            for ids in islice(self._cut(pieces), done, None):
                yield number, ids

    def _of_shard(self, documents: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """The numbered documents of the shard."""
        index, of = self.shard
        return ((number, document) for number, document in enumerate(documents) if number % of == index)

    def _cut(self, pieces: Iterable[list[int]]) -> Iterator[NDArray[np.int64]]:
        """The rows of one document, from its ids piece by piece."""
        bos = [] if self.bos is None else [self.bos]
        body, rest = self.context - len(bos), list[int]()
        for ids in pieces:
            rest += ids
            whole = len(rest) // body * body
            for start in range(0, whole, body):
                yield _begun_with(bos, rest[start : start + body])
            rest = rest[whole:]
        if rest:
            yield _begun_with(bos, rest)

    def _texts(self) -> Iterable[str]:
        if isinstance(self.source, str):
            return documents(self.source)
        return without_nulls(self.source, "the stream", self.name())


def _begun_with(bos: list[int], ids: list[int]) -> NDArray[np.int64]:
    """A row that begins with BOS exactly once."""
    return np.array(ids if ids[:1] == bos else bos + ids, dtype=np.int64)


def documents(spec: str) -> Iterator[str]:
    """The documents of a source, read by the first registered token source that knows `spec`.

    Raises:
        TokenSourceError: where no source knows it, or its source cannot read it.
        PluginError: where the source itself fails.
    """
    for source in plugins().token_sources:
        with plugin_code("token source", source.name, source.matches):
            knows = source.matches(spec)
        if knows:
            return _documents_of(source, spec)
    known = ", ".join(s.name for s in plugins().token_sources)
    raise TokenSourceError(
        f"no token source knows {spec!r}: pass a file (txt, jsonl, parquet), a `datasets` id, or an embedded corpus"
        f" (sources: {known})"
    )


def _documents_of(source: TokenSource, spec: str) -> Iterator[str]:
    with plugin_code("token source", source.name, source):
        yield from without_nulls(source.documents(spec), f"the token source {source.name!r}", spec)


def source_of(stream: Any) -> str:
    """What a stream reads, as a measurement records it."""
    return stream.name() if isinstance(stream, TokenStream) else "token ids given in a session"


@dataclass(frozen=True)
class Fillers:
    """Ids that may be padding if no attention mask says so.

    Attributes:
        before: ids that matter in front of a row, such as every special one: the model attends to them.
        behind: ids that matter behind it: those that are counted, or that students learn to predict.
    """

    before: Sequence[int] = ()
    behind: Sequence[int] = ()

    def assumption(self, tokens: NDArray[np.int64]) -> str | None:
        """What is assumed about rows [row, position] that begin or end with at least three of one of these ids; None if
        no row does. Two occur in packed text, where EOS follows a row's BOS.
        """
        for ids, at_once, where, effect in (
            (self.before, tokens, "begins", "the model attends to them"),
            (self.behind, tokens[:, ::-1], "ends", "they count like others"),
        ):
            text = ~np.isin(at_once, (*ids, PADDING))
            first = at_once[:, :1]
            several = text.any(1) & np.isin(first[:, 0], ids) & (at_once[:, 1:SEVERAL] == first).all(1)
            if several.any():
                row = at_once[int(np.argmax(several))]
                return (
                    f"a row {where} with {int(np.argmax(row != row[0]))} tokens of id {row[0]}, and no attention "
                    f"mask came with it: they are read as text, so {effect}; if they are padding, pass "
                    "{'input_ids': …, 'attention_mask': …}"
                )
        return None


def as_batches(stream: Any, first_document: int = 0, fillers: Fillers | None = None) -> Iterator[TokenBatch]:
    """Batches of a `TokenStream`, or of whatever a notebook has at hand: a tensor of rows, a `datasets.Dataset`, an
    iterable of tensors or of `{"input_ids": …}`.

    Where rows come without document numbers, each row counts as a document of its own, numbered from `first_document`.
    Rows that an attention mask pads on the left begin at the first position here, so that a model without the mask does
    with them what it does with the tokens alone. Rows without a mask that seem to be padded with one of the `fillers`
    are warned of once.

    Raises:
        TokenSourceError: where something else than token ids comes, or nothing.
    """
    seen = 0
    for item in _items(stream):
        batch = item if isinstance(item, TokenBatch) else _batch(item, first_document + seen)
        told = fillers is None or isinstance(item, TokenBatch) or _has_mask(item)
        if not told and fillers is not None and (assumption := fillers.assumption(batch.tokens)):
            warnings.warn(assumption, stacklevel=2)
            fillers = None
        if batch.tokens.size == 0:
            continue
        seen += len(batch.tokens)
        yield batch.padded_at_the_end()
    if seen == 0:
        raise NothingToReadError("the stream yields no batch: pass tokens of shape [row, position]")


def _items(stream: Any) -> Iterable[Any]:
    if hasattr(stream, "column_names"):  # a data set of Hugging Face's, which has a shape too
        return stream.iter(batch_size=8)  # type: ignore[no-any-return]
    if hasattr(stream, "shape") or isinstance(stream, (Mapping, TokenBatch)):
        return [stream]
    if isinstance(stream, str) or not isinstance(stream, Iterable):
        raise TokenSourceError(
            f"{type(stream).__name__} is not a stream of tokens: pass a TokenStream, or tokens of shape [row, position]"
        )
    return stream


def _has_mask(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("attention_mask") is not None


def _batch(item: Any, first_document: int) -> TokenBatch:
    if isinstance(item, Mapping) and "input_ids" not in item:
        raise TokenSourceError(
            f"a batch has the fields {', '.join(map(str, item))} and no input_ids: tokenise the text first, or pass a"
            " TokenStream"
        )
    tokens = _rows(item["input_ids"] if isinstance(item, Mapping) else item)
    attention = item.get("attention_mask") if isinstance(item, Mapping) else None
    if attention is not None:
        mask = _rows(attention)
        if mask.shape != tokens.shape:
            raise TokenSourceError(
                f"input_ids have shape {list(tokens.shape)} and attention_mask {list(mask.shape)}: pass one mask value"
                " per token"
            )
        tokens[mask == 0] = PADDING
    return TokenBatch(tokens, np.arange(first_document, first_document + len(tokens), dtype=np.int64))


def _rows(values: Any) -> NDArray[np.int64]:
    """Whole numbers [row, position] from one row or several, shorter ones padded. Always a copy."""
    try:
        several = isinstance(values, (list, tuple)) and any(hasattr(row, "__len__") for row in values)
        rows = [_numpy(row) for row in values] if several else []
        if len({row.shape for row in rows}) > 1 and all(row.ndim == 1 for row in rows):
            width = max(map(len, rows))
            rows = [np.pad(row, (0, width - len(row)), constant_values=PADDING) for row in rows]
        array = np.stack(rows) if several else _numpy(values)
    except (TypeError, ValueError) as problem:
        raise TokenSourceError(
            f"a batch holds no token ids ({problem}): tokenise the text first, or pass a TokenStream"
        ) from problem
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise TokenSourceError(
            f"a batch of tokens is {array.dtype}{list(array.shape)}, not whole numbers of shape [row, position]: "
            "pass token ids"
        )
    return array.astype(np.int64)


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)
