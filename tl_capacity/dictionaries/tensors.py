"""Tensors: notes for a dictionary that may be measured on a different tensor from the one it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from tl_capacity.dictionaries.adapter import metadata_of, read_hook, target_hook
from tl_capacity.errors import HookPointError
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.models.places import family_place, walk

NORMALIZED = re.compile(r"(blocks\.\d+)\.(ln[12])\.hook_normalized")
READERS = {"ln1": "attn.hook_in", "ln2": "mlp.hook_in"}
"""The sublayer that reads the output of a norm."""


def tensor_notes(model: Any, sae: Any, hook: str) -> Iterator[str]:
    """A sentence for each doubt about the hook point that an SAE reads, or that a transcoder writes to."""
    trained = read_hook(sae)
    writes = trained is not None and hook == target_hook(sae, trained)
    if trained is not None and not writes and not same_tensor(model, hook, trained):
        yield (
            f"{hook}: the SAE's metadata says that it was trained on {trained}, and it reads another tensor here: "
            f"measure it at {trained} if this was not intended"
        )
    head = metadata_of(sae, "hook_head_index_out" if writes else "hook_head_index")
    if head is not None:
        yield f"{hook}: the SAE's metadata says that it reads attention head {head} alone"
    if (found := NORMALIZED.fullmatch(hook)) and _is_layer_norm(walk(model, f"{found[1]}.{found[2]}")):
        yield (
            f"{hook} is before the norm's weight and bias in TransformerLens 3, and was after them in "
            f"TransformerLens 2: if the SAE was trained with version 2, measure it at {found[1]}.{READERS[found[2]]}"
        )


def same_tensor(model: Any, hook: str, other: str) -> bool:
    """Whether two names of hook points mean the same tensor of a model."""
    if _before(hook) == _before(other):
        return True
    try:
        points = [find_tap_point(model, name) for name in (hook, other)]
    except HookPointError:
        return False
    if points[0].module is points[1].module and points[0].side == points[1].side:
        return True
    places = [family_place(model, name) for name in (hook, other)]
    return places[0] is not None and places[0] == places[1]


def _before(hook: str) -> str:
    """The name of the stream before a block, turned into the stream after the block before it."""
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_post|hook_out)", hook)
    if match is None:
        return hook
    return f"stream {int(match[1]) + (match[2] in ('hook_resid_post', 'hook_out'))}"


def _is_layer_norm(norm: nn.Module) -> bool:
    """Whether a norm of TransformerLens is a layer norm with its own weight, in either form of the model."""
    kinds = ("LayerNorm", "NormalizationBridge")
    return type(norm).__name__ in kinds and getattr(norm, "uses_rms_norm", False) is False
