"""Llama and what shares its configuration: SmolLM2, Mistral, OLMo."""

from __future__ import annotations

from tl_capacity.hooks.families.scaling import decoder

from tl_capacity.interfaces import ModelFamily

FAMILY = ModelFamily(
    "llama", ("llama", "mistral", "olmo", "olmo2"), "model.layers", "Llama, SmolLM2, Mistral, OLMo", decoder
)
