"""Calls: the token ids of each plain call of a model, read at its embedding. So it does not matter how the model is
called.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.measure.sequences import BLOCK_CACHE_ARGUMENT, CACHE_ARGUMENTS, Sequence, Sequences, cached_places
from tl_capacity.models.forward import embedding_of
from tl_capacity.models.hooks import ModelHook
from tl_capacity.text.streams import PADDING


@dataclass(frozen=True)
class Call:
    """The tokens, mask and cache of one plain call of a model.

    Attributes:
        tokens: int64 [row, position] token ids, `PADDING` where the attention mask says so.
        before: int64 [row] how many tokens of the row were given to earlier calls, whose keys and values are cached.
        documents: int64 [row] the documents of the rows where they go on with an earlier call's, else None.
        masked: whether an attention mask came with the tokens.
    """

    tokens: NDArray[np.int64]
    before: NDArray[np.int64]
    documents: NDArray[np.int64] | None
    masked: bool


class _Thread(threading.local):
    """What is known of a thread's current call: its mask and cache, token ids not yet turned into a call, the rows of
    the call before, and whether calls are watched.
    """

    mask: Any = None
    cache: Any = None
    waiting: NDArray[np.int64] | None = None
    before: NDArray[np.int64] | None = None
    watched = True


class Calls:
    """Watches a model's calls until it is removed.

    The embedding sees the token ids, whichever way they come. Only the model itself is given the attention mask and
    the cache; but `HookedTransformer.generate` goes past the hooks of the model itself, so that both are seen at its
    first block.
    """

    def __init__(self, model: Any, on_call: Callable[[Call], NDArray[np.int64] | None]) -> None:
        """
        Args:
            model: the model.
            on_call: is given each call, and returns the documents [row] that its rows are counted as; None where they
                are not.
        """
        self._on_call, self._sequences = on_call, Sequences()
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._thread, self._warned = _Thread(), False
        watched = [(model, self._see_options), (embedding_of(model), self._see_ids)]
        first_block = _block_with_cache(model)
        self._waits = first_block is not None
        if first_block is not None:
            watched.append((first_block, self._see_block))
        self._handles = [module.register_forward_pre_hook(ModelHook(see), with_kwargs=True) for module, see in watched]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch the calls that this thread makes inside the block."""
        self._thread.watched = False
        try:
            yield
        finally:
            self._thread.watched = True

    def remove(self) -> None:
        """Remove our hooks and no others."""
        for handle in self._handles:
            handle.remove()

    def _see_options(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        self._thread.mask = given.get("attention_mask")
        self._thread.cache = next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)

    def begin_waiting(self) -> None:
        """Begin the call whose token ids were seen, if it still waits for its cache."""
        if self._thread.waiting is not None:
            self._begin(self._thread.waiting)

    def _see_ids(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        ids = next((value for value in given if isinstance(value, Tensor) and not value.is_floating_point()), None)
        if ids is None or not self._thread.watched:
            return
        rows = ids.detach().cpu().numpy().astype(np.int64)
        if self._waits:
            self._thread.waiting = rows
        else:
            self._begin(rows)

    def _see_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread.waiting is not None:
            mask = kwargs.get("attention_mask")
            self._thread.mask = self._thread.mask if mask is None else mask
            self._thread.cache = kwargs.get(BLOCK_CACHE_ARGUMENT)
            self._begin(self._thread.waiting)

    def _begin(self, rows: NDArray[np.int64]) -> None:
        mask, cache = self._thread.mask, self._thread.cache
        # The next call may go past the model's own forward, and then has neither.
        self._thread.mask = self._thread.cache = self._thread.waiting = None
        present = _present(rows.shape, mask)
        if present is not None:
            rows[~present[:, -rows.shape[1] :]] = PADDING
        self._warn_of_repetition(rows, cache)
        earlier = self._sequences.continued(cache, len(rows))
        documents = None if earlier is None else earlier.documents
        if earlier is None:
            earlier = Sequence.unknown(cached_places(cache) or 0, rows, present)
        documents = self._on_call(Call(rows, earlier.tokens, documents, present is not None))
        if documents is not None:
            self._sequences.note(cache, earlier.with_more(rows != PADDING, documents))

    def _warn_of_repetition(self, rows: NDArray[np.int64], cache: Any) -> None:
        """Warn once if a call begins with all the tokens of the call before."""
        before, self._thread.before = self._thread.before, rows
        longer = before is not None and cache is None and rows.shape == (len(before), before.shape[1] + 1)
        if longer and not self._warned and bool((rows[:, :-1] == before).all()):
            self._warned = True
            warnings.warn(
                "a call of the model begins with all the tokens of the call before, and counts them again (generate "
                "without a cache?): use the cache, so that each token counts once",
                stacklevel=2,
            )


def _block_with_cache(model: Any) -> nn.Module | None:
    """The first block of a HookedTransformer. It receives its part of the cache."""
    first = next(iter(getattr(model, "blocks", None) or ()), None)
    takes = isinstance(first, nn.Module) and BLOCK_CACHE_ARGUMENT in inspect.signature(first.forward).parameters
    return first if takes else None


def _present(shape: tuple[int, ...], mask: Any) -> NDArray[np.bool_] | None:
    """Where an attention mask [row, position] says that there is a token; None without a mask for rows of this shape.

    Other kinds, such as one for each attention layer, say nothing of padding.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == shape[0] and mask.shape[1] >= shape[1]:
        return np.asarray(mask.numpy(force=True) != 0)
    return None
