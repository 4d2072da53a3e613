"""Watch: a hook that stays at its hook point, even if the model gets another module there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_capacity.models.hook_points import TapPoint


class Watch:
    """Watches a place in a model, whichever module is there."""

    def __init__(self, point: TapPoint, callback: Callable[[Tensor], None], differentiable: bool = False) -> None:
        self._point, self._callback, self._differentiable = point, callback, differentiable
        self._hook = point.watch(callback, differentiable)

    def follow(self) -> None:
        """Move to the module that is at the place now. `add_sae` and `reset_saes` replace modules, and drop hooks.

        Raises:
            HookPointError: where the hook point is gone.
        """
        point = self._point.again()
        if point is not self._point or not self._hook.holds():
            self._hook.remove()
            self._point, self._hook = point, point.watch(self._callback, self._differentiable)

    def remove(self) -> None:
        """Remove this hook and no others."""
        self._hook.remove()
