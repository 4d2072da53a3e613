"""Tensors: what a reader must know where a dictionary may be measured on another tensor than it was trained on."""

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
"""What reads the output of a norm."""


def tensor_notes(model: Any, sae: Any, hook: str) -> Iterator[str]:
    """A sentence for each doubt about a hook point that an SAE reads, or that a transcoder writes to."""
    trained = read_hook(sae)
    writes = trained is not None and hook == target_hook(sae, trained)
    if trained is not None and not writes and not same_tensor(model, hook, trained):
        yield (
            f"{hook}: the SAE was trained on {trained}, by its own account, and reads another tensor here: measure it"
            f" at {trained} if that was not meant"
        )
    head = metadata_of(sae, "hook_head_index_out" if writes else "hook_head_index")
    if head is not None:
        yield f"{hook}: of the attention heads, the SAE knows head {head} alone, by its own account"
    if (found := NORMALIZED.fullmatch(hook)) and _is_layer_norm(walk(model, f"{found[1]}.{found[2]}")):
        yield (
            f"{hook} is before the norm's weight and bias in TransformerLens 3, and was behind them in TransformerLens"
            f" 2: if the SAE was trained with that, measure it at {found[1]}.{READERS[found[2]]}"
        )


def same_tensor(model: Any, hook: str, other: str) -> bool:
    """Whether two names of hook points mean one tensor of a model."""
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
    """The stream before a block is the stream after the one before."""
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_post|hook_out)", hook)
    if match is None:
        return hook
    return f"stream {int(match[1]) + (match[2] in ('hook_resid_post', 'hook_out'))}"


def _is_layer_norm(norm: nn.Module) -> bool:
    """Whether a norm of TransformerLens, in either form of the model, is a layer norm with a weight of its own."""
    kinds = ("LayerNorm", "NormalizationBridge")
    return type(norm).__name__ in kinds and getattr(norm, "uses_rms_norm", False) is False
