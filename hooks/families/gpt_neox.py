"""GPT-NeoX: Pythia and the embedded teacher."""

from __future__ import annotations

from typing import Any

from tl_capacity.hooks.families.places import sublayers
from tl_capacity.hooks.families.scaling import head_size, initial_weights, partly_rotated, scaled

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any] | None:
    """What differs in a student's configuration, besides the width; see `scaling`."""
    teacher_size = config.hidden_size // config.num_attention_heads
    size = head_size(width, teacher_size, multiple=2)
    if size is None:
        return None
    return {
        "hidden_size": width,
        "num_attention_heads": width // size,
        "intermediate_size": scaled(config.intermediate_size, width, config.hidden_size),
        "rope_parameters": partly_rotated(config.rope_parameters, size, teacher_size),
        "initializer_range": initial_weights(config, width),
    }


# Attention and MLP both read the block's input, unless the configuration has it otherwise.
PLACES = sublayers("attention", "dense", "mlp", "dense_4h_to_h")
FAMILY = ModelFamily("gpt-neox", ("gpt_neox",), "gpt_neox.layers", "Pythia, GPT-NeoX", student, {"gpt_neox": PLACES})
