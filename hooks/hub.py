"""The token source of last resort: whatever the `datasets` library loads, by id or from a folder of data files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tl_capacity.hooks.sources import file_suffix, text_of

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import TokenSource

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+){0,2}(:[\w.-]+)?")
_OTHER_FILES = (
    ".bin",
    ".csv",
    ".doc",
    ".docx",
    ".gz",
    ".html",
    ".json",
    ".npy",
    ".pdf",
    ".pt",
    ".tsv",
    ".xml",
    ".xz",
    ".zip",
)


class HubDataset(TokenSource):
    """A `datasets` id, OWNER/NAME/CONFIG:SPLIT such as `NeelNanda/pile-10k` or `wikimedia/wikipedia/20231101.en:train`,
    or a local folder of data files.
    """

    name = "datasets id"
    summary = "OWNER/NAME[/CONFIG][:SPLIT] or a local datasets folder, streamed by the datasets library"

    def matches(self, spec: str) -> bool:
        # A file of a kind that no source reads is not sent to a hub as if it were an id.
        return (bool(spec.strip()) and Path(spec).is_dir()) or (
            _HUB_ID.fullmatch(spec) is not None and not Path(spec).exists() and file_suffix(spec) not in _OTHER_FILES
        )

    def documents(self, spec: str) -> Iterator[str | None]:
        from tl_capacity.text.datasets import load_dataset_rows

        for number, row in enumerate(load_dataset_rows(spec), 1):
            yield text_of(row, f"row {number} of {spec}")


@hookimpl(trylast=True)  # almost any word could be an id, so every other source is asked first
def register_token_sources(register: Callable[[TokenSource], None]) -> None:
    register(HubDataset())
