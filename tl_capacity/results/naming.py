"""Hook points by name: told apart where several SAEs were measured at one, and short where they stand in a figure."""

from __future__ import annotations

import re
from collections.abc import Callable

from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.suite import suites
from tl_capacity.results.hook import HookMeasurement

LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def middle(measurement: Measurement) -> HookMeasurement:
    """The hook point in the middle of those measured, from which predictions are made where none is asked for."""
    return measurement.hooks[len(measurement.hooks) // 2]


def short_hook(measurement: Measurement, hook: str) -> str:
    """`layer N` where all hook points are the same but for their layer, else the hook point's name."""
    found = [LAYER.fullmatch(h.hook) for h in measurement]
    kinds = {match[2] if match is not None else None for match in found}
    layer = LAYER.fullmatch(hook)
    return f"layer {layer[1]}" if layer is not None and kinds == {layer[2]} else hook


def hook_label(measurement: Measurement, hook: HookMeasurement) -> str:
    """The hook point's short name; where several SAEs were measured there with the SAE's, or that alone where it names
    the hook point.
    """
    short = short_hook(measurement, hook.hook)
    if sum(h.hook == hook.hook for h in measurement) == 1:
        return short
    return hook.sae if hook.hook in hook.sae else f"{short} · {hook.sae}"


def told_apart(measurement: Measurement) -> Callable[[HookMeasurement], str]:
    """Names a hook point, and the SAE as well where several were measured there."""
    several = {suite.hook for suite in suites(measurement)}

    def name(hook: HookMeasurement) -> str:
        if hook.hook not in several:
            return hook.hook
        return hook.sae if hook.hook in hook.sae else f"{hook.hook}, {hook.sae}"

    return name
