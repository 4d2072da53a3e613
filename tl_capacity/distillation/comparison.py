"""Compare next-token distributions of a teacher and any students, from their hidden states.

It takes a chunk of tokens at a time, so that the logits of a whole batch never exist at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tl_capacity.errors import CapacityError
from tl_capacity.models.forward import at_places, forward_options
from tl_capacity.models.head import (
    Head,
    cached_pieces,
    cached_tokens,
    check_head,
    head_of,
    last_hidden,
    log_and_probabilities,
    tokens_at_once,
)
from tl_capacity.runtime.devices import exact, exact_device
from tl_capacity.runtime.scratch import Scratch

GROUP = 256
"""Size of the groups of logits in which the likeliest token is looked for."""


@runtime_checkable
class Logits(Protocol):
    """Anything that turns a model's hidden states into logits."""

    def logits(
        self, hidden: Float[Tensor, "token width"], out: Float[Tensor, "token vocabulary"]
    ) -> Float[Tensor, "token vocabulary"]:
        """Write the logits of some tokens into `out`."""
        ...


class LogitsThemselves:
    """Stands in for the head of a model whose hidden states are already its logits."""

    def logits(
        self, hidden: Float[Tensor, "token width"], out: Float[Tensor, "token vocabulary"]
    ) -> Float[Tensor, "token vocabulary"]:
        """Copy the first logits into `out`."""
        return out.copy_(hidden[:, : out.shape[1]])


@dataclass(frozen=True)
class Predicted:
    """What a model predicts after some tokens.

    Attributes:
        hidden: hidden states behind its last norm.
        head: what turns them into logits.
    """

    hidden: Float[Tensor, "token width"]
    head: Logits


@dataclass(frozen=True)
class Predictor:
    """A model that predicts the next token.

    Attributes:
        model: a Hugging Face or TransformerLens causal language model.
        vocabulary: logits that it has.
        head: what turns its last hidden states into logits; None for an architecture in which nothing linear does, of
            which the logits are computed row by row.
    """

    model: Any
    vocabulary: int
    head: Head | None

    @classmethod
    def of(cls, model: Any, row: Int[Tensor, "one position"]) -> Predictor:
        """A model that can be run, and its head if it has one, as a forward pass over one row of tokens shows it."""
        with torch.no_grad():
            output = model(row[:, :2], **forward_options(model))
        vocabulary = int(getattr(output, "logits", output).shape[-1])
        try:
            head = head_of(model)
            if not isinstance(head.weight, Tensor) or len(head.weight) != vocabulary:
                raise CapacityError("its head is not a matrix")  # as where it was quantised
            check_head(model, row, "judged")
        except (CapacityError, AttributeError, RuntimeError, TypeError):
            return cls(model, vocabulary, None)
        return cls(model, vocabulary, head)

    def __call__(
        self, tokens: Int[Tensor, "row position"], places: Int[Tensor, " token"], vocabulary: int
    ) -> Predicted:
        """The predictions at some places of all rows together. Rows are padded on the right, where causal models do not
        look.

        Args:
            vocabulary: logits to keep, the first so many.
        """
        if self.head is None:
            output = self.model(tokens, **forward_options(self.model))
            return Predicted(at_places(getattr(output, "logits", output), places)[:, :vocabulary], LogitsThemselves())
        head = self.head
        if vocabulary < self.vocabulary:
            bias = None if head.bias is None else head.bias[:vocabulary]
            head = Head(head.weight[:vocabulary], bias, head.cap)
        return Predicted(at_places(last_hidden(self.model, tokens), places), head)


@dataclass(frozen=True)
class Compared:
    """How a teacher and its students predict the same tokens.

    Attributes:
        kl: KL(teacher ‖ student) at T = 1, in nats.
        cross_entropy: −log of the probability that each student gives to the token that came.
        teacher_cross_entropy: the same of the teacher.
        agreement: whether student and teacher find the same token likeliest.
    """

    kl: Float64[Tensor, "student token"]
    cross_entropy: Float64[Tensor, "student token"]
    teacher_cross_entropy: Float64[Tensor, " token"]
    agreement: Bool[Tensor, "student token"]

    def figures(self) -> Float64[Tensor, "figure student token"]:
        """All figures as numbers, in the order of `judged.MEANS`."""
        own = self.teacher_cross_entropy.expand_as(self.kl)
        return torch.stack([self.kl, self.cross_entropy, own, exact(self.agreement)])


