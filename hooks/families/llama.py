"""Llama and what shares its configuration: SmolLM2, Mistral."""

from __future__ import annotations

from tl_capacity.hooks.families.scaling import decoder

from tl_capacity.interfaces import ModelFamily

FAMILY = ModelFamily("llama", ("llama", "mistral"), "model.layers", "Llama, SmolLM2, Mistral", decoder)
