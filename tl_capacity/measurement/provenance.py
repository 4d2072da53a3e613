"""Provenance: the model, text, settings and versions that a measurement was made with."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SAME_RUN = ("model", "revision", "dtype", "source", "shards", "shard_count", "settings")
"""Fields in which two provenances of one run agree, in the order in which a difference is reported."""


class Difference(NamedTuple):
    """A field in which two provenances differ, and both values."""

    name: str
    mine: Any
    theirs: Any


@dataclass(frozen=True)
class Provenance:
    """What a measurement was made of.

    Attributes:
        model: name, folder or hub id of the model.
        revision: its revision or a hash of its weights, where known.
        dtype: of the forward pass.
        source: the token source as given.
        shards, shard_count: it has the documents whose number modulo `shard_count` is one of `shards`.
        cursor: rows of the stream that were consumed.
        tokens_digest: a running hash of those rows; two measurements with the same one saw the same tokens.
        settings: context, BOS, masked ids and positions, the share of documents on which the FVU was checked;
            `processing`, by hook point, where activations are those of a processed model.
        versions: of the libraries.
        seconds: what it cost, in wall-clock seconds.
    """

    model: str = "unnamed model"
    revision: str | None = None
    dtype: str = "float32"
    source: str = "activations seen in a session"
    shards: tuple[int, ...] = (0,)
    shard_count: int = 1
    cursor: int = 0
    tokens_digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def difference(self, other: Provenance, may_differ: Container[str] = ()) -> Difference | None:
        """The first field in which this run differs from another; None if they are the same run.

        Args:
            may_differ: names of fields that do not matter, such as the shards where shards are joined.
        """
        for name in SAME_RUN:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name not in may_differ and mine != theirs:
                return Difference(name, mine, theirs)
        return None


def typed_field(saved: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a saved mapping, checked to exist and to have its type."""
    if not isinstance(saved[name], kind) or (
        name in ("width", "d_model") and saved[name] is not None and saved[name] < 1
    ):
        raise TypeError(f"{name} = {saved[name]!r}")
    return saved[name]


def provenance_from_json(saved: Mapping[str, Any]) -> Provenance:
    """The provenance that `asdict` wrote. Further fields from earlier versions are ignored."""
    kinds: dict[str, Any] = {"revision": (str, type(None)), "shards": list, "seconds": (int, float)}
    content = {
        name: typed_field(saved, name, kinds.get(name, type(default))) for name, default in vars(Provenance()).items()
    }
    shards, count = content["shards"], content["shard_count"]
    if not shards or not all(isinstance(shard, int) and 0 <= shard < count for shard in shards):
        raise ValueError(f"shards = {shards} of {count}")
    return Provenance(**{**content, "shards": tuple(shards), "seconds": float(content["seconds"])})
