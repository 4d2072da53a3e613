"""OPT. The embedding of its 350M model, whose norms come after the sublayers, has fewer dimensions than the stream."""

from __future__ import annotations

from typing import Any

from tl_capacity.hooks.families.scaling import head_size, initial_weights, scaled

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any] | None:
    """What differs in a student's configuration, besides the width; see `scaling`."""
    size = head_size(width, config.hidden_size // config.num_attention_heads)
    if size is None:
        return None
    return {
        "hidden_size": width,
        "num_attention_heads": width // size,
        "ffn_dim": scaled(config.ffn_dim, width, config.hidden_size),
        "word_embed_proj_dim": scaled(config.word_embed_proj_dim, width, config.hidden_size),
        "init_std": initial_weights(config, width, "init_std"),
    }


# Its MLP has no module of its own, and sees all rows as one.
PLACES = {
    "hook_attn_out": "self_attn.output",
    "attn.hook_in": "self_attn.input",
    "attn.hook_out": "self_attn.output",
    "attn.hook_z": "self_attn.out_proj.input",
}
FAMILY = ModelFamily("opt", ("opt",), "model.decoder.layers", "OPT", student, {"opt": PLACES})
