"""Sparse autoencoders, transcoders and bases: loaded by name, and encoded to their active latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.dictionaries.dictionary import Dictionary as Dictionary
    from tl_capacity.dictionaries.formats import read_sae_lens as read_sae_lens

__getattr__, __all__ = lazily(__name__, __file__)
