"""A model family: BLOOM, which tl-capacity does not come with. Position is in its attention scores, so a student needs
no more than its width and its heads.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from tl_capacity.interfaces import ModelFamily


def student(config: Any, width: int) -> dict[str, Any] | None:
    """What a student of some width has otherwise than its teacher, whose head size it keeps; None where that does not
    divide the width.
    """
    size = config.hidden_size // config.n_head
    if width % size:
        return None
    return {
        "hidden_size": width,
        "n_head": width // size,
        "initializer_range": config.initializer_range * sqrt(config.hidden_size / width),
    }


BLOOM = ModelFamily("bloom", ("bloom",), "transformer.h", "BLOOM", student)
