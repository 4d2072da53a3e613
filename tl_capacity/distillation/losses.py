"""Losses of distillation: how far a student's next-token distribution is from its teacher's.

They are computed from hidden states, a chunk of tokens at a time.

A divergence is a plain function from log-probabilities to its value and its gradient. `chunked_losses` takes the
gradient in the forward pass, so that the logits of a whole batch never exist, and computes the teacher's distribution
once for all students. liger-kernel's `chunked_loss` (0.8.5) chunks likewise and runs on a CPU too, but takes one
student at a time, with the teacher's logits computed anew for each, sums the loss in float32, and needs triton to
install.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tl_capacity.distillation.settings import DIVERGENCES, MATCH_KINDS, LogitLoss
from tl_capacity.distillation.settings import HiddenMatch as HiddenMatch
from tl_capacity.errors import CapacityError
from tl_capacity.models.head import Head as Head
from tl_capacity.models.head import cached_pieces, cached_tokens, log_and_probabilities, tokens_at_once
from tl_capacity.runtime.compiling import Compiled, compiling_wanted
from tl_capacity.runtime.devices import exact, exact_device
from tl_capacity.runtime.precision import beneath_autocast, rounded_products
from tl_capacity.runtime.scratch import Scratch

Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(log_p, p, log_q, q)` → value [token] and gradient [token, vocabulary] with respect to the student's logits.

The gradient takes the place of `log_q`.
"""

Probabilities = Float[Tensor, "token vocabulary"]

LOSS_TOKENS = 512
"""Tokens whose logits exist at one time on a CPU. Products of large blocks are faster, and their memory is little
beside that of a training step.
"""


def forward_kl(
    log_p: Probabilities, p: Probabilities, log_q: Probabilities, q: Probabilities
) -> tuple[Float[Tensor, " token"], Probabilities]:
    """KL(p ‖ q) = Σ p (log p − log q) of teacher p and student q; its gradient is q − p (Hinton et al. 2015,
    arXiv:1503.02531).
    """
    value = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1)
    return value, torch.sub(q, p, out=log_q)


def reverse_kl(
    log_p: Probabilities, p: Probabilities, log_q: Probabilities, q: Probabilities
) -> tuple[Float[Tensor, " token"], Probabilities]:
    """KL(q ‖ p) = Σ q (log q − log p); its gradient is q (log q − log p − KL) (Gu et al. 2024, arXiv:2306.08543)."""
    ratio = log_q.sub_(log_p)
    value = torch.linalg.vecdot(q, ratio)
    return value, ratio.sub_(value[:, None]).mul_(q)


def generalised_jsd(beta: float) -> Divergence:
    """Generalised Jensen–Shannon divergence β KL(p ‖ m) + (1−β) KL(q ‖ m) with m = βp + (1−β)q (Agarwal et al. 2024,
    arXiv:2306.13649).

    β is TRL's: as there, 0 means forward and 1 reverse KL, which the formula approaches only after division by β(1−β).
    Its gradient is (1−β) q (log q/m − KL(q ‖ m)).

    Args:
        beta: β, from 0 to 1, as `LogitLoss` makes sure.
    """
    if beta in (0, 1):
        return reverse_kl if beta else forward_kl

    def divergence(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log(beta), log_q + log(1 - beta))
        ratio = log_q.sub_(log_m)
        teacher = torch.sub(log_p, log_m, out=log_m).mul_(p).sum(-1)
        student = torch.linalg.vecdot(q, ratio)
        return beta * teacher + (1 - beta) * student, ratio.sub_(student[:, None]).mul_(q).mul_(1 - beta)

    return divergence


def divergence_of(loss: LogitLoss) -> Divergence:
    """The divergence that a loss names, as a function."""
    functions = (forward_kl, reverse_kl, generalised_jsd(loss.beta))
    return dict(zip(DIVERGENCES, functions, strict=True))[loss.divergence]


