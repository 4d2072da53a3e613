"""Trains every model of a sweep at once.

A family of students is one stack of tensors. A step is five batched products on it; the gradient is written out.

x̂ = ReLU(WᵀW x + b) with W [width, feature]; the loss is E Σ Iᵢ (x̂ᵢ − yᵢ)², with y = x or, for distilled students, the
teacher's output. No model depends on what is trained beside it, so the stacks are worked off in chunks that fit a
core's cache, several at a time, and the result does not depend on how many threads there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.toy.features import zipf_importance
from tl_capacity.toy.sweep import Family, Stream, SweepSettings

BLOCK_STEPS = 16
"""Steps whose samples are drawn together. A checkpoint falls between two blocks."""
CACHE_FLOATS = 2**18
"""Pre-activations of a chunk: 1 MB of them stays in a core's cache."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state, by PyTorch's names."""

INITIAL, TRAINING, EVALUATION = range(3)
"""Uses of random numbers. Each use of a seed has its own generator."""


@dataclass(frozen=True)
class Stack:
    """Models of one shape in one tensor.

    A narrower model's missing rows are zero. Their gradients are exactly zero, so they stay zero.
    """

    weights: Float[Tensor, "stream student width feature"]
    bias: Float[Tensor, "stream student feature"]

    def chunk(self, streams: slice) -> Stack:
        return Stack(self.weights[streams], self.bias[streams])

    def output(self, x: Float[Tensor, "stream feature row"]) -> Float[Tensor, "stream student feature row"]:
        """x̂ = ReLU(WᵀW x + b)."""
        return self.hidden_and_preactivation(x)[1].relu_().view(*self.bias.shape, x.shape[-1])

    def hidden_and_preactivation(
        self, x: Float[Tensor, "stream feature row"]
    ) -> tuple[Float[Tensor, "model width row"], Float[Tensor, "model feature row"]]:
        """h = Wx and Wᵀh + b of all models: the students of the first stream, then those of the next."""
        streams, students, width, n = self.weights.shape
        hidden = torch.bmm(self.weights.reshape(streams, students * width, n), x).view(streams * students, width, -1)
        return hidden, torch.baddbmm(
            self.bias.reshape(-1, n, 1), self.weights.reshape(-1, width, n).transpose(1, 2), hidden
        )

    @property
    def at_zero(self) -> Float[Tensor, "stream student feature"]:
        """The output when no feature is active."""
        return self.bias.relu()


@dataclass(frozen=True)
class Objective:
    """The loss of one stream's students: (1−P₀)·E[Σ Iᵢ (x̂ᵢ − yᵢ)² | x ≠ 0] + P₀·Σ Iᵢ (ReLU(bᵢ) − y⁰ᵢ)².

    The second term needs no samples.

    Attributes:
        importance: Iᵢ.
        zero_probability: P₀ of each stream.
    """

    importance: Float[Tensor, " feature"]
    zero_probability: Float[Tensor, " stream"]

    @classmethod
    def for_streams(cls, n: int, streams: Sequence[Stream], slope: float, dtype: torch.dtype) -> Objective:
        """The loss on samples of some streams of n features, with importances i^−slope."""
        return cls(
            torch.from_numpy(zipf_importance(n, slope)).to(dtype),
            torch.tensor([stream.distribution.zero_probability for stream in streams], dtype=dtype),
        )

    def gradients(
        self,
        stack: Stack,
        x: Float[Tensor, "stream feature row"],
        target: Float[Tensor, "stream feature row"],
        target_at_zero: Float[Tensor, "stream feature"],
    ) -> tuple[Float[Tensor, "stream student width feature"], Float[Tensor, "stream student feature"]]:
        """Gradients of the mean loss over the rows, with respect to weights and bias."""
        streams, students, width, n = stack.weights.shape
        rows = x.shape[-1]
        hidden, preactivation = stack.hidden_and_preactivation(x)
        difference = (preactivation.view(streams, students, n, rows) - target[:, None]).view_as(preactivation)
        # ReLU's own gradient kernel: the difference where the unit is on, and there it is the error, else zero.
        error = torch.ops.aten.threshold_backward(difference, preactivation, 0)
        # Factors of a feature are applied to the small tensors on either side, which spares passes over the large one.
        scale = (2 / rows) * (1 - self.zero_probability)[:, None, None] * self.importance
        scale_weights = scale[:, None].expand(streams, students, 1, n)
        flat = (stack.weights * scale_weights).view(-1, width, n)
        hidden_gradient = torch.bmm(flat, error).view(streams, students * width, rows)
        weights = torch.bmm(hidden, error.transpose(1, 2)).view_as(stack.weights) * scale_weights
        weights += torch.bmm(hidden_gradient, x.transpose(1, 2)).view_as(stack.weights)
        at_zero = torch.where(stack.bias > 0, stack.bias - target_at_zero[:, None], 0)
        bias = (
            error.sum(-1).view_as(stack.bias) * scale
            + 2 * self.zero_probability[:, None, None] * self.importance * at_zero
        )
        return weights, bias

    def chunk(self, streams: slice) -> Objective:
        return Objective(self.importance, self.zero_probability[streams])


def generator(stream: Stream, use: int, *more: int) -> np.random.Generator:
    """The random numbers of one stream for one use. They do not depend on what else is trained."""
    distribution = stream.distribution
    return np.random.default_rng([stream.seed, use, distribution.n, round(distribution.alpha * 2**53), *more])


def initial_stack(family: Family, streams: Sequence[Stream], dtype: torch.dtype) -> Stack:
    """Initial weights from Xavier's normal distribution, as in Elhage et al. 2022, without bias.

    Each model has its own generator.
    """
    weights = torch.zeros(len(streams), len(family.widths), max(family.widths), family.n, dtype=dtype)
    for i, stream in enumerate(streams):
        for j, width in enumerate(family.widths):
            normal = generator(stream, INITIAL, width, family.teacher_width or 0).standard_normal((width, family.n))
            weights[i, j, :width] = torch.from_numpy(normal * (2 / (family.n + width)) ** 0.5)
    return Stack(weights, torch.zeros(len(streams), len(family.widths), family.n, dtype=dtype))


def _samples(stream: Stream, rows: int, block: int, dtype: torch.dtype) -> Float[Tensor, "feature row"]:
    """Block number `block` of a stream's training samples."""
    return torch.from_numpy(stream.distribution.sample_nonzero(rows, generator(stream, TRAINING, block))).to(dtype)


