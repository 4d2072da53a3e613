"""How far students are from their teacher on some documents, in nats, by document group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl_capacity.distillation.data import model_inputs
from tl_capacity.distillation.losses import HELDOUT_LOSS, Output, chunked_losses
from tl_capacity.distillation.students import output_of
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
    """Sums over tokens of KL(teacher ‖ student) at T = 1 for each student, and the number of these tokens [group].

    Args:
        teacher, students: Hugging Face causal language models in evaluation mode.
        batches: rows of token ids with their documents, each of one document.
        processes: that share the batches; each gets the sums.
    """
    device, scratch = next(teacher.parameters()).device, Scratch()
    sums = torch.zeros(len(students), DOCUMENT_GROUPS, dtype=torch.float64)
    tokens = torch.zeros(DOCUMENT_GROUPS, dtype=torch.int64)
    with token_progress(None, progress and processes.first, "judging students") as advance:
        for number, batch in enumerate(batches):
            if number % processes.count != processes.index:
                continue
            ids, counted, labels = model_inputs(batch.tokens, device)
            outputs = [output_of(model, ids, counted) for model in (teacher, *students.values())]
            start = 0
            for group, size in zip(document_groups(batch.documents).tolist(), counted.sum(1).tolist(), strict=True):
                row = slice(start, start + size)
                some = [Output(output.hidden[row], output.head) for output in outputs]
                losses = chunked_losses(some[0], some[1:], labels[row], HELDOUT_LOSS, total=1, scratch=scratch)
                sums[:, group] += losses.cpu()
                tokens[group] += size
                start += size
            advance(int(tokens.sum()))
    sums, tokens = processes.sum(sums), processes.sum(tokens)
    return dict(zip(students, sums.numpy(), strict=True)), tokens.numpy()
