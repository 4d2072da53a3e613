"""Our hooks on a model's modules. A hook may replace what a module carries. Compiled graphs do not trace into it, and
copies of the model do not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Callback = TypeVar("Callback", bound=Callable[..., Any])
Change = Callable[[Tensor], Tensor | None]
"""A function that returns the replacement of an activation, or None to keep it."""


@dataclass(frozen=True)
class Hook:
    """A hook on a module. Calling it removes it and nothing else.

    Attributes:
        remove: takes it away; may be called twice.
        holds: whether nobody else has taken it away.
    """

    remove: Callable[[], None]
    holds: Callable[[], bool] = lambda: True

    def __call__(self) -> None:
        self.remove()


class ModelHook:
    """A hook for torch that does nothing in a copy of its model, or in a model that was saved and loaded."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # A compiled graph would trace through the bookkeeping; a graph break here costs less.
        self._function = untraced(function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything, does nothing, and is found where this package is not installed.
        return getattr, (nullcontext(), "__exit__")


def edit_hook_point(point: Any, change: Change) -> Hook:
    """Change what a hook point of TransformerLens carries. Returns a function that removes the hook.

    TransformerLens' `add_hook` wraps a hook in a local function, which cannot be pickled and which copies share.
    """
    from transformer_lens.hook_points import LensHandle

    def after(module: Any, _: Any, out: Tensor) -> Tensor | None:
        conversion = module.hook_conversion
        changed = change(out if conversion is None else conversion.convert(out))
        return changed if changed is None or conversion is None else conversion.revert(changed)

    # Permanent, because `reset_hooks` and the end of `run_with_hooks` drop every other kind.
    handle = LensHandle(point.register_forward_hook(ModelHook(after)), is_permanent=True)
    point.fwd_hooks.append(handle)

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]

    return Hook(remove, lambda: any(other is handle for other in point.fwd_hooks))


def edit_input(module: nn.Module, change: Change) -> Hook:
    """Change the first argument of a module. Returns a function that removes the hook."""

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        first = next(iter(kwargs)) if not args else None
        changed = change(args[0] if first is None else kwargs[first])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if first is None else (args, {**kwargs, first: changed})

    return Hook(module.register_forward_pre_hook(ModelHook(before), with_kwargs=True).remove)


def edit_output(module: nn.Module, change: Change) -> Hook:
    """Change what a module returns, or the first item of a tuple. Returns a function that removes the hook."""

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        changed = change(out[0] if isinstance(out, tuple) else out)
        return (changed, *out[1:]) if changed is not None and isinstance(out, tuple) else changed

    return Hook(module.register_forward_hook(ModelHook(after)).remove)


def untraced(function: Callback) -> Callback:
    """The same function, which a compiled graph does not trace into."""
    untraced: Callback = torch.compiler.disable(function)
    return untraced
