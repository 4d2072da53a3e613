"""Names of hook points: distinct where several SAEs were measured at one, and short in figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from tl_capacity.errors import CapacityError
from tl_capacity.results.hook import HookMeasurement

LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def middle(hooks: Iterable[HookMeasurement]) -> HookMeasurement:
    """The middle one of the measured hook points, from which predictions are made by default."""
    measured = tuple(hooks)
    return measured[len(measured) // 2]


def hook_named(hooks: Iterable[HookMeasurement], name: str) -> HookMeasurement:
    """The measurement at a hook point.

    Raises:
        CapacityError: where nothing was measured there, or several SAEs were: iterate to see each.
    """
    measured = tuple(hooks)
    there = [h for h in measured if h.hook == name]
    if not there:
        raise CapacityError(f"{name!r} was not measured: choose one of {', '.join(h.hook for h in measured)}")
    if len(there) > 1:
        raise CapacityError(
            f"{len(there)} SAEs were measured at {name!r} ({', '.join(h.sae for h in there)}): loop over the "
            "measurement and choose one"
        )
    return there[0]


def short_hook(hooks: Iterable[HookMeasurement], hook: str) -> str:
    """`layer N` if all hook points are the same except for their layer, else the hook point's name."""
    matches = [LAYER.fullmatch(h.hook) for h in hooks]
    kinds = {match[2] if match is not None else None for match in matches}
    layer = LAYER.fullmatch(hook)
    return f"layer {layer[1]}" if layer is not None and kinds == {layer[2]} else hook


def hook_label(hooks: Iterable[HookMeasurement], hook: HookMeasurement) -> str:
    """The hook point's short name. Where several SAEs were measured, the SAE's name is added, or stands alone if it
    names the hook point.
    """
    measured = tuple(hooks)
    short = short_hook(measured, hook.hook)
    if sum(h.hook == hook.hook for h in measured) == 1:
        return short
    return hook.sae if hook.hook in hook.sae else f"{short} · {hook.sae}"


def told_apart(hooks: Iterable[HookMeasurement]) -> Callable[[HookMeasurement], str]:
    """A function that names a hook point, with the SAE's name where several were measured there."""
    saes_at = Counter(h.hook for h in hooks)

    def name(hook: HookMeasurement) -> str:
        if saes_at[hook.hook] == 1:
            return hook.hook
        return hook.sae if hook.hook in hook.sae else f"{hook.hook}, {hook.sae}"

    return name


def places_told_apart(places: Iterable[tuple[str, str]]) -> Callable[[str, str], str]:
    """A function that names a hook point, with its SAE's name where several stand there.

    Args:
        places: hook point and SAE of whatever is shown, each as often as it likes.
    """
    saes_at = Counter(hook for hook, _ in set(places))

    def name(hook: str, sae: str) -> str:
        if saes_at[hook] <= 1:
            return hook
        return sae if hook in sae else f"{hook}, {sae}"

    return name
