"""Files: written completely or not at all, and checked when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.storage.files import write_json as write_json

__getattr__, __all__ = lazily(__name__, __file__)