def likeliest(logits: Float[Tensor, "token vocabulary"]) -> Int[Tensor, " token"]:
    """The token with the largest logit; the first one if several are equal, as with `argmax`.

    It is looked for in the group of tokens that has the largest logit. Over a whole vocabulary `argmax` takes several
    times as long on a CPU, where it compares one number at a time.
    """
    vocabulary = logits.shape[1]
    whole = vocabulary // GROUP * GROUP
    groups = [logits[:, :whole].unflatten(1, (-1, GROUP)).amax(-1)] if whole else []
    groups += [logits[:, whole:].amax(-1, keepdim=True)] if whole < vocabulary else []
    first = torch.cat(groups, 1).argmax(-1, keepdim=True) * GROUP
    places = (first + torch.arange(GROUP, device=logits.device)).clamp_(max=vocabulary - 1)
    return (first + logits.gather(1, places).argmax(-1, keepdim=True))[:, 0]


@torch.no_grad()
def compare_models(
    predictors: Sequence[Predictor],
    tokens: Int[Tensor, "row position"],
    places: Int[Tensor, " token"],
    labels: Int[Tensor, " token"],
    vocabulary: int,
    scratch: Scratch,
) -> Compared:
    """Compare how several models predict some places of all rows together. The teacher comes first; see `compare`."""
    teacher, *students = (predictor(tokens, places, vocabulary) for predictor in predictors)
    return compare(teacher, students, labels, vocabulary, scratch)


@torch.no_grad()
def compare(
    teacher: Predicted,
    students: Sequence[Predicted],
    labels: Int[Tensor, " token"],
    vocabulary: int,
    scratch: Scratch,
) -> Compared:
    """Compare the next-token distributions of a teacher and its students.

    Logits exist for a chunk of tokens at a time, those of the teacher once for all students.

    Args:
        labels: the token that came after each.
        vocabulary: logits that all of them have.
        scratch: memory for them, kept from one call to the next.
    """
    shape, device = (len(students), len(labels)), labels.device
    kl, cross_entropy = (torch.zeros(shape, dtype=torch.float64, device=exact_device(device)) for _ in range(2))
    own = torch.zeros(len(labels), dtype=torch.float64, device=exact_device(device))
    agreement = torch.zeros(shape, dtype=torch.bool, device=device)
    size = tokens_at_once(len(labels), vocabulary, device)
    at_once = cached_tokens(size, vocabulary, device)
    buffers = scratch.take((3 * size + at_once) * vocabulary, torch.empty(0, device=device)).view(-1, vocabulary)
    *whole, piece = torch.split(buffers, [size, size, size, at_once])
    for start in range(0, len(labels), size):
        rows = slice(start, min(start + size, len(labels)))
        log_p, p, logits = (buffer[: rows.stop - start] for buffer in whole)
        label = labels[rows, None]
        teacher.head.logits(teacher.hidden[rows], log_p)
        best_token = likeliest(log_p)[:, None]
        log_and_probabilities(log_p, p)
        own[rows] = exact(-log_p.gather(1, label)[:, 0])
        for number, student in enumerate(students):
            student.head.logits(student.hidden[rows], logits)
            for some in cached_pieces(len(label), vocabulary, device):
                at = slice(start + some.start, start + some.stop)
                log_q = torch.log_softmax(logits[some], -1, out=piece[: some.stop - some.start])
                best = log_q.amax(-1, keepdim=True)
                agreement[number, at] = (log_q.gather(1, best_token[some]) >= best)[:, 0]
                cross_entropy[number, at] = exact(-log_q.gather(1, label[some])[:, 0])
                difference = torch.sub(log_p[some], log_q, out=log_q)
                kl[number, at] = exact(torch.linalg.vecdot(p[some], difference))
    return Compared(kl, cross_entropy, own, agreement)
