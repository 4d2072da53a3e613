"""Behind an SAE: hook points counted while the model runs with an SAE's reconstruction in place of its activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tl_capacity.dictionaries.adapter import target_hook
from tl_capacity.models.carried import carried_saes
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.results.naming import LAYER


def reconstructed_before(model: Any, point: TapPoint) -> Iterator[str]:
    """The hook points before a given one at which the model carries an SAE without its error term."""
    for hook, sae in carried_saes(model).items():
        put_there = find_tap_point(model, target_hook(sae, hook) or hook).module
        if not getattr(put_there, "use_error_term", True) and put_there is not point.again().module:
            mine, theirs = LAYER.fullmatch(point.name), LAYER.fullmatch(hook)
            if mine is None or theirs is None or int(theirs[1]) <= int(mine[1]):
                yield hook


def behind_note(hook: str, reconstructed: Iterable[str]) -> str:
    """The note on a hook point that was counted behind SAEs."""
    return (
        f"{hook}: counted while the model ran with the reconstruction of the SAE at "
        f"{', '.join(sorted(reconstructed))}, without its error, so these figures are of the model with that "
        "reconstruction: for the model's own, add the SAE with use_error_term=True, or remove it with reset_saes()"
    )
