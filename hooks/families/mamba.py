"""Mamba. It has no heads. Its inner width is a multiple of the stream's, and the rank of its time step grows with the
width. State and convolution keep their sizes.
"""

from __future__ import annotations

from typing import Any

from tl_capacity.hooks.families.scaling import initial_weights, scaled

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any]:
    """What differs in a student's configuration, besides the width; see `scaling`."""
    return {
        "hidden_size": width,
        "intermediate_size": scaled(config.intermediate_size, width, config.hidden_size),
        "time_step_rank": scaled(config.time_step_rank, width, config.hidden_size),
        "initializer_range": initial_weights(config, width),
    }


FAMILY = ModelFamily("mamba", ("mamba",), "backbone.layers", "Mamba", student)
