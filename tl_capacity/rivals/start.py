"""truncated_start: how far students that start from the truncated teacher are from it before their first
training step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl_capacity.distillation.data import first_whole_rows, model_inputs, predicted_of, read_to_judge
from tl_capacity.distillation.losses import HELDOUT_LOSS, Output, chunked_losses
from tl_capacity.distillation.students import check_teacher, new_student, output_of, student_config
from tl_capacity.predict.floors import checked_widths
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.results.estimate import group_means
from tl_capacity.rivals.text import TeacherText, heldout_text, interval_notes
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.runtime.versions import library_versions
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups
from tl_capacity.text.streams import source_of

TRUNCATED_START = "truncated_start"
SHOWN_TOKENS = 50_000
"""Predicted tokens of the text in which the first full rows are looked for."""


@checked
def truncated_start(
    teacher: Any,
    stream: Any,
    widths: Sequence[int],
    *,
    shown_on: Any = None,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Forecasts:
    """KL(teacher ‖ truncated student before its first step), in nats per token at T = 1.

    It is what `distill(start="truncated")` reports before it trains, where both texts are the same.

    Args:
        teacher: a Hugging Face causal language model.
        stream: the text to judge on: a `TokenStream`, or rows of token ids [row, position].
        widths: d_S of each student.
        shown_on: the text in whose first whole rows the directions of the teacher's stream are taken; by default
            `stream` itself.
        seed: of the weights that have no counterpart in the teacher.
        max_tokens: read no more predicted tokens of the stream than this, but whole batches.
        progress: show it once it takes longer than two seconds.

    Raises:
        CapacityError: where the teacher's family has no students of a width, or no truncated ones.
    """
    widths, started = checked_widths(widths), time.monotonic()
    check_teacher(teacher)
    for width in widths:
        student_config(teacher.config, width)  # before anything runs
    shown = first_whole_rows(read_to_judge(stream if shown_on is None else shown_on, SHOWN_TOKENS))
    text = TeacherText.read(teacher, heldout_text(stream, max_tokens), progress)
    sums, scratch = np.zeros((DOCUMENT_GROUPS, len(widths))), Scratch()
    with token_progress(len(widths), progress, "truncating", "widths") as advance:
        for place, width in enumerate(widths):
            student = new_student(teacher, width, seed, "truncated", shown).eval()
            sums[:, place] = _divergence_sums(text, student, scratch)
            advance(place + 1)
    floors = group_means(sums, text.tokens)
    records = tuple(Forecast(TRUNCATED_START, width, floor) for width, floor in zip(widths, floors, strict=True))
    about = {
        "source": source_of(stream),
        "shown_on": source_of(stream if shown_on is None else shown_on),
        "tokens": len(text),
        "seed": seed,
        "versions": library_versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Forecasts(records, about, interval_notes(floors))


@torch.no_grad()
def _divergence_sums(text: TeacherText, student: Any, scratch: Scratch) -> NDArray[np.float64]:
    """KL of a student, summed over the tokens of each document group [group]."""
    sums, begin = np.zeros(DOCUMENT_GROUPS), 0
    for batch in text.batches:
        tokens, places, labels = model_inputs(batch.tokens, text.hidden.device)
        output = output_of(student, tokens, places)
        row_begin = 0
        for group, length in zip(document_groups(batch.documents), predicted_of(batch.tokens).tolist(), strict=True):
            of_row = slice(row_begin, row_begin + length)
            of_text = slice(begin + row_begin, begin + row_begin + length)
            if length:
                of_teacher = Output(text.hidden[of_text], text.head)
                of_student = Output(output.hidden[of_row], output.head)
                [kl] = chunked_losses(of_teacher, [of_student], labels[of_row], HELDOUT_LOSS, 1, scratch=scratch)
                sums[group] += float(kl)
            row_begin += length
        begin += row_begin
    return sums
