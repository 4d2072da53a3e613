"""Qwen 2, whose head size follows from the width, and Qwen 3, whose head size does not."""

from __future__ import annotations

from tl_capacity.hooks.families.places import PRE_NORM
from tl_capacity.hooks.families.scaling import decoder

from tl_capacity.interfaces import ModelFamily

FAMILY = ModelFamily(
    "qwen",
    ("qwen2", "qwen3"),
    "model.layers",
    "Qwen 2, Qwen 3",
    decoder,
    {"qwen2": PRE_NORM, "qwen3": PRE_NORM},
)
