"""Divergence: how far students are from their teacher on some documents, in nats, by document group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl_capacity.distillation.comparison import Predictor, compare_models
from tl_capacity.distillation.data import model_inputs, predicted_of
from tl_capacity.models.forward import device_of
from tl_capacity.runtime.processes import ALONE, Processes
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups
from tl_capacity.text.streams import TokenBatch


@torch.no_grad()
def divergence_by_group(
    teacher: Any,
    students: Mapping[str, Any],
    batches: Iterable[TokenBatch],
    processes: Processes = ALONE,
    progress: bool = True,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Sums of KL(teacher ‖ student) at T = 1 over tokens for each student, and the number of tokens [group].

    Args:
        teacher, students: models of one vocabulary, in evaluation mode.
        batches: rows of token ids with their documents, each of one document.
        processes: that share the batches; each gets the sums.
    """
    sums = torch.zeros(len(students), DOCUMENT_GROUPS, dtype=torch.float64)
    tokens = torch.zeros(DOCUMENT_GROUPS, dtype=torch.int64)
    predictors: list[Predictor] = []
    device, scratch = device_of(teacher), Scratch()
    with token_progress(None, progress and processes.first, "judging students") as advance:
        for number, batch in enumerate(batches):
            if number % processes.count != processes.index:
                continue
            ids, places, labels = model_inputs(batch.tokens, device)
            predictors = predictors or [Predictor.of(model, ids[:1]) for model in (teacher, *students.values())]
            kl = compare_models(predictors, ids, places, labels, predictors[0].vocabulary, scratch).kl
            of_row = torch.from_numpy(document_groups(batch.documents))
            groups = of_row.repeat_interleave(torch.from_numpy(predicted_of(batch.tokens)))
            sums.index_add_(1, groups, kl.cpu())
            tokens += torch.bincount(groups, minlength=DOCUMENT_GROUPS)
            advance(int(tokens.sum()))
    sums, tokens = processes.sum(sums), processes.sum(tokens)
    return dict(zip(students, sums.numpy(), strict=True)), tokens.numpy()
