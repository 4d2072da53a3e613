"""Which features a command should keep: those that a file names, or those that carry a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.distillation.settings import KeepFeatures
from tl_capacity.errors import CapacityError
from tl_capacity.measure.setup import dictionary_named
from tl_capacity.models.forward import device_of
from tl_capacity.models.loading import LoadedModel
from tl_capacity.probing.activations import Activations, collect
from tl_capacity.probing.concepts import LabelledTexts, load_concepts
from tl_capacity.probing.sparse import carrying_features

CONCEPT = "concept:"


def named_saes(specs: Sequence[str], teacher: LoadedModel, keep: Sequence[str]) -> dict[str, Any]:
    """The dictionaries of the features to keep, by hook point.

    They are the named ones. If there are features to keep and none is named, they are those that come with the teacher.

    Raises:
        CapacityError: where one cannot be loaded, or two are of one hook point.
    """
    if not keep:
        return {}
    device = str(device_of(teacher.model))
    loaded: dict[str, Any] = {}
    for spec in specs:
        hook, name, sae = dictionary_named(spec, teacher, device)
        if hook in loaded:
            raise CapacityError(f"{name} is the second dictionary at {hook}: name only one for each hook point")
        loaded[hook] = sae
    bundled = teacher.named.saes if teacher.named is not None and not specs else {}
    return loaded or {hook: load_sae(str(folder), device)[1] for hook, folder in bundled.items()}


def wanted_features(
    keep: Sequence[str], teacher: LoadedModel, saes: Mapping[str, Any], hook: str, weight: float, concept_features: int
) -> tuple[KeepFeatures, ...]:
    """The features that `--keep` asks for.

    Args:
        keep: paths of JSON files, and `concept:NAME`.
        saes: dictionaries by hook point.
        hook: where a concept's features are, and those of a file that does not say; the middle one of the dictionaries'
            where it is empty.
        weight: of the loss.
        concept_features: how many features carry a concept.

    Raises:
        CapacityError: where a file or concept cannot be read, or there is no dictionary there.
    """
    if not keep:
        return ()
    hook = hook or (list(saes)[len(saes) // 2] if saes else "")
    wanted: list[KeepFeatures] = []
    for spec in keep:
        if not spec.startswith(CONCEPT):
            wanted += KeepFeatures.load(spec, hook) if Path(spec).is_file() else _unknown(spec)
            continue
        if hook not in saes:
            raise CapacityError(
                f"there is no dictionary at {hook or 'any hook point'} to find the features of {spec} in: pass one with"
                " --sae"
            )
        concept = concept_of(spec)
        latents = concept_latents(concept, teacher, saes[hook], hook)
        wanted.append(KeepFeatures(hook, carrying_features(latents, concept, concept_features)))
    return tuple(each.weighing(weight) for each in wanted)


def concept_of(spec: str) -> LabelledTexts:
    """The concept that `concept:NAME` names.

    Raises:
        CapacityError: where it names none or several, or its texts cannot be probed.
    """
    concepts = load_concepts(spec.removeprefix(CONCEPT))
    if len(concepts) > 1:
        raise CapacityError(f"{spec} is {len(concepts)} concepts: name one, as concept:{concepts[0].name}")
    return concepts[0]


def concept_latents(concept: LabelledTexts, teacher: LoadedModel, sae: Any, hook: str) -> Activations:
    """The latents of a concept's texts, pooled over each text.

    Raises:
        HookPointError: where the Hugging Face model, which is distilled, has no such hook point.
    """
    return collect(teacher.model, hook, concept.texts, tokenizer=teacher.tokenizer, sae=sae)


def _unknown(spec: str) -> list[KeepFeatures]:
    raise CapacityError(
        f"--keep {spec} names no features: pass a JSON file with hook and features, or concept:NAME (see `tl-capacity"
        " plugins`)"
    )
