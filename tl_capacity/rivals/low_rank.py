"""Low-rank logits W h_t + b, with a free h_t for each token, fitted to a teacher.

This is exponential-family PCA (Collins, Dasgupta & Schapire 2001).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.distillation.losses import HELDOUT_LOSS, Output, chunked_losses
from tl_capacity.errors import CapacityError
from tl_capacity.models.head import Head, tokens_at_once
from tl_capacity.options import option
from tl_capacity.rivals.text import TeacherText
from tl_capacity.runtime.devices import exact, exact_device
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.documents import DOCUMENT_GROUPS

STRIDE = 20
"""Iterations between two checks of the fit's progress."""
HISTORY = 10
"""Steps that L-BFGS remembers. Each takes twice the memory of the parameters."""
NEGLIGIBLE = 1e-9
"""A direction is left out if its eigenvalue of a Fisher information is below this share of the largest: it moves no
probability.
"""
CAPPED = 1e-3
"""Share of the plain metric that is mixed in for a teacher with capped logits.

The Fisher information there is of the logits behind the cap.
"""
RARE = 0.01
"""Vocabulary entries with fewer expected occurrences in the text than this all count as equally rare."""


@dataclass(frozen=True)
class BoundSettings:
    """When a fit stops.

    Attributes:
        iterations: of L-BFGS at most.
        tolerance: it stops before that once twenty iterations lower the KL by less than this share.

    Raises:
        CapacityError: on a value outside its domain.
    """

    iterations: int = option(200, "Most iterations of the search for the rank bound, for each width.", least=1)
    tolerance: float = option(
        0.02, "The search stops earlier if twenty iterations lower the bound by less than this share."
    )

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise CapacityError(f"iterations = {self.iterations} search for nothing: ask for at least 1")
        if not 0 <= self.tolerance < 1:
            raise CapacityError(
                f"tolerance = {self.tolerance:g} is not a share of the KL: choose one from 0 to below 1"
            )


@dataclass(frozen=True)
class LowRank:
    """Logits W h_t + b of some tokens, before the teacher's cap if it has one."""

    weight: Float[Tensor, "vocabulary d"]
    bias: Float[Tensor, " vocabulary"]
    states: Float[Tensor, "token d"]

    @property
    def rank(self) -> int:
        """d."""
        return self.states.shape[1]


@dataclass(frozen=True)
class Fit:
    """Low-rank logits after a fit to a teacher.

    Attributes:
        low_rank: the logits.
        iterations: of the search.
        gain: the share by which its last twenty iterations lowered the KL; 0 where there was nothing to search.
    """

    low_rank: LowRank
    iterations: int
    gain: float


@dataclass(frozen=True)
class Directions:
    """The teacher's logits in coordinates, ordered by how much it costs to leave them out, to second order.

    For logits that differ by δ, KL ≈ ½ δᵀ F δ with the Fisher information F = diag(p) − p pᵀ. If F is averaged over the
    tokens, the best logits of rank d are the d leading principal components of G^½ x, with last hidden states x and
    G = W_Tᵀ E[F] W_T. Everything is of the hidden states' size: no logits are kept.

    Attributes:
        whole: the teacher's logits in these coordinates, but for what moves no probability.
        frequency: mean probability of each vocabulary entry.
        spread: standard deviation of each coordinate.
    """

    whole: LowRank
    frequency: Float[Tensor, " vocabulary"]
    spread: Float[Tensor, " d"]

    def leading(self, rank: int) -> LowRank:
        """The logits that keep this many coordinates."""
        whole = self.whole
        return LowRank(whole.weight[:, :rank].contiguous(), whole.bias, whole.states[:, :rank].contiguous())


@torch.no_grad()
def leading_directions(text: TeacherText) -> Directions:
    """A teacher's logits in coordinates, the most costly ones to lose first."""
    head, hidden, device = text.head, exact(text.hidden), text.hidden.device
    weight = exact(head.weight)
    frequency, moment = _mean_fisher_parts(text)
    gram = weight.T @ weight
    fisher = weight.T @ (frequency[:, None] * weight) - moment
    if head.cap is not None:  # then no direction moves all logits alike, and none may be left out
        fisher = fisher + CAPPED * fisher.trace() / gram.trace() * gram
    values, vectors = torch.linalg.eigh(fisher)
    kept = values > values.max() * NEGLIGIBLE
    root, inverse = vectors[:, kept] * values[kept].sqrt(), vectors[:, kept] / values[kept].sqrt()
    mean = hidden.mean(0)
    coordinates = (hidden - mean) @ root
    variances, directions = torch.linalg.eigh(coordinates.T @ coordinates / len(hidden))
    kept = variances > variances.max() * NEGLIGIBLE
    directions, variances = directions[:, kept].flip(1), variances[kept].flip(0)
    bias = weight @ mean if head.bias is None else weight @ mean + exact(head.bias)
    whole = [part.float().to(device) for part in (weight @ inverse @ directions, bias, coordinates @ directions)]
    return Directions(LowRank(*whole), frequency.float().to(device), variances.sqrt().float().to(device))


