"""Reading: the hook point of the model at hand that carries what a dictionary was trained on, and any differences.

SAELens' metadata says with which keywords the dictionary's own model was loaded. Everything that runs a model and a
dictionary asks here where the dictionary reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tl_capacity.dictionaries.adapter import metadata_of, read_hook, target_hook
from tl_capacity.dictionaries.tensors import tensor_notes
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.models.processing import CENTRING, PROCESSING, is_layer_norm, mean_is_ignored

OTHER_WEIGHTS = ("revision", "checkpoint_index", "checkpoint_value", "checkpoint_label")
"""Keywords in SAELens' metadata that choose other weights of the same model."""


@dataclass(frozen=True)
class Reading:
    """Where a dictionary reads, or a transcoder writes, in the model at hand.

    Attributes:
        point: the place, which shows activations as those of the model that the dictionary was trained on.
        processing: options of the weight processing that the dictionary asks for and these activations have.
        notes: what differs all the same, a sentence each.
    """

    point: TapPoint
    processing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def reading_of(model: Any, sae: Any, hook: str) -> Reading:
    """Where a dictionary's hook point is in this model, following the SAE's metadata on its own model.

    Raises:
        HookPointError: where the model has no such hook point.
    """
    point, said = _of_its_head(find_tap_point(model, hook), sae, hook), loaded_with(sae)
    tensor = tuple(tensor_notes(model, sae, hook))
    if said is None:
        return Reading(point, notes=tensor)
    place, hooked = _carried_by(point), hasattr(model, "hook_dict")
    changing = [name for name, processing in PROCESSING.items() if processing.changes.fullmatch(place)]
    undergone = [name for name in changing if hooked and PROCESSING[name].undergone(model)]
    asked = [name for name in changing if said.get(name)]
    if CENTRING in asked and not is_layer_norm(model):
        asked.remove(CENTRING)  # TransformerLens leaves such a model as it is
    centred = CENTRING in asked and CENTRING not in undergone and mean_is_ignored(model)
    had = [name for name in asked if name in undergone or (name == CENTRING and centred)]
    return Reading(
        replace(point, centred=True) if centred else point,
        tuple(had),
        (
            *tensor,
            *(_not_undergone(hook, name) for name in asked if name not in had),
            *(_not_asked_for(hook, name) for name in undergone if name not in asked),
            *_other_weights(model, said, hook),
        ),
    )


def _of_its_head(point: TapPoint, sae: Any, hook: str) -> TapPoint:
    """The place as an SAE of one attention head reads it."""
    reads = hook == read_hook(sae) or hook != target_hook(sae, hook)
    head = metadata_of(sae, "hook_head_index" if reads else "hook_head_index_out")
    return point if head is None else replace(point, head=int(head), width=None)


def loaded_with(sae: Any) -> Mapping[str, Any] | None:
    """The keywords with which a dictionary's own model was loaded; None if its metadata names no model."""
    said = metadata_of(sae, "model_from_pretrained_kwargs")
    if isinstance(said, Mapping):
        return said
    return {} if metadata_of(sae, "model_class_name") == "HookedTransformer" else None


def processing_wanted(model: Any, places: Iterable[tuple[Any, str]]) -> frozenset[str]:
    """Options by which a model's weights must be processed to give the activations that the SAEs were trained on.
    Subtracting the mean needs none where it is exact.
    """
    exact = mean_is_ignored(model) or not is_layer_norm(model)
    return frozenset(
        name
        for sae, hook in places
        for name, wanted in (loaded_with(sae) or {}).items()
        if wanted and name in PROCESSING and PROCESSING[name].changes.fullmatch(hook)
        if not (name == CENTRING and exact)
    )


def _carried_by(point: TapPoint) -> str:
    """The model's own name for a hook point. A bridge has one for each name of TransformerLens."""
    name = getattr(point.module, "name", None)
    is_known = isinstance(name, str) and any(p.changes.fullmatch(name) for p in PROCESSING.values())
    return name if isinstance(name, str) and is_known else point.name


def _not_undergone(hook: str, option: str) -> str:
    return (
        f"{hook}: the SAE's metadata says that it was trained on a model with {option}, and this model is without, "
        "so its activations differ: load the model with HookedTransformer.from_pretrained_no_processing(…, "
        f"{option}=True)"
    )


def _not_asked_for(hook: str, option: str) -> str:
    return (
        f"{hook}: the SAE's metadata says that it was trained on a model without {option}, and this model has it, so "
        "its activations differ: load the model with HookedTransformer.from_pretrained_no_processing"
    )


def _other_weights(model: Any, said: Mapping[str, Any], hook: str) -> Iterator[str]:
    config = getattr(model, "cfg", None) if hasattr(model, "hook_dict") else getattr(model, "config", None)
    for name in OTHER_WEIGHTS:
        wanted = said.get(name)
        if wanted is not None and getattr(config, name, None) != wanted:
            yield (
                f"{hook}: the SAE's metadata says that it was trained on the weights that {name} = {wanted!r} "
                "selects: load those if this model has others"
            )
