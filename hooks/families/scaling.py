"""How a student's configuration follows from its teacher's and from its width d_S, by the same rule for all families.

- Depth, vocabulary, context and everything that is not named here: the teacher's.
- MLP: d_mlp · d_S / d_T, rounded; so the ratio of MLP to stream stays.
- Heads: the teacher's head size where it divides d_S, else the largest that does and is at least half of it; a student
narrower than one head has one.
- Key/value heads: as many heads share one as in the teacher, or as near to that as the number of heads allows.
- Rotary dimensions: the teacher's share of the head size, rounded to an even number.
- Initial weights: their standard deviation times √(d_T / d_S), so that what a layer sums up starts at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, nextafter, sqrt
from typing import Any

HEADS_DIVIDE_WIDTH = ("llama", "gemma2", "gemma3_text")
"""Model types for which transformers requires a width that is a multiple of the number of heads."""


def scaled(size: int, width: int, teacher_width: int) -> int:
    """A size that grows with the width, rounded, at least 1."""
    return max(1, round(size * width / teacher_width))


def head_size(width: int, teacher_size: int, multiple: int = 1) -> int | None:
    """The largest head size that divides `width`, is a multiple of `multiple`, and is within a factor of 2 of the
    teacher's; None if there is none.
    """
    if width <= teacher_size:
        return width if width % multiple == 0 else None
    return next(
        (
            size
            for size in range(teacher_size, (teacher_size - 1) // 2, -1)
            if width % size == 0 and size % multiple == 0
        ),
        None,
    )


def key_value_heads(heads: int, teacher_heads: int, teacher_key_value_heads: int) -> int:
    """The divisor of `heads` that is nearest to the teacher's share of key/value heads. Of two equally near, the
    larger.
    """
    wanted = heads * teacher_key_value_heads  # times teacher_heads, so that all stay whole numbers
    return min((n for n in range(heads, 0, -1) if heads % n == 0), key=lambda n: abs(n * teacher_heads - wanted))


def even(size: float) -> int:
    """The nearest even number, at least 2."""
    return max(2, 2 * round(size / 2))


def share_of(part: int, whole: int) -> float:
    """A share that gives `part` again when it multiplies `whole` and the product is truncated.

    Transformers keeps some sizes as shares and computes `int(whole * share)`. The nearest float to 28 / 110 gives 27;
    the next one gives 28.
    """
    share = part / whole
    return share if int(whole * share) == part else nextafter(share, inf)


def partly_rotated(rope_parameters: Mapping[str, Any], size: int, teacher_size: int) -> dict[str, Any]:
    """The rotary parameters of heads of some size. The same share of each head is rotated as in the teacher."""
    teacher_rotary = int(teacher_size * rope_parameters["partial_rotary_factor"])  # as transformers computes it
    rotary = min(size, even(size * teacher_rotary / teacher_size))
    return {**rope_parameters, "partial_rotary_factor": share_of(rotary, size)}


def initial_weights(config: Any, width: int, name: str = "initializer_range") -> float:
    """Standard deviation of the student's initial weights. The teacher's configuration has it under `name`."""
    return float(getattr(config, name)) * sqrt(config.hidden_size / width)


def decoder(config: Any, width: int) -> dict[str, Any] | None:
    """What changes in a configuration with Llama's names (Mistral, OLMo, Qwen, Gemma, Phi); None if no head size fits.

    Where the head size is free of the width (`head_dim`, as in Qwen 3 and Gemma 2), it stays the teacher's, as long as
    one such head is not more than the student's share of the attention's width. Llama and Gemma still need a width that
    is a multiple of the number of heads.
    """
    teacher_width, teacher_heads = int(config.hidden_size), int(config.num_attention_heads)
    teacher_size = int(getattr(config, "head_dim", None) or teacher_width // teacher_heads)
    size: int | None
    if teacher_size * teacher_heads == teacher_width:
        size = head_size(width, teacher_size, multiple=2)
        heads = width // size if size else 0
    else:
        size = min(teacher_size, even(teacher_size * teacher_heads * width / teacher_width))
        heads = max(1, round(teacher_heads * teacher_size * width / (teacher_width * size)))
    if size is None or (width % heads and config.model_type in HEADS_DIVIDE_WIDTH):
        return None
    changes = {
        "hidden_size": width,
        "intermediate_size": scaled(config.intermediate_size, width, teacher_width),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads(heads, teacher_heads, config.num_key_value_heads),
        "initializer_range": initial_weights(config, width),
    }
    return changes | ({"head_dim": size} if getattr(config, "head_dim", None) else {})
