"""Data sets of Hugging Face's, from a folder or the hub, a row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tl_capacity.errors import TokenSourceError
from tl_capacity.runtime.hub import hub_or_cache, reason_of


def load_dataset_rows(spec: str) -> Iterator[dict[str, Any]]:
    """Stream the rows of `spec`: a local folder of data files, or a `datasets` id `OWNER/NAME` or `OWNER/NAME/CONFIG`;
    `:SPLIT` chooses a split.

    Raises:
        TokenSourceError: where there is no such data set or split, or a file cannot be read.
    """
    import datasets

    name, split = spec, "train"
    if not Path(spec).is_dir() and ":" in spec:
        name, _, split = spec.rpartition(":")
    local = Path(name).is_dir()
    path, config = name, None
    if not local and name.count("/") == 2:
        path, _, config = name.rpartition("/")
    try:
        with hub_or_cache(needed=not local):
            rows = datasets.load_dataset(path, config, split=split or "train", streaming=True)
        yield from rows
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, datasets.exceptions.DatasetsError) as problem:
        raise TokenSourceError(
            f"the data set {spec!r} cannot be read ({reason_of(problem)}): check its name and its files, or pass a"
            " local file (.txt, .jsonl, .parquet), a folder of such files, or an embedded corpus"
        ) from problem