def _mean_fisher_parts(text: TeacherText) -> tuple[Float64[Tensor, " vocabulary"], Float64[Tensor, "d_model d_model"]]:
    """E[p] and E[(W_Tᵀ p)(W_Tᵀ p)ᵀ], a chunk of tokens at a time."""
    head, hidden, device = text.head, text.hidden, exact_device(text.hidden.device)
    vocabulary, width = head.weight.shape
    frequency = torch.zeros(vocabulary, dtype=torch.float64, device=device)
    moment = torch.zeros(width, width, dtype=torch.float64, device=device)
    chunk = tokens_at_once(len(hidden), vocabulary, hidden.device)
    weight, buffer = head.weight.float(), hidden.new_empty(chunk, vocabulary, dtype=torch.float32)
    for rows in torch.split(hidden, chunk):
        p = torch.softmax(head.logits(rows, buffer[: len(rows)]), -1)
        expected = exact(p @ weight)
        frequency += exact(p).sum(0)
        moment += expected.T @ expected
    return frequency / len(text), moment / len(text)


def fitted(
    text: TeacherText,
    directions: Directions,
    rank: int,
    settings: BoundSettings,
    advance: Callable[[int], None] = lambda done: None,
) -> Fit:
    """Logits of some rank with the least KL from the teacher's that L-BFGS finds, starting at the leading directions.

    Rows of W are scaled by how often their vocabulary entry is expected and columns by the spread of their coordinate,
    so that the curvature is near 1 in all of them. Logits exist for a chunk of tokens at a time.

    Args:
        advance: is told how many iterations are done.
    """
    start = directions.leading(rank)
    if rank >= directions.whole.rank:
        return Fit(start, 0, 0.0)
    rows = (len(text) * directions.frequency).clamp(min=RARE).sqrt()
    scale = rows[:, None] * directions.spread[:rank]
    weight, bias, states = (
        part.clone().requires_grad_() for part in (start.weight * scale, start.bias * rows, start.states)
    )
    optimiser = torch.optim.LBFGS(
        [weight, bias, states],
        max_iter=STRIDE,
        history_size=HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    scratch, lowest, done, gain = Scratch(), float("inf"), 0, 1.0

    def divergence() -> Tensor:
        nonlocal lowest
        optimiser.zero_grad()
        loss = _total(text, LowRank(weight / scale, bias / rows, states), scratch)
        loss.backward()
        lowest = min(lowest, float(loss.detach()))
        return loss.detach()

    while done < settings.iterations and gain >= settings.tolerance and lowest > 0:
        before, stride = lowest, min(STRIDE, settings.iterations - done)
        optimiser.param_groups[0]["max_iter"] = stride
        optimiser.step(divergence)
        gain, done = 1.0 if done == 0 else 1 - lowest / before, done + stride
        advance(done)
    with torch.no_grad():
        return Fit(LowRank(weight / scale, bias / rows, states.detach()), done, gain)


@torch.no_grad()
def divergence_sums(text: TeacherText, low_rank: LowRank) -> NDArray[np.float64]:
    """KL(teacher ‖ low-rank logits), summed over the tokens of each document group [group], in nats."""
    sums, scratch = np.zeros(DOCUMENT_GROUPS), Scratch()
    for group in np.unique(text.groups):
        some = torch.from_numpy(np.flatnonzero(text.groups == group)).to(text.hidden.device)
        part = TeacherText((), text.hidden[some], text.head, text.groups[text.groups == group])
        states = low_rank.states[some]
        sums[group] = float(_total(part, LowRank(low_rank.weight, low_rank.bias, states), scratch))
    return sums


def _total(text: TeacherText, low_rank: LowRank, scratch: Scratch) -> Float64[Tensor, ""]:
    """KL summed over the tokens. Gradients reach the low-rank logits."""
    labels = torch.zeros(len(text), dtype=torch.int64, device=text.hidden.device)  # the text's own loss has no share
    student = Output(low_rank.states, Head(low_rank.weight, low_rank.bias, text.head.cap))
    losses = chunked_losses(Output(text.hidden, text.head), [student], labels, HELDOUT_LOSS, 1, scratch=scratch)
    return losses.squeeze(0)
