"""Data sets from a folder or the Hugging Face hub, one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_capacity.errors import SourceCutOffError, TokenSourceError
from tl_capacity.runtime.hub import hub_or_cache, reason_of

READS = 2
"""How often a part of a stream is requested."""


def load_dataset_rows(spec: str) -> Iterator[dict[str, Any]]:
    """The rows of `spec`, streamed. `spec` is a local folder of data files, or a `datasets` id `OWNER/NAME` or
    `OWNER/NAME/CONFIG`; `:SPLIT` chooses a split.

    Raises:
        TokenSourceError: where there is no such data set or split, or a file cannot be read.
        SourceCutOffError: where a stream stops after its first rows.
    """
    import datasets

    name, split = spec, "train"
    if not Path(spec).is_dir() and ":" in spec:
        name, _, split = spec.rpartition(":")
    local = Path(name).is_dir()
    path, config = name, None
    if not local and name.count("/") == 2:
        path, _, config = name.rpartition("/")
    seen = 0
    try:
        with hub_or_cache(needed=not local):
            rows = datasets.load_dataset(path, config, split=split or "train", streaming=True)
        with _fewer_retries():
            for row in rows:
                seen += 1
                yield row
    except Exception as problem:  # libraries of files, tables and networks, each with classes of its own
        if seen and not local:
            raise SourceCutOffError(
                f"the data set {spec!r} was cut off after {seen:,} rows ({_deepest(problem)}): when the network is "
                "back, run the same command again, measure with --resume"
            ) from problem
        raise TokenSourceError(
            f"the data set {spec!r} cannot be read ({reason_of(problem)}): check its name and its files, or pass a"
            " local file (.txt, .jsonl, .parquet), a folder of such files, or an embedded corpus"
        ) from problem


@contextmanager
def _fewer_retries() -> Iterator[None]:
    """Read again only once if a stream is cut off. The hub's client has then tried six times itself, and `datasets`
    would go on for half an hour.
    """
    import datasets

    before = datasets.config.STREAMING_READ_MAX_RETRIES
    datasets.config.STREAMING_READ_MAX_RETRIES = READS
    try:
        yield
    finally:
        datasets.config.STREAMING_READ_MAX_RETRIES = before


def _deepest(problem: BaseException) -> str:
    """The first cause in a chain of exceptions."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return reason_of(problem)
