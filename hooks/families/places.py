"""The places of hook points inside blocks, in the few ways in which architectures differ.

A sublayer's own output is `attn.hook_out` or `mlp.hook_out`. What it adds to the stream, behind a norm of its own where
the architecture has one, is `hook_attn_out` or `hook_mlp_out`.
"""

from __future__ import annotations

from collections.abc import Mapping


def sublayers(
    attention: str = "self_attn",
    heads_joined_by: str = "o_proj",
    mlp: str = "mlp",
    neurons_read_by: str = "down_proj",
    *,
    norms: Mapping[str, str] = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"},
    added_by: tuple[str, str] | None = None,
    middle: str | None = None,
) -> dict[str, str]:
    """The places of a block with an attention module and an MLP module.

    Args:
        attention, mlp: the modules, by their names in the block.
        heads_joined_by, neurons_read_by: the output matrices inside them.
        norms: the norms, by TransformerLens' names.
        added_by: what attention's and the MLP's outputs pass through before they are added to the stream.
        middle: where the stream between both is seen; None where both read the block's input.
    """
    after_attention, after_mlp = added_by or (attention, mlp)
    places = {
        "hook_attn_out": f"{after_attention}.output",
        "attn.hook_in": f"{attention}.input",
        "attn.hook_out": f"{attention}.output",
        "attn.hook_z": f"{attention}.{heads_joined_by}.input",
        "hook_mlp_out": f"{after_mlp}.output",
        "mlp.hook_in": f"{mlp}.input",
        "mlp.hook_out": f"{mlp}.output",
        "mlp.hook_post": f"{mlp}.{neurons_read_by}.input",
    }
    places |= {f"{name}.hook_out": f"{module}.output" for name, module in norms.items()}
    return places if middle is None else places | {"hook_resid_mid": middle}


AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
PRE_NORM = sublayers(middle="post_attention_layernorm.input")
"""Llama's places: a norm before each sublayer."""
NORMS_ON_BOTH_SIDES = sublayers(
    norms={
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    },
    added_by=AFTER,
    middle="pre_feedforward_layernorm.input",
)
"""Gemma 2's places: a norm before and after each sublayer."""
POST_NORM = sublayers(
    norms={"ln1": "post_attention_layernorm", "ln2": "post_feedforward_layernorm"}, added_by=AFTER, middle="mlp.input"
)
"""OLMo 2's places: a norm after each sublayer, and none before."""