@lru_cache
def compiled_divergence(
    name: str, beta: float, wanted: str | None
) -> Compiled[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From `(log_p, logits)` to a divergence [token] of p and the softmax of the logits, and its gradient. A compiler
    makes two passes over the logits of this. The gradient does not take their place (`Compiled`).

    Args:
        name, beta: of the divergence, as in `LogitLoss`.
        wanted: what `compiling_wanted` says.
    """
    divergence = divergence_of(LogitLoss(name, beta=beta))

    def with_gradient(log_p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(logits, -1)
        return divergence(log_p, log_p.exp(), log_q, log_q.exp())

    return Compiled(with_gradient, wanted)


HELDOUT_LOSS = LogitLoss()
"""The loss that every student is judged by, whatever it was trained with: forward KL at T = 1, in nats per token."""


@dataclass(frozen=True)
class Output:
    """A language model's hidden states and head at some tokens.

    Attributes:
        hidden: hidden states behind its last norm.
        head: what turns them into logits.
        states: activations at further hook points, by name.
    """

    hidden: Float[Tensor, "token d_model"]
    head: Head
    states: Mapping[str, Float[Tensor, "token width"]] = field(default_factory=dict)


def chunked_losses(
    teacher: Output,
    students: Sequence[Output],
    labels: Int[Tensor, " token"],
    loss: LogitLoss,
    total: int | None = None,
    scratch: Scratch | None = None,
) -> Float[Tensor, " student"]:
    """The loss of each student in float64: the sum over the tokens, divided by `total` (default: their number).

    Gradients reach the students' hidden states, head weights and biases and are exact: chunks only order the sums.
    Beneath autocast the inputs of the products are rounded (`rounded_products`), as those of the blocks are.

    Args:
        labels: the next token of each, for the cross-entropy.
        total: what to divide by, where these tokens are a part of a larger batch.
        scratch: memory for these, where it is kept from one call to the next.

    Raises:
        CapacityError: where a student has another vocabulary than the teacher.
    """
    for student in students:
        if student.head.weight.shape[0] != teacher.head.weight.shape[0]:
            raise CapacityError(
                f"the student's vocabulary has {student.head.weight.shape[0]:,} tokens and the teacher's"
                f" {teacher.head.weight.shape[0]:,}: use models with the same tokenizer and vocabulary size"
            )
    task = _Task(
        teacher,
        [s.head.cap for s in students],
        labels,
        loss,
        divergence_of(loss),
        total or max(1, len(labels)),
        scratch or Scratch(),
    )
    apply: Any = _ChunkedLosses.apply  # which has no annotations
    losses: Tensor = apply(task, *(part for s in students for part in (s.hidden, s.head.weight, s.head.bias)))
    return losses


@dataclass(frozen=True)
class _Task:
    """The arguments of `chunked_losses`, except the tensors that need gradients."""

    teacher: Output
    caps: list[float | None]
    labels: Tensor
    loss: LogitLoss
    divergence: Divergence
    total: int
    scratch: Scratch

    def compiled(self, cap: float | None) -> Compiled[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """The compiled divergence, where the loss is nothing else and the student's logits have no cap."""
        if cap is not None or self.loss.ce_weight:
            return None
        return compiled_divergence(self.loss.divergence, self.loss.beta, compiling_wanted())


@dataclass
class _Target:
    """The teacher's distribution on a chunk of tokens.

    Attributes:
        log_p: the logarithm of its probabilities.
        memory: for the probabilities.
        known: whether they are there already.
    """

    log_p: Tensor
    memory: Tensor
    known: bool = True

    @property
    def p(self) -> Tensor:
        """The probabilities."""
        if not self.known:
            torch.exp(self.log_p, out=self.memory)
            self.known = True
        return self.memory


class _ChunkedLosses(torch.autograd.Function):
    """The losses, and their gradients from the same pass over the chunks.

    The backward pass only scales them if it must.
    """

    @staticmethod
    def forward(ctx: Any, task: _Task, *parts: Tensor | None) -> Tensor:
        students_parts: Any = zip(parts[0::3], parts[1::3], parts[2::3], task.caps, strict=True)
        students = [_Student(any(ctx.needs_input_grad), *student_parts) for student_parts in students_parts]
        teacher, temperature = task.teacher, task.loss.temperature
        device, vocabulary = task.labels.device, teacher.head.weight.shape[0]
        chunk = tokens_at_once(len(task.labels), vocabulary, device, LOSS_TOKENS)
        sizes = [tokens * vocabulary for tokens in (chunk, chunk, chunk, cached_tokens(chunk, vocabulary, device))]
        buffers = [
            part.view(-1, vocabulary)
            for part in torch.split(task.scratch.take(sum(sizes), students[0].head.weight), sizes)
        ]
        with rounded_products(device) if beneath_autocast(device) else nullcontext():
            for start in range(0, len(task.labels), chunk):
                rows = slice(start, min(start + chunk, len(task.labels)))
                log_p, p, logits, q = (buffer[: rows.stop - start] for buffer in buffers)
                if all(each is not None and each.due(device) for each in map(task.compiled, task.caps)):
                    teacher.head.logits(teacher.hidden[rows], logits, temperature)
                    target = _Target(torch.log_softmax(logits, -1, out=log_p), p, known=False)
                else:
                    teacher.head.logits(teacher.hidden[rows], log_p, temperature)
                    target = _Target(*log_and_probabilities(log_p, p))
                for student in students:
                    student.add(rows, task, target, logits, q)
        ctx.save_for_backward(*(gradient for student in students for gradient in student.gradients))
        return torch.stack([student.loss for student in students]) / task.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        known = upstream.device.type == "cpu"  # to read it elsewhere would wait for the device
        weights: Any = upstream.tolist() if known else upstream
        # Of a sum over students each weight is 1, which needs no copy of a gradient.
        scaled = (
            gradient if gradient is None or (known and weights[i // 3] == 1) else gradient * weights[i // 3]
            for i, gradient in enumerate(ctx.saved_tensors)
        )
        return None, *scaled


class _Student:
    """One student's hidden states and head, its loss, and the gradients, summed over chunks."""

    def __init__(
        self, with_gradient: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None
    ) -> None:
        # Under autocast the trunk's output is of lower precision.
        self.hidden, self.head = hidden.to(weight.dtype), Head(weight, bias, cap)
        self.loss = torch.zeros((), dtype=torch.float64, device=exact_device(hidden.device))
        self.of_hidden = torch.empty_like(self.hidden) if with_gradient else None
        # Transposed, because a product with many columns is up to 1.8 times as fast as one with as many rows.
        self.of_weight = weight.new_zeros(weight.shape[::-1]) if with_gradient else None
        self.of_bias = torch.zeros_like(bias) if with_gradient and bias is not None else None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the loss with respect to hidden states, weight and bias."""
        return self.of_hidden, None if self.of_weight is None else self.of_weight.T, self.of_bias

    def add(self, rows: slice, task: _Task, target: _Target, logits: Tensor, q: Tensor) -> None:
        """Add the loss and the gradients of a chunk, given the teacher's distribution on it.

        Args:
            rows: which tokens.
            task: of all students.
            target: the teacher's distribution on these.
            logits: memory for the student's logits [token, vocabulary].
            q: memory for its probabilities, for as many tokens as are worked on at once.
        """
        hidden = self.hidden[rows]
        self.head.logits(hidden, logits, task.loss.temperature)
        compiled = task.compiled(self.head.cap)
        found = None if compiled is None else compiled(logits.device, target.log_p, logits)
        if found is None:
            log_p, p, labels = target.log_p, target.p, task.labels[rows]
            pieces = cached_pieces(len(logits), logits.shape[1], logits.device)
            values = [self._replace_by_gradient(task, labels[s], log_p[s], p[s], logits[s], q) for s in pieces]
            found = torch.cat(values), logits
        value, gradient = found
        self.loss += exact(value).sum() * (1 - task.loss.ce_weight) * task.loss.temperature**2
        if self.of_hidden is not None and self.of_weight is not None:
            # Without the text's own loss a factor of T is left for here: T² · ∂(logits/T)/∂logits.
            share = (1 if task.loss.ce_weight else task.loss.temperature) / task.total
            torch.addmm(self.of_hidden[rows], gradient, self.head.weight, beta=0, alpha=share, out=self.of_hidden[rows])
            self.of_weight.addmm_(hidden.T, gradient, alpha=share)
            if self.of_bias is not None:
                self.of_bias.add_(gradient.sum(0), alpha=share)

    def _replace_by_gradient(
        self, task: _Task, labels: Tensor, log_p: Tensor, p: Tensor, logits: Tensor, q: Tensor
    ) -> Tensor:
        """The divergence at some tokens [token].

        The gradient of their loss takes the place of their logits, which were divided by the temperature. `q` is
        overwritten.
        """
        loss, temperature = task.loss, task.loss.temperature
        # The slope of the cap's tanh.
        slope = None if self.head.cap is None else 1 - (logits * (temperature / self.head.cap)).square_()
        hard = torch.log_softmax(logits * temperature, -1) if loss.ce_weight else None
        value, gradient = task.divergence(log_p, p, *log_and_probabilities(logits, q[: len(logits)]))
        if hard is not None:
            label = labels[:, None]
            self.loss -= exact(hard.gather(1, label)).sum() * loss.ce_weight
            of_hard = hard.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=hard.dtype))
            gradient.mul_((1 - loss.ce_weight) * temperature).add_(of_hard, alpha=loss.ce_weight)
        if slope is not None:
            gradient.mul_(slope)
        return value


def mean_square(
    student: Float[Tensor, "token width"], teacher: Float[Tensor, "token width"]
) -> Float[Tensor, " token"]:
    """Mean squared difference of mapped student states and teacher states (Romero et al. 2015, arXiv:1412.6550;
    TinyBERT, arXiv:1909.10351).
    """
    return (student - teacher).square().mean(-1)


def cosine(student: Float[Tensor, "token width"], teacher: Float[Tensor, "token width"]) -> Float[Tensor, " token"]:
    """1 − cosine of the angle between mapped student states and teacher states (DistilBERT, arXiv:1910.01108)."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


MATCHES = dict(zip(MATCH_KINDS, (mean_square, cosine), strict=True))
"""Distance of mapped student states from teacher states, by the names that `HiddenMatch` uses."""


def feature_loss(
    logits: Float[Tensor, "token chosen"],
    values: Float[Tensor, "token chosen"],
    latents: Float[Tensor, "token chosen"],
    rate: Float[Tensor, " chosen"],
    square: Float[Tensor, " chosen"],
) -> Float[Tensor, " token"]:
    """How badly a readout tells some features: ½ · mean over features of CE(σ(u), f) / H(p) + f (v − z)² / E[z²].

    f is 1 where a feature fires, z ≠ 0, and CE the cross-entropy of the readout's logit u. H(p) is the entropy of its
    firing rate, so the first term is 1 on average where the readout knows no more than the rate. The second is of the
    tokens on which the feature fires, and 1 on average where v = 0. Both are 0 where all is told, so that rare and
    frequent features, weak and strong ones, weigh alike.

    Args:
        logits: u of each feature: whether it fires.
        values: v: how strongly, where it does.
        latents: z of the teacher.
        rate: p, the share of the tokens on which each feature fires, above 0 and below 1.
        square: E[z²] of each feature over all tokens, above 0.
    """
    fires = (latents != 0).to(logits.dtype)
    entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
    firing = F.binary_cross_entropy_with_logits(logits, fires, reduction="none") / entropy
    strength = fires * (values - latents).square() / square
    return (firing + strength).mean(-1) / 2
