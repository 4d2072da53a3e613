"""Reading: the hook point of the model at hand that carries what a dictionary was trained on, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tl_capacity.dictionaries.adapter import metadata_of, read_hook, target_hook
from tl_capacity.dictionaries.tensors import tensor_notes
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.models.processing import CHANGED, changes, ignores_the_mean, is_centred, normalises_after

OTHER_WEIGHTS = ("revision", "checkpoint_index", "checkpoint_value", "checkpoint_label")
"""Keywords of SAELens' metadata that choose other weights of the same model."""


@dataclass(frozen=True)
class Reading:
    """Where a dictionary reads, or a transcoder writes, in the model at hand.

    Attributes:
        point: the place, which shows activations as those of the model that the dictionary was trained on.
        processing: options of the weight processing that are made up for there.
        notes: what differs all the same, a sentence each.
    """

    point: TapPoint
    processing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def processing_asked_for(sae: Any) -> Mapping[str, Any] | None:
    """The keywords with which the dictionary's own model was loaded; None where the dictionary does not say."""
    said = metadata_of(sae, "model_from_pretrained_kwargs")
    return said if isinstance(said, Mapping) else None


def reading_of(model: Any, sae: Any, hook: str) -> Reading:
    """The place of a hook point in a model, as an SAE's own account of its model has it.

    Raises:
        HookPointError: where the model has no such hook point.
    """
    point, said = _of_its_head(find_tap_point(model, hook), sae, hook), processing_asked_for(sae)
    tensor = tuple(tensor_notes(model, sae, hook))
    if said is None:
        return Reading(point, notes=tensor)
    notes = [
        f"{hook}: the SAE was trained on the model that {name} = {said[name]!r} chooses, by its own account: load"
        " that one if this is another"
        for name in OTHER_WEIGHTS
        if said.get(name) is not None
    ]
    asked = [name for name in CHANGED if said.get(name) and changes(name, hook)]
    centred = "center_writing_weights" in asked and ignores_the_mean(model) and not normalises_after(model)
    for name in asked:
        if name != "center_writing_weights":
            notes.append(_not_to_be_had(hook, name))
    if not asked and changes("center_writing_weights", hook) and is_centred(model):
        notes.append(
            f"{hook}: the SAE was trained on a model without weight processing, by its own account, and this one's"
            " weights are centred: load it with HookedTransformer.from_pretrained_no_processing"
        )
    return Reading(
        replace(point, centred=True) if centred else point,
        ("center_writing_weights",) if centred else (),
        (*tensor, *notes),
    )


def _of_its_head(point: TapPoint, sae: Any, hook: str) -> TapPoint:
    """The place as an SAE of one attention head sees it."""
    reads = hook == read_hook(sae) or hook != target_hook(sae, hook)
    head = metadata_of(sae, "hook_head_index" if reads else "hook_head_index_out")
    return point if head is None else replace(point, head=int(head), width=None)


def _not_to_be_had(hook: str, option: str) -> str:
    return (
        f"{hook}: the SAE was trained on a model processed with {option}, by its own account, which changes what is"
        f" seen there: measure HookedTransformer.from_pretrained_no_processing(…, {option}=True) in a session"
    )
