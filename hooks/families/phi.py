"""Phi. It rotates a part of each head. Phi 3 stretches each rotary dimension by its own factor, so no rule gives the
factors of another head size.
"""

from __future__ import annotations

from typing import Any

from tl_capacity.hooks.families.places import PRE_NORM, sublayers
from tl_capacity.hooks.families.scaling import decoder, partly_rotated

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any] | None:
    """What differs in a student's configuration, besides the width; see `scaling`."""
    changes = decoder(config, width)
    if changes is None:
        return None
    size, teacher_size = width // changes["num_attention_heads"], config.hidden_size // config.num_attention_heads
    return changes | {"rope_parameters": partly_rotated(config.rope_parameters, size, teacher_size)}


FAMILIES = (
    ModelFamily(
        "phi",
        ("phi",),
        "model.layers",
        "Phi 1, 1.5 and 2",
        student,
        {"phi": sublayers("self_attn", "dense", "mlp", "fc2", norms={"ln1": "input_layernorm"})},
    ),
    ModelFamily("phi3", ("phi3",), "model.layers", "Phi 3", places={"phi3": PRE_NORM}),
)
