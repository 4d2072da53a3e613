"""Gemma. It has its own factor for attention scores, and Gemma 2 caps its logits."""

from __future__ import annotations

from typing import Any

from tl_capacity.hooks.families.places import NORMS_ON_BOTH_SIDES, PRE_NORM
from tl_capacity.hooks.families.scaling import decoder, scaled

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any] | None:
    """What differs in a student's configuration, besides the width; see `scaling`. The factor of the scores stays the
    same multiple of the head size.
    """
    changes = decoder(config, width)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if changes is None or scalar is None:
        return changes
    return changes | {"query_pre_attn_scalar": scaled(scalar, changes["head_dim"], config.head_dim)}


FAMILY = ModelFamily(
    "gemma",
    ("gemma", "gemma2", "gemma3_text"),
    "model.layers",
    "Gemma, Gemma 2, Gemma 3 (text)",
    student,
    {"gemma": PRE_NORM, "gemma2": NORMS_ON_BOTH_SIDES, "gemma3_text": NORMS_ON_BOTH_SIDES},
)