@dataclass(frozen=True)
class Chunk:
    """Some streams of a family during training: views of its stack, with their own Adam.

    Attributes:
        streams: which streams.
        teacher: a stack with one model per stream, or None where the students are trained on the data.
    """

    streams: slice
    stack: Stack
    objective: Objective
    teacher: Stack | None
    optimizer: torch.optim.Adam

    def train(self, x: Float[Tensor, "stream feature row"], learning_rates: Sequence[float]) -> None:
        """Take one step for each learning rate. The rows are shared out equally."""
        weights, bias = self.stack.weights, self.stack.bias
        target, at_zero = self._target(x)
        for rate, rows, wanted in zip(
            learning_rates, x.chunk(len(learning_rates), 2), target.chunk(len(learning_rates), 2), strict=True
        ):
            weights.grad, bias.grad = self.objective.gradients(self.stack, rows, wanted, at_zero)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()

    def _target(
        self, x: Float[Tensor, "stream feature row"]
    ) -> tuple[Float[Tensor, "stream feature row"], Float[Tensor, "stream feature"]]:
        """y, and its value when no feature is active."""
        if self.teacher is None:
            return x, x.new_zeros(x.shape[:2])
        return self.teacher.output(x)[:, 0], self.teacher.at_zero[:, 0]


def train(
    settings: SweepSettings,
    checkpoint: Path | None = None,
    advance: Callable[[int], None] = lambda steps: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Stack], dict[str, float]]:
    """Train all models of a sweep: first on the data, then the students of the teachers among them.

    It uses as many threads as PyTorch would.

    Args:
        checkpoint: a file to keep the state in; where it exists, training goes on from it.
        advance: called with the steps done so far, of both kinds together.
        dtype: float64 makes runs comparable to more digits than float32 rounding leaves.

    Returns:
        The stack of each family by its name, and the seconds that each kind took.

    Raises:
        CapacityError: where the checkpoint is damaged or of other settings, or cannot be written.
    """
    state = Checkpoint(checkpoint, settings.to_json())
    seconds: dict[str, float] = dict(state.about)
    stacks: dict[str, Stack] = {}
    with worker_threads() as workers:
        for i, kind in enumerate(settings.kinds):
            done = partial(_advance_from, advance, i * settings.steps)
            stacks |= _train_kind(settings, kind, stacks, state, seconds, workers, done, dtype)
    return stacks, seconds


