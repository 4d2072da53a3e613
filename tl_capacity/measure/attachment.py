"""Attachment: the hooks of one handle on its model, taken away when asked for, or when nobody keeps the handle."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.models.compiled import forget_graphs
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.models.watching import Watch


class Attachment:
    """The hooks of one handle on its model.

    The model keeps its hooks, and these keep no handle. So a handle that is dropped takes its hooks with it.
    """

    def __init__(self, handle: Any) -> None:
        self._removers: list[Callable[[], None]] = []
        self._watches: list[Watch] = []
        self._take_away = weakref.finalize(handle, _call_each, self._removers)
        self._take_away.atexit = False
        forget_graphs()

    @property
    def ended(self) -> bool:
        """Whether the hooks were taken away."""
        return not self._take_away.alive

    def add(self, remove: Callable[[], None]) -> None:
        """Keep what takes a hook away, for later."""
        self._removers.append(remove)

    def watch(self, point: TapPoint, method: Callable[..., None], *first: Any, differentiable: bool = False) -> None:
        """Call a method of the handle with what comes first, and each activation of a hook point."""
        self._watches.append(Watch(point, partial(weakly(method), *first), differentiable))
        self.add(self._watches[-1].remove)

    def check(self) -> None:
        """Watch each hook point where the model has it now.

        Raises:
            CapacityError: where the hooks were taken away.
            HookPointError: where the model has a hook point no more.
        """
        if self.ended:
            raise CapacityError("these capacity hooks were removed: attach new ones with add_capacity_hooks")
        for watch in self._watches:
            watch.follow()

    def end(self) -> None:
        """Take the hooks away, and nobody else's. May be called twice."""
        if not self.ended:
            self._take_away()
            forget_graphs()


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that does nothing and gives None once its object is gone, and does not keep it."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        still_there = reference()
        return None if still_there is None else still_there(*args)

    return call


def _call_each(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()
