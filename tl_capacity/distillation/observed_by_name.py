"""`observe` by names, as `tl-capacity observe` runs it: loads models and text, and writes only the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tl_capacity.distillation.named_students import students_named
from tl_capacity.distillation.observation import check_new, observe
from tl_capacity.distillation.observing import ObserveSettings
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.models.defaults import USUAL_CONTEXT, longest_row
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.runtime.processes import Processes
from tl_capacity.text.streams import TokenStream


def observe_named(settings: ObserveSettings) -> DistillationRun:
    """Judge the students that the settings name.

    Raises:
        CapacityError: where a model or the text cannot be loaded, or on whatever `observe` refuses.
    """
    check_new(settings.out)
    names = students_named(settings.students)
    processes = Processes.of_launch().connected(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    teacher = load_model(settings.teacher, device=settings.device, dtype=settings.dtype, revision=settings.revision)
    students = {name: student.load(settings.device, settings.dtype) for name, student in names.items()}
    stream = TokenStream(
        settings.source,
        teacher.tokenizer,
        _context(settings.context, {"the teacher": teacher, **students}),
        settings.batch_rows,
        settings.prepend_bos,
        special_tokens=settings.special_tokens,
    )
    return observe(
        teacher,
        students,
        stream,
        tokens=settings.tokens,
        held_out=settings.held_out,
        batch_rows=settings.batch_rows,
        out=settings.out,
        processes=processes,
    )


def _context(asked: int | None, models: Mapping[str, LoadedModel]) -> int:
    """Positions in a row: the requested number, or as many as all models take, up to the default.

    Raises:
        CapacityError: where one takes fewer than are asked for.
    """
    limits = {name: longest_row(loaded.model.config) for name, loaded in models.items()}
    shortest = min(limits, key=limits.__getitem__)
    if asked is not None and asked > limits[shortest]:
        raise CapacityError(
            f"--context {asked} is longer than the {limits[shortest]:,} positions of {shortest}: choose at most that"
        )
    return min(USUAL_CONTEXT, limits[shortest]) if asked is None else asked
