"""Attachment: the hooks of one handle on its model. They are removed on request, or when nobody keeps the handle."""

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
        """Whether the hooks were removed."""
        return not self._take_away.alive

    def add(self, remove: Callable[[], None]) -> None:
        """Keep a function that removes a hook."""
        self._removers.append(remove)

    def watch(self, point: TapPoint, method: Callable[..., None], *first: Any, differentiable: bool = False) -> None:
        """Call a method of the handle with the arguments `first` and each activation of a hook point."""
        self._watches.append(Watch(point, partial(weakly(method), *first), differentiable))
        self.add(self._watches[-1].remove)

    def check(self) -> None:
        """Make each hook watch the module that the model has at its hook point now.

        Raises:
            CapacityError: where the hooks were taken away.
            HookPointError: where the model has a hook point no more.
        """
        if self.ended:
            raise CapacityError("these capacity hooks were removed: attach new ones with add_capacity_hooks")
        for watch in self._watches:
            watch.follow()

    def end(self) -> None:
        """Remove our hooks and no others. May be called twice."""
        if not self.ended:
            self._take_away()
            forget_graphs()


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that does not keep its object alive. Once the object is gone, it does nothing and returns None."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        still_there = reference()
        return None if still_there is None else still_there(*args)

    return call


def _call_each(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()
