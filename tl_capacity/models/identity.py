"""Identity: the name under which a measurement records a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Identity:
    """The model as a measurement records it.

    Attributes:
        name: name, folder or hub id.
        revision: its revision or a hash of its weights, where known.
    """

    name: str
    revision: str | None = None

    @classmethod
    def according_to(cls, model: Any) -> Identity:
        """The identity that a model's own configuration gives."""
        config = getattr(model, "cfg", None) or getattr(model, "config", None)
        name = getattr(config, "model_name", None) or getattr(config, "name_or_path", None) or type(model).__name__
        return cls(str(name), getattr(config, "_commit_hash", None))
