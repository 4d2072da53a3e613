"""Watch: a hook that follows its hook point when the model gets another module there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_capacity.models.hook_points import TapPoint


class Watch:
    """Watches a place in a model, whatever module is put there."""

    def __init__(self, point: TapPoint, callback: Callable[[Tensor], None], differentiable: bool = False) -> None:
        self._point, self._callback, self._differentiable = point, callback, differentiable
        self._hook = point.watch(callback, differentiable)

    def follow(self) -> None:
        """Go where the place is now: `add_sae` and `reset_saes` put other modules there, and drop hooks.

        Raises:
            HookPointError: where the hook point is gone.
        """
        point = self._point.again()
        if point is not self._point or not self._hook.holds():
            self._hook.remove()
            self._point, self._hook = point, point.watch(self._callback, self._differentiable)

    def remove(self) -> None:
        """Take the hook away, and nobody else's."""
        self._hook.remove()
