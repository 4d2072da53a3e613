"""GPT-2."""

from __future__ import annotations

from typing import Any

from tl_capacity.hooks.families.places import sublayers
from tl_capacity.hooks.families.scaling import head_size, initial_weights, scaled

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any] | None:
    """What differs in a student's configuration, besides the width; see `scaling`."""
    size = head_size(width, config.n_embd // config.n_head)
    if size is None:
        return None
    return {
        "n_embd": width,
        "n_head": width // size,
        "n_inner": (
            None if config.n_inner is None else scaled(config.n_inner, width, config.n_embd)
        ),  # None means 4 · n_embd
        "initializer_range": initial_weights(config, width),
    }


PLACES = sublayers("attn", "c_proj", "mlp", "c_proj", norms={"ln1": "ln_1", "ln2": "ln_2"}, middle="ln_2.input")
FAMILY = ModelFamily("gpt2", ("gpt2",), "transformer.h", "GPT-2", student, {"gpt2": PLACES})
