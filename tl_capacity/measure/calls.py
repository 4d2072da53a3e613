"""Calls: the token ids of each plain call of a model, seen at its embedding however the model is called."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.models.forward import embedding_of
from tl_capacity.models.hooks import ModelHook
from tl_capacity.text.streams import PADDING


class _Thread(threading.local):
    """What is known of the call that a thread is in: its attention mask, and whether it is looked at."""

    mask: Any = None
    watched = True


class Calls:
    """Watches a model's calls until it is removed.

    The embedding sees the token ids, whichever way they come. Only the model itself is given the attention mask.
    """

    def __init__(self, model: Any, on_call: Callable[[NDArray[np.int64]], None]) -> None:
        """
        Args:
            model: the model.
            on_call: is given the ids [row, position] of each call, `PADDING` where its attention mask says so.
        """
        self._on_call = on_call
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._thread = _Thread()
        watched = ((model, self._see_mask), (embedding_of(model), self._see_ids))
        self._handles = [module.register_forward_pre_hook(ModelHook(see), with_kwargs=True) for module, see in watched]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls that this thread makes meanwhile are not looked at."""
        self._thread.watched = False
        try:
            yield
        finally:
            self._thread.watched = True

    def remove(self) -> None:
        """Take the hooks away again, and nobody else's."""
        for handle in self._handles:
            handle.remove()

    def _see_mask(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._thread.mask = {**dict(zip(self._parameters, args, strict=False)), **kwargs}.get("attention_mask")

    def _see_ids(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        ids = next((value for value in given if isinstance(value, Tensor) and not value.is_floating_point()), None)
        if ids is not None and self._thread.watched:
            mask = self._thread.mask
            self._thread.mask = None  # the next call may go past the model's own forward, and then has none
            self._on_call(_masked(ids.detach().cpu().numpy().astype(np.int64), mask))


def _masked(rows: NDArray[np.int64], mask: Any) -> NDArray[np.int64]:
    """The ids with `PADDING` where an attention mask says so."""
    # With a cache the mask is of the earlier tokens too. Other kinds, such as one for each attention layer, say nothing
    # of padding.
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == len(rows) and mask.shape[1] >= rows.shape[1]
    if fits:
        rows[mask[:, -rows.shape[1] :].numpy(force=True) == 0] = PADDING
    return rows
