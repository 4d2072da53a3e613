"""Sequences: which calls continue the rows of an earlier call, judged by the cache of keys and values that they are
given.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CACHE_ARGUMENTS = ("past_key_values", "past_kv_cache", "cache_params")
"""The names of the cache argument in Hugging Face's models, HookedTransformer and state-space models."""
BLOCK_CACHE_ARGUMENT = "past_kv_cache_entry"
"""The name that a block of HookedTransformer has for its part of the cache."""


@dataclass(frozen=True)
class Sequence:
    """The rows of one call, or of several calls that continue each other.

    Attributes:
        documents: int64 [row] the number of each row's document.
        tokens: int64 [row] how many tokens each row has so far.
        places: positions of the rows so far, padding included.
    """

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    places: int

    @classmethod
    def unknown(cls, places: int, rows: NDArray[np.int64], present: NDArray[np.bool_] | None) -> Sequence:
        """A sequence for a cache of unknown rows, followed by some more.

        Args:
            places: the positions that it holds.
            rows: [row, position] the ids that come next.
            present: [row, position] where an attention mask lets a token be; that of the earlier ones comes first.
        """
        tokens = np.full(len(rows), places, dtype=np.int64)
        if present is not None and present.shape[1] == places + rows.shape[1]:
            tokens = present[:, :places].sum(1)
        return cls(np.zeros(0, dtype=np.int64), tokens, places)

    def cut_to(self, places: int) -> Sequence:
        """The same rows, of which a cache has kept only the first positions. The dropped positions hold no padding."""
        return Sequence(self.documents, self.tokens - (self.places - places), places)

    def with_more(self, present: NDArray[np.bool_], documents: NDArray[np.int64]) -> Sequence:
        """The rows with more positions [row, position] appended. These may hold padding."""
        return Sequence(documents, self.tokens + present.sum(1), self.places + present.shape[1])


class _Latest(threading.local):
    sequence: Sequence | None = None


class Sequences:
    """The sequence that each cache belongs to. A new cache is matched to the thread's latest call if it has the rows
    and positions of that call.
    """

    def __init__(self) -> None:
        self._of_cache: dict[int, tuple[weakref.ref[Any], Sequence]] = {}
        self._latest = _Latest()

    def continued(self, cache: Any, rows: int) -> Sequence | None:
        """The sequence that a call with this cache continues; None if it begins a new one, or if the content of the
        cache is unknown.
        """
        places = cached_places(cache)
        if places == 0 or getattr(cache, "frozen", False):  # a frozen cache is a beginning that many texts share
            return None
        reference, sequence = self._of_cache.get(id(cache), (None, None))
        if reference is None or reference() is not cache or sequence is None:
            sequence = self._latest.sequence
            if sequence is None or places not in (None, sequence.places):
                return None
        if len(sequence.documents) != rows:
            return None
        return sequence if places is None else sequence.cut_to(places)

    def note(self, cache: Any, sequence: Sequence) -> None:
        """Remember what this thread has run last, and which sequence a cache now belongs to."""
        self._latest.sequence = sequence
        if cache is None or getattr(cache, "frozen", False):
            return
        key = id(cache)
        try:
            self._of_cache[key] = weakref.ref(cache, lambda _: self._of_cache.pop(key, None)), sequence
        except TypeError:  # a tuple of tensors, as older models give; the thread's latest call is what it is of
            return


def cached_places(cache: Any) -> int | None:
    """How many positions a cache of keys and values holds; None if it does not say, as with a state-space model's."""
    if cache is None:
        return 0
    try:
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        if hasattr(cache, "past_keys"):
            return int(cache.past_keys.shape[1])
        first = cache[0]
        return int(first.past_keys.shape[1] if hasattr(first, "past_keys") else first[0].shape[-2])
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    try:
        return None if cache.has_previous_state() else 0
    except (ValueError, TypeError, AttributeError):
        return None