def _train_kind(
    settings: SweepSettings,
    kind: str,
    finished: dict[str, Stack],
    state: Checkpoint,
    seconds: dict[str, float],
    workers: ThreadPoolExecutor,
    advance: Callable[[int], None],
    dtype: torch.dtype,
) -> dict[str, Stack]:
    """Train the families of one kind, starting from the checkpoint."""
    steps_done = int(state.tensors.get(f"{kind}.steps", torch.tensor(0)))
    streams = {n: settings.streams(n) for n in settings.features}
    stacks: dict[str, Stack] = {}
    tensors: dict[str, Tensor] = {}
    chunks: list[tuple[int, Chunk]] = []
    for family in settings.families(kind):
        saved = {name: value for name, value in state.tensors.items() if name.startswith(f"{family.name}.")}
        trained = saved or _fresh(family, streams[family.n], dtype)
        stacks[family.name] = Stack(trained[f"{family.name}.weights"], trained[f"{family.name}.bias"])
        tensors |= trained
        if steps_done < settings.steps:
            objective = Objective.for_streams(family.n, streams[family.n], settings.slope, dtype)
            chunks += [
                (family.n, chunk)
                for chunk in _chunks(
                    family, trained, objective, teacher_of(family, settings, finished), settings.batch, steps_done
                )
            ]

    before, started = seconds.get(kind, 0.0), time.monotonic()
    for first in range(steps_done, settings.steps, BLOCK_STEPS):
        steps = range(first, min(first + BLOCK_STEPS, settings.steps))
        rates = [settings.lr * (1 + cos(pi * step / settings.steps)) / 2 for step in steps]
        draw = partial(_samples, rows=len(steps) * settings.batch, block=first // BLOCK_STEPS, dtype=dtype)
        x = {n: torch.stack(list(workers.map(draw, streams[n]))) for n in settings.features}
        for task in [workers.submit(chunk.train, x[n][chunk.streams], rates) for n, chunk in chunks]:
            task.result()
        advance(steps.stop)
        seconds[kind] = round(before + time.monotonic() - started, 1)
        if state.due or steps.stop == settings.steps:
            state.save(_named(finished, settings) | tensors | {f"{kind}.steps": torch.tensor(steps.stop)}, seconds)
    return stacks


def teacher_of(family: Family, settings: SweepSettings, finished: dict[str, Stack]) -> Stack | None:
    """The trained models of the teacher's width, one for each stream."""
    if family.teacher_width is None:
        return None
    slot = settings.student_widths.index(family.teacher_width)
    trained = finished[Family(family.n, (), None).name]
    return Stack(
        trained.weights[:, slot : slot + 1, : family.teacher_width].contiguous(),
        trained.bias[:, slot : slot + 1].contiguous(),
    )


def _fresh(family: Family, streams: Sequence[Stream], dtype: torch.dtype) -> dict[str, Tensor]:
    """A family's tensors before the first step, by name, with Adam's moments."""
    stack = initial_stack(family, streams, dtype)
    tensors = {f"{family.name}.weights": stack.weights, f"{family.name}.bias": stack.bias}
    return tensors | {
        f"{name}.{moment}": torch.zeros_like(value) for name, value in tensors.items() for moment in MOMENTS
    }


def _chunks(
    family: Family, tensors: dict[str, Tensor], objective: Objective, teacher: Stack | None, batch: int, steps_done: int
) -> Iterator[Chunk]:
    """A family's streams in chunks. Each has an optimizer whose state is a view of the family's."""
    streams, students, n = tensors[f"{family.name}.bias"].shape
    size = max(1, CACHE_FLOATS // (students * n * batch))
    for chosen in (slice(first, first + size) for first in range(0, streams, size)):
        views = {name: value[chosen] for name, value in tensors.items()}
        stack = Stack(views[f"{family.name}.weights"], views[f"{family.name}.bias"])
        optimizer = torch.optim.Adam([stack.weights, stack.bias], fused=True)
        for part in ("weights", "bias"):
            moments = {moment: views[f"{family.name}.{part}.{moment}"] for moment in MOMENTS}
            optimizer.state[views[f"{family.name}.{part}"]] = {"step": torch.tensor(float(steps_done)), **moments}
        yield Chunk(chosen, stack, objective.chunk(chosen), teacher and teacher.chunk(chosen), optimizer)


def _named(finished: dict[str, Stack], settings: SweepSettings) -> dict[str, Tensor]:
    """The tensors of stacks in training, by name."""
    tensors = {
        f"{name}.{part}": getattr(stack, part) for name, stack in finished.items() for part in ("weights", "bias")
    }
    return tensors | ({"direct.steps": torch.tensor(settings.steps)} if finished else {})


def _advance_from(advance: Callable[[int], None], before: int, steps: int) -> None:
    advance(before + steps)


@contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch uses, each computing alone.

    Chunks are independent, and threads that share a small product would wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)
