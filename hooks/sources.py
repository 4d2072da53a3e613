"""Token sources: text files, jsonl files and Parquet tables."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tl_capacity.errors import TokenSourceError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import TokenSource

TEXT_FIELDS = ("text", "content", "document")
_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}


class TextFile(TokenSource):
    """A `.txt` (or `.md`) file, plain or compressed (`.gz`, `.xz`). Blank lines separate paragraphs, which are joined
    to documents of some 2,000 characters.
    """

    name = "text file"
    summary = "PATH.txt|.md[.gz|.xz]: paragraphs, joined to passages"

    def matches(self, spec: str) -> bool:
        return file_suffix(spec) in (".txt", ".md", ".text")

    def documents(self, spec: str) -> Iterator[str]:
        passage: list[str] = []
        size = 0
        for line in _lines(spec):
            if line.strip():
                passage.append(line)
                size += len(line)
            if passage and size >= 2_000 and (not line.strip() or size >= 20_000):
                yield "".join(passage)
                passage, size = [], 0
        if passage:
            yield "".join(passage)


class JsonLines(TokenSource):
    """A `.jsonl` file, plain or compressed, with one object a line that has a `text` field."""

    name = "jsonl file"
    summary = 'PATH.jsonl[.gz|.xz]: one {"text": …} a line'

    def matches(self, spec: str) -> bool:
        return file_suffix(spec) in (".jsonl", ".ndjson")

    def documents(self, spec: str) -> Iterator[str | None]:
        for number, line in enumerate(_lines(spec), 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise TokenSourceError(
                    f"line {number} of {spec} is not JSON ({problem}): write one object a line"
                ) from problem
            yield text_of(content, f"line {number} of {spec}")


class Parquet(TokenSource):
    """A `.parquet` file with a `text` column, read in batches."""

    name = "parquet file"
    summary = "PATH.parquet: a column named text"

    def matches(self, spec: str) -> bool:
        return file_suffix(spec) == ".parquet"

    def documents(self, spec: str) -> Iterator[str | None]:
        import pyarrow
        import pyarrow.parquet

        _check_file(spec)
        try:
            table = pyarrow.parquet.ParquetFile(spec)
        except (pyarrow.ArrowException, OSError, ValueError) as problem:
            raise TokenSourceError(
                f"{spec} is not a Parquet file ({problem}): write it again, or choose another source"
            ) from problem
        field = next((name for name in TEXT_FIELDS if name in table.schema_arrow.names), None)
        if field is None:
            raise TokenSourceError(
                f"{spec} has the columns {', '.join(table.schema_arrow.names)} but none named "
                f"{', '.join(TEXT_FIELDS)}: rename one"
            )
        kind = table.schema_arrow.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise TokenSourceError(
                f"the column {field!r} of {spec} holds {kind}, not text: choose a table with a column of strings"
            )
        try:
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                yield from batch.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as problem:
            raise TokenSourceError(
                f"{spec} is damaged ({problem}): write it again, or choose another source"
            ) from problem


def file_suffix(spec: str) -> str:
    """The suffix that says what a file holds: `.jsonl` for `texts.jsonl.xz`."""
    path = Path(spec)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _OPENERS else path.suffix.lower()


def _check_file(spec: str) -> None:
    path = Path(spec)
    if not path.is_file():
        raise TokenSourceError(f"there is no file {spec}: check the path")
    if path.stat().st_size == 0:
        raise TokenSourceError(f"{spec} is empty: choose a source with text in it")


def _lines(spec: str) -> Iterator[str]:
    _check_file(spec)
    opened = _OPENERS.get(Path(spec).suffix.lower(), open)
    try:
        with opened(spec, "rt", encoding="utf-8-sig") as file:  # with a byte order mark or without
            for line in file:
                if "\0" in line:
                    raise TokenSourceError(f"{spec} holds binary data, not text: choose a UTF-8 text file")
                yield line
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError, OSError) as problem:
        raise TokenSourceError(
            f"{spec} cannot be read as UTF-8 text ({problem}): convert it, or choose another source"
        ) from problem


def text_of(content: Any, where: str) -> str | None:
    """The text of one row; None if its field is null.

    Raises:
        TokenSourceError: where none of its fields holds one.
    """
    if isinstance(content, dict):
        for field in TEXT_FIELDS:
            if isinstance(content.get(field), str):
                return str(content[field])
        if any(field in content and content[field] is None for field in TEXT_FIELDS):
            return None
    raise TokenSourceError(
        f"{where} has no text in a field named {', '.join(TEXT_FIELDS)}: rename the field that holds it"
    )


@hookimpl
def register_token_sources(register: Callable[[TokenSource], None]) -> None:
    for source in (TextFile(), JsonLines(), Parquet()):
        register(source)
