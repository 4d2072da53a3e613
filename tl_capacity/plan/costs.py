"""What a student's width costs in parameters, and which widths its family can build."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.measurement.measurement import Measurement


def teacher_config(measurement: Measurement, model: str | None = None) -> Any:
    """The teacher's configuration; None if neither the measurement's name nor a given one leads to it.

    Raises:
        CapacityError: where `model` was given and cannot be found, or its family has no students.
    """
    from tl_capacity.distillation.students import student_config
    from tl_capacity.models.defaults import width_of
    from tl_capacity.models.loading import load_config

    try:
        config = load_config(model or measurement.provenance.model)
        student_config(config, width_of(config))
    except CapacityError:
        if model:
            raise
        return None
    return config


def ladder(width: int, octaves: int = 4) -> tuple[int, ...]:
    """Student widths to look at for a teacher's width: the width itself, and two in each octave below."""
    halves = [width / 2**octave for octave in range(octaves + 1)]
    return tuple(sorted({max(1, round(step)) for half in halves for step in (half, 1.5 * half) if step <= width}))


def next_that_can_be_built(config: Any, width: int) -> int:
    """The narrowest student of at least `width` that the family can build.

    A multiple of the teacher's width always can be built.
    """
    return next(w for w in count(width) if _student_config(config, w) is not None)


def parameters_of_widths(config: Any, widths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Parameters of the student of each width: all, and without embeddings and head.

    They are counted on a model without storage.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tl_capacity.distillation.students import parameters_of

    build: Any = AutoModelForCausalLM.from_config  # which has no annotations
    sizes = {}
    for width in sorted(set(widths)):
        narrower = _student_config(config, width)
        if narrower is not None:
            with torch.device("meta"):
                sizes[width] = parameters_of(build(narrower))
    return sizes


def _student_config(config: Any, width: int) -> Any:
    """The configuration of a student; None if the family cannot build that width."""
    from tl_capacity.distillation.students import student_config

    try:
        return student_config(config, width)
    except CapacityError:
        return None
