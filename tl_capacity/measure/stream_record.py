"""StreamRecord: what a measurement records of the text that it counted last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tl_capacity.measurement.provenance import Provenance
from tl_capacity.text.streams import TokenStream, source_of


@dataclass(frozen=True)
class StreamRecord:
    """What a measurement records of the text that it counted last."""

    source: str = Provenance.source
    shard: tuple[int, int] = (0, 1)
    settings: Mapping[str, Any] = field(default_factory=dict)
    begins_with_bos: bool | None = None
    context: int | None = None

    @classmethod
    def describing(cls, stream: Any, before: StreamRecord) -> StreamRecord:
        """The record of a stream. What token ids do not tell stays as it was."""
        if not isinstance(stream, TokenStream):
            return cls(source_of(stream), before.shard, before.settings)
        settings: dict[str, Any] = {"context": stream.context, "bos": stream.bos, "batch_rows": stream.batch_rows}
        if stream.special_tokens:
            settings["special_tokens"] = True
        if stream.share.launches:
            settings["launches"] = stream.share.to_json()
        bos, context = (stream.bos is not None, stream.context) if stream.is_text else (None, None)
        return cls(stream.name(), stream.shard, settings, bos, context)
