"""Places: the module of a model that carries the tensor of a hook name, and on which side.

TransformerLens' names are found by its own hook points. Here are the other two kinds: sides of a block's modules that a
HookedTransformer has no hook for, and sides of modules of a Hugging Face model, by the model family's places.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from tl_capacity.plugins import plugins

BLOCK_SIDE = re.compile(r"(blocks\.\d+\.(?:attn|mlp|ln1|ln1_post|ln2|ln2_post))\.(hook_in|hook_out)")
"""One side of a module in a block, such as `blocks.3.mlp.hook_out`."""


class Place(NamedTuple):
    """A module, by its path in the model, and one of its sides: "input" or "output"."""

    path: str
    side: str

    @classmethod
    def parse(cls, name: str) -> Place:
        """The place that a path names, such as `model.layers.3.mlp.input`. Without a side, the output is meant."""
        path, _, side = name.rpartition(".")
        return cls(path, side) if side in ("input", "output") else cls(name, "output")


def walk(root: Any, path: str) -> Any:
    """The object at a dotted path, or None."""
    for part in path.split("."):
        root = (
            root[int(part)]
            if part.isdigit() and isinstance(root, nn.ModuleList) and int(part) < len(root)
            else getattr(root, part, None)
        )
    return root


def side_of_block(name: str) -> Place | None:
    """The module in a block of a TransformerLens model, and its side, for names such as `blocks.3.mlp.hook_out`; None
    for any other name.
    """
    match = BLOCK_SIDE.fullmatch(name)
    return Place(match[1], "input" if match[2] == "hook_in" else "output") if match else None


def hugging_face_place(model: Any, name: str) -> Place | None:
    """Where a Hugging Face model carries what a hook name means; None if its family does not say, or if it has no
    family.
    """
    named = Place.parse(name)
    for path in (named.path, f"{getattr(model, 'base_model_prefix', '')}.{named.path}"):
        if isinstance(walk(model, path), nn.Module):
            return Place(path, named.side)
    if name == "hook_embed":
        embedding = model.get_input_embeddings()
        return next((Place(path, "output") for path, module in model.named_modules() if module is embedding), None)
    return family_place(model, name)


def family_place(model: Any, name: str) -> Place | None:
    """Where the Hugging Face model carries what a hook name means, according to the family of a model in any form; None
    if the family does not say.
    """
    kind = model_type_of(model)
    family = plugins().family_of(kind)
    if family is None:
        return None
    place = family.place(lens_name(model, name), str(kind))
    return place and Place(*place)


def hugging_face_hooks(model: Any) -> list[str]:
    """The hook names for which a Hugging Face model's family has places."""
    kind, layers = model_type_of(model), int(getattr(model.config, "num_hidden_layers", 0))
    family = plugins().family_of(kind)
    inside = family.places.get(str(kind), {}) if family else {}
    names = ("hook_resid_pre", *inside, "hook_resid_post")
    return [f"blocks.{layer}.{name}" for layer in range(layers) for name in names]


def lens_name(model: Any, name: str) -> str:
    """TransformerLens' name for one side of a Hugging Face module, such as `blocks.3.mlp.hook_out` for
    `model.layers.3.mlp`; any other name unchanged.
    """
    kind, named = model_type_of(model), Place.parse(name)
    family = plugins().family_of(kind)
    if family is None or name.startswith(("blocks.", "hook_")):
        return name
    base = family.blocks.partition(".")[0]
    found = (family.hook_at(path, named.side, str(kind)) for path in (named.path, f"{base}.{named.path}"))
    return next((hook for hook in found if hook), name)


def model_type_of(model: Any) -> str | None:
    """The `config.model_type` of a model. A HookedTransformer keeps only the name of the model's class, so it is found
    from that.
    """
    config = getattr(getattr(model, "original_model", model), "config", None)
    if kind := getattr(config, "model_type", None):
        return str(kind)
    architecture = str(getattr(getattr(model, "cfg", None), "original_architecture", None) or "").lower()
    kinds = [kind for family in plugins().model_families for kind in family.model_types]
    alike = [kind for kind in kinds if architecture.startswith(kind.removesuffix("_text").replace("_", ""))]
    return max(alike, key=len, default=None)
