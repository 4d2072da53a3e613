"""Llama, and models with the same configuration: SmolLM2, Mistral, OLMo."""

from __future__ import annotations

from tl_capacity.hooks.families.places import POST_NORM, PRE_NORM
from tl_capacity.hooks.families.scaling import decoder

from tl_capacity.interfaces import ModelFamily

FAMILY = ModelFamily(
    "llama",
    ("llama", "mistral", "olmo", "olmo2"),
    "model.layers",
    "Llama, SmolLM2, Mistral, OLMo",
    decoder,
    {"llama": PRE_NORM, "mistral": PRE_NORM, "olmo": PRE_NORM, "olmo2": POST_NORM},
)
