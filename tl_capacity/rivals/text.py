"""The text that rivals are judged on, with the teacher's predictions.

It is the text that a distillation judges its students on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.distillation.data import model_inputs, predicted_of
from tl_capacity.errors import CapacityError
from tl_capacity.models.forward import at_places, check_row_length, check_token_ids, device_of, evaluating
from tl_capacity.models.head import Head, check_head, head_of, last_hidden
from tl_capacity.results.estimate import Estimate
from tl_capacity.runtime.logs import ended_early, log
from tl_capacity.runtime.progress import token_progress
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups
from tl_capacity.text.streams import TokenBatch, as_batches


def heldout_text(stream: Any, tokens: int | None) -> tuple[TokenBatch, ...]:
    """The first batches of a stream with enough predicted tokens, or all of them.

    A distillation reads its held-out text in the same way.

    Raises:
        CapacityError: where nothing is asked for, or nothing is predicted.
    """
    if tokens is not None and tokens < 1:
        raise CapacityError(f"{tokens:,} tokens are too few: ask for at least 1")
    batches, predicted = list[TokenBatch](), 0
    for batch in as_batches(stream):
        batches.append(batch)
        predicted += predicted_tokens(batch)
        if tokens is not None and predicted >= tokens:
            break
    if not predicted:
        raise CapacityError("the text has no token to predict: use longer text")
    if tokens is not None and predicted < tokens:
        log.warning(ended_early(predicted, tokens))
    return tuple(batches)


def predicted_tokens(batch: TokenBatch) -> int:
    """The number of predicted tokens in a batch: all but the first of each row."""
    return int(np.maximum(batch.present.sum(1) - 1, 0).sum())


def interval_notes(floors: Iterable[Estimate]) -> tuple[str, ...]:
    """A note if floors have no interval."""
    missing = any(floor.low is None for floor in floors)
    return ("there are too few documents for an interval: judge on more text",) if missing else ()


@dataclass(frozen=True)
class TeacherText:
    """Some text, and a teacher's predictions on it.

    Attributes:
        batches: the text.
        hidden: the teacher's last hidden state where a next token is there, on the teacher's device.
        head: what turns these into logits.
        groups: the document group of each.
    """

    batches: tuple[TokenBatch, ...]
    hidden: Float[Tensor, "token d_model"]
    head: Head
    groups: Int64[np.ndarray, " token"]

    @classmethod
    @torch.no_grad()
    def read(cls, model: Any, batches: Iterable[TokenBatch], progress: bool = True) -> TeacherText:
        """Run a teacher over the text.

        Raises:
            CapacityError: where it lacks a token or a position, its logits are not its head's, or it gives what is not
                finite.
        """
        batches, states, groups, seen = tuple(batches), list[Tensor](), list[NDArray[np.int64]](), 0
        with evaluating(model), token_progress(None, progress, "reading the teacher") as advance:
            for batch in batches:
                check_token_ids(model, batch.ids, "the teacher")
                check_row_length(model, batch.tokens, "the teacher")
                tokens, places, labels = model_inputs(batch.tokens, device_of(model))
                if not seen:
                    check_head(model, tokens, "compared with rivals")
                states.append(at_places(last_hidden(model, tokens), places))
                groups.append(np.repeat(document_groups(batch.documents), predicted_of(batch.tokens)))
                advance(seen := seen + len(labels))
        hidden = torch.cat(states)
        if not bool(torch.isfinite(hidden).all()):
            raise CapacityError("the teacher's last hidden states are NaN or infinite: check the model")
        return cls(batches, hidden, head_of(model), np.concatenate(groups))

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """[group] predicted tokens of each document group."""
        return np.bincount(self.groups, minlength=DOCUMENT_GROUPS).astype(np.int64)
