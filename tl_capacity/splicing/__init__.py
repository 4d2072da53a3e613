"""Splicing: what a teacher loses, in nats, when only some features of a dictionary pass one of its hook points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.splicing.splice import splice as splice

__getattr__, __all__ = lazily(__name__, __file__)
