"""A language model's head and the divergence of two, from hidden states to gradients: ours, the bare products that all
need, liger-kernel's and TRL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from neox import compiled
from torch.nn import functional as F

from tl_capacity.distillation.losses import LOSS_TOKENS, Head, Output, chunked_losses
from tl_capacity.distillation.settings import LogitLoss
from tl_capacity.models.head import tokens_at_once
from tl_capacity.runtime.scratch import Scratch


@dataclass(frozen=True)
class HeadShapes:
    """Sizes of two heads and the tokens."""

    tokens: int
    teacher: int
    student: int
    vocabulary: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def outputs(shapes: HeadShapes, dtype: torch.dtype | None = None) -> tuple[Output, Output]:
    """Hidden states and heads of a teacher and a student. Their logits are about as sharp as a trained model's."""
    random = torch.Generator(shapes.device).manual_seed(2)
    drawn = []
    for width in (shapes.teacher, shapes.student):
        hidden, weight = (
            torch.randn(size, width, generator=random, device=shapes.device)
            for size in (shapes.tokens, shapes.vocabulary)
        )
        weight *= 2 / width**0.5
        # Rounded as they are timed, so that every precision has the same numbers.
        hidden, weight = (part.to(shapes.dtype).to(dtype or shapes.dtype) for part in (hidden, weight))
        drawn.append(Output(hidden, Head(weight)))
    for part in (drawn[1].hidden, drawn[1].head.weight):
        part.requires_grad_()
    return drawn[0], drawn[1]


Loss = Callable[[Output, Output], torch.Tensor]
"""From a teacher's and a student's hidden states and heads to the mean forward KL of the tokens at T = 1."""


def ours(at_once: bool = False) -> Loss:
    """Ours, compiled at once or not at all."""
    scratch = Scratch()

    def loss(of: Output, student: Output) -> torch.Tensor:
        labels = torch.zeros(len(of.hidden), dtype=torch.long, device=of.hidden.device)
        with compiled(at_once):
            return chunked_losses(of, [student], labels, LogitLoss(), scratch=scratch).sum()

    return loss


def ours_rounded() -> Loss:
    """Ours beneath autocast, where the inputs of the products are rounded to bfloat16 or TF32."""
    loss = ours()

    def call(of: Output, student: Output) -> torch.Tensor:
        with torch.autocast(of.hidden.device.type, torch.bfloat16):
            return loss(of, student)

    return call


def ligers() -> Loss:
    """liger-kernel's chunked loss, whose generalised JSD is forward KL at β = 0. It is compiled, as by default.

    Raises:
        ImportError: where it is not installed.
    """
    library: Any = import_module("liger_kernel.chunked_loss")
    loss = library.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def call(of: Output, student: Output) -> torch.Tensor:
        labels = torch.zeros(len(of.hidden), dtype=torch.long, device=of.hidden.device)
        result: torch.Tensor = loss(student.hidden, student.head.weight, of.hidden, of.head.weight, labels)
        return result

    return call


def trls() -> Loss:
    """TRL's loss of GKD, whose generalised JSD is forward KL at β = 0. It needs the logits of the whole batch.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        trainer: Any = import_module("trl.experimental.gkd").GKDTrainer
    except ModuleNotFoundError:
        trainer = import_module("trl").GKDTrainer  # where it was at first

    def call(of: Output, student: Output) -> torch.Tensor:
        with torch.no_grad():
            target = of.hidden @ of.head.weight.T
        logits = student.hidden @ student.head.weight.T
        loss: torch.Tensor = trainer.generalized_jsd_loss(logits[None], target[None], beta=0.0, reduction="sum")
        return loss / len(logits)

    return call


def peers() -> Iterator[tuple[str, Loss | None, str]]:
    """`(name, loss or None, why there is none)` for other libraries' losses."""
    for name, make in (("liger-kernel", ligers), ("TRL", trls)):
        loss, why = None, ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TRL's of what is experimental
                loss = make()
        except (ImportError, RuntimeError) as problem:  # transformers' lazy imports raise either
            missing = isinstance(problem, ModuleNotFoundError)
            why = "not installed" if missing else f"cannot be imported: {problem}"
        yield name, loss, why


def with_gradients(loss: Loss, shapes: HeadShapes) -> Callable[[], object]:
    """Compute a loss and its gradients from hidden states."""
    of, student = outputs(shapes)

    def once() -> object:
        student.hidden.grad = student.head.weight.grad = None
        value = loss(of, student)
        value.backward()
        return value

    return once


def four_gemms(shapes: HeadShapes) -> Callable[[], object]:
    """The products that every head needs, chunk by chunk as ours, into existing buffers."""
    of, student = outputs(shapes)
    chunk = tokens_at_once(shapes.tokens, shapes.vocabulary, torch.device(shapes.device), LOSS_TOKENS)
    place: dict[str, Any] = {"device": shapes.device, "dtype": shapes.dtype}
    buffers = torch.empty(2, chunk, shapes.vocabulary, **place)
    of_hidden = torch.empty(shapes.tokens, shapes.student, **place)
    of_weight = torch.zeros(shapes.student, shapes.vocabulary, **place)

    @torch.no_grad()
    def once() -> object:
        for start in range(0, shapes.tokens, chunk):
            rows = slice(start, start + chunk)
            count = len(of.hidden[rows])
            torch.mm(of.hidden[rows], of.head.weight.T, out=buffers[0, :count])
            gradient = torch.mm(student.hidden[rows], student.head.weight.T, out=buffers[1, :count])
            torch.mm(gradient, student.head.weight, out=of_hidden[rows])
            of_weight.addmm_(student.hidden[rows].T, gradient)
        return of_weight

    return once


def gradient_error(loss: Loss, shapes: HeadShapes) -> float:
    """Largest error of a gradient as a share of its largest entry, against autograd through the
    definition in float64.
    """
    of, student = outputs(shapes)
    loss(of, student).backward()
    of64, student64 = outputs(shapes, torch.float64)
    log_p, log_q = ((o.hidden @ o.head.weight.T).log_softmax(-1) for o in (of64, student64))
    F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()
    errors = []
    for gradient, expected in (
        (student.hidden.grad, student64.hidden.grad),
        (student.head.weight.grad, student64.head.weight.grad),
    ):
        assert gradient is not None
        assert expected is not None
        errors.append(float((gradient.double() - expected).abs().max() / expected.abs().max()))
    return max(errors)
