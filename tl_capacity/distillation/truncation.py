"""A start for students: the teacher's weights in the leading directions of its residual stream.

The stream of a pre-norm transformer is only ever read through a norm and written by adding to it. So it can be rotated,
and cut, and nothing else need change (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024). What reads and writes it is
found by watching a forward pass, so no family has to say it.

- Directions: the principal components of what the norms read, all of them together. A LayerNorm takes the mean out, so
  there the mean's direction is one of the student's as well.
- Matrices that read the stream take the gain of their norm, and what the student's norm makes too small for having
  fewer directions. That cannot be where the matrix is also the embedding, or what is read is no matrix: there the norm
  keeps the diagonal of its rotated gain.
- Neurons, and heads with their keys and values, are kept that contribute most to the stream. Where the student's heads
  have another size than the teacher's, or share keys otherwise, attention keeps its random start.

At the teacher's own width the student is the teacher, unless embedding and head are the same matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tl_capacity.errors import CapacityError
from tl_capacity.runtime.devices import exact
from tl_capacity.runtime.processes import is_first
from tl_capacity.runtime.progress import token_progress

ROWS_AT_ONCE = 4


@dataclass
class Reading:
    """What a forward pass showed of a model's residual stream.

    Attributes:
        readers: the matrices that read each norm's output, by name.
        second_moment: [d_T, d_T] Σ x xᵀ of what each norm reads, normalised but without its gain.
        inner: [d_inner] Σ z² of what each matrix that writes to the stream is given.
    """

    readers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    second_moment: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def truncate(teacher: Any, student: Any, tokens: Int[Tensor, "row position"]) -> None:
    """Give a student its teacher's weights in the leading directions of the teacher's residual stream.

    Args:
        teacher: a Hugging Face causal language model in evaluation mode.
        student: a model of the same class, not wider; its random weights stay where the teacher's have no counterpart.
        tokens: the text in which the directions and the contributions are taken.

    Raises:
        CapacityError: where the student is wider, or the architecture does more to its stream than to norm, read and
            add.
    """
    width, teacher_width = int(student.config.hidden_size), int(teacher.config.hidden_size)
    if width > teacher_width:
        raise CapacityError(
            f"a student of width {width:,} cannot start from a narrower teacher (width {teacher_width:,}): start it at"
            " random"
        )
    cut = _cut(teacher, student, read_stream(teacher, tokens))
    parameters = dict(teacher.named_parameters())
    decided: set[int] = set()

    def put(parameter: Tensor | None, value: Tensor | None) -> None:
        if parameter is not None and value is not None:
            if parameter.shape != value.shape:
                shapes = (
                    f"the student has {tuple(parameter.shape)} where {tuple(value.shape)} of the teacher's are kept"
                )
                raise CapacityError(_refusal(teacher, shapes))
            parameter.copy_(value)
        decided.add(id(parameter))

    student_modules = dict(student.named_modules())
    for name, module in teacher.named_modules():
        target = student_modules[name]
        if isinstance(module, nn.Embedding) and module.embedding_dim == teacher_width:
            put(target.weight, cut.embedding(module))
        elif _is_norm(module, teacher_width):
            gain, bias = cut.norm(name, module)
            put(target.weight, gain)
            put(getattr(target, "bias", None), bias)
        elif name in cut.norm_of or name in cut.seen.inner:
            rows = cut.reader(name, module) if name in cut.norm_of else cut.writer(name, module)
            if rows is None:  # the random start stays
                decided.update(id(parameter) for parameter in target.parameters())
                continue
            put(target.weight, rows[0].T if isinstance(module, Conv1D) else rows[0])
            put(target.bias, rows[1])
    for name, parameter in student.named_parameters():
        if id(parameter) not in decided:
            put(parameter, parameters[name])


@dataclass(frozen=True)
class _Cut:
    """What a student's weights are built from, besides its teacher's.

    Attributes:
        seen: what reads and writes the teacher's stream.
        modules: of the teacher, by name.
        config: of the teacher.
        basis: orthonormal columns: the student's stream is `basisᵀ x`.
        wider: √(d_T / d_S), what the student's norms make too small for having fewer directions.
        scale: what the teacher's architecture multiplies its embeddings by, as a share of what the student's does.
        norm_of: the norm whose output each matrix reads.
        folded: norms whose gain the matrices that read them take.
        kept: which inner coordinates of each matrix that writes to the stream are kept; None where its heads are
            others than the student's.
    """

    seen: Reading
    modules: Mapping[str, Any]
    config: Any
    basis: Float[Tensor, "d_T d_S"]
    wider: float
    scale: float
    norm_of: Mapping[str, str]
    folded: Set[str]
    kept: Mapping[str, Tensor | None]

    def embedding(self, module: Any) -> Tensor:
        """The student's embedding matrix."""
        vectors: Tensor = module.weight.float() @ self.basis * self.scale
        return vectors

    def norm(self, name: str, module: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one of the student's norms."""
        gain, bias, basis = _gain(module), getattr(module, "bias", None), self.basis
        if name in self.folded:
            new_gain = basis.new_ones(basis.shape[1])
            new_bias = None if bias is None else basis.T @ torch.where(gain.abs() > 1e-6, bias / gain, 0) / self.wider
        else:
            head_scale = self.scale if name in self.seen.readers else 1.0
            new_gain = self.wider / head_scale * torch.einsum("ts,t,ts->s", basis, gain, basis)
            new_bias = None if bias is None else basis.T @ bias.float() / head_scale
        return new_gain - (gain - module.weight).mean(), new_bias  # Gemma's gain is 1 + its weight

    def reader(self, name: str, module: Any) -> tuple[Tensor, Tensor | None] | None:
        """Matrix [out, in] and bias of a module that reads the student's stream; None if they stay random."""
        weight, norm = _matrix(module), self.norm_of[name]
        weight = (
            self.wider * weight * _gain(self.modules[norm]) @ self.basis if norm in self.folded else weight @ self.basis
        )
        writer = next((writer for writer in self.kept if _parent(writer) == _parent(name)), None)
        if writer is None:
            return weight, module.bias
        coordinates = self.kept[writer]
        if coordinates is None:
            return None
        rows = _rows(name, coordinates, len(weight), self.seen.inner[writer].numel(), self.config)
        return weight[rows], None if module.bias is None else module.bias[rows]

    def writer(self, name: str, module: Any) -> tuple[Tensor, Tensor | None] | None:
        """Matrix [out, in] and bias of a module that writes to the student's stream; None if they stay random."""
        if (columns := self.kept[name]) is None:
            return None
        bias = None if module.bias is None else self.basis.T @ module.bias.float()
        return self.basis.T @ _matrix(module)[:, columns], bias


def _cut(teacher: Any, student: Any, seen: Reading) -> _Cut:
    """How to cut a teacher's stream to a student's width.

    Raises:
        CapacityError: where no matrix reads the output of a norm.
    """
    if not seen.readers:
        raise CapacityError(_refusal(teacher, "no matrix of it reads the output of a norm"))
    modules, student_modules = dict(teacher.named_modules()), dict(student.named_modules())
    width = int(student.config.hidden_size)
    embedding = teacher.get_input_embeddings().weight
    tied = {name for name, module in modules.items() if isinstance(module, nn.Linear) and module.weight is embedding}
    return _Cut(
        seen=seen,
        modules=modules,
        config=teacher.config,
        basis=_basis(seen, modules, width).float().to(embedding.device),
        wider=sqrt(int(teacher.config.hidden_size) / width),
        scale=_scale(teacher) / _scale(student),
        norm_of={reader: norm for norm, readers in seen.readers.items() for reader in readers},
        folded={norm for norm, readers in seen.readers.items() if not tied & set(readers)},
        kept={
            writer: _kept(writer, seen, modules, student_modules, teacher.config, student.config)
            for writer in seen.inner
        },
    )


@torch.no_grad()
def read_stream(model: Any, tokens: Int[Tensor, "row position"]) -> Reading:
    """What reads a model's residual stream and what writes to it, found by watching forward passes.

    Raises:
        CapacityError: where the first norm reads something else than the sum of the embeddings.
    """
    seen, width = Reading(), int(model.config.hidden_size)
    outputs: dict[int, tuple[str, Tensor]] = {}  # by address; held, so that no address is used twice in a pass
    embedded: list[Tensor] = []
    first: list[Tensor] = []
    reading: set[str] = set()

    def norm(name: str, module: Any, x: Tensor, y: Tensor) -> None:
        outputs[y.data_ptr()] = (name, y)
        first.append(x)
        normed = (
            nn.functional.layer_norm(exact(x), (width,))
            if isinstance(module, nn.LayerNorm)
            else nn.functional.rms_norm(exact(x), (width,))
        )
        flat = normed.flatten(0, -2)
        seen.second_moment[name] = seen.second_moment.get(name, 0) + flat.T @ flat

    def matrix(name: str, module: Any, x: Tensor) -> None:
        if x.data_ptr() in outputs and x.shape[-1] == width:
            reading.add(name)
            if name not in (readers := seen.readers[outputs[x.data_ptr()][0]]):
                readers.append(name)
        elif _matrix(module).shape[0] == width and name not in reading:
            seen.inner[name] = seen.inner.get(name, 0) + exact(x).flatten(0, -2).square().sum(0)

    with ExitStack() as watching, token_progress(tokens.numel(), is_first(), "reading the teacher's stream") as advance:
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.embedding_dim == width:
                handle = module.register_forward_hook(lambda _m, _x, y: embedded.append(y))
            elif _is_norm(module, width):
                handle = module.register_forward_hook(lambda m, x, y, name=name: norm(name, m, x[0], y))
            elif isinstance(module, nn.Linear | Conv1D):
                handle = module.register_forward_pre_hook(lambda m, x, name=name: matrix(name, m, x[0]))
            else:
                continue
            watching.callback(handle.remove)
        for number, rows in enumerate(torch.split(tokens, ROWS_AT_ONCE)):
            model(rows, use_cache=False)
            advance(number * tokens[:ROWS_AT_ONCE].numel() + rows.numel())
            whole = sum(embedded[1:], embedded[0])
            if not first or not torch.allclose(first[0], whole.expand_as(first[0]), rtol=1e-3, atol=1e-5):
                raise CapacityError(
                    _refusal(model, "its first norm reads something else than the sum of the embeddings")
                )
            for held in (outputs, embedded, first):
                held.clear()
    return seen


def _basis(seen: Reading, modules: dict[str, Any], width: int) -> Float[Tensor, "d_T d_S"]:
    """Orthonormal columns of `basis`; the student's stream is `basisᵀ x`."""
    moment = torch.stack([seen.second_moment[norm] for norm in seen.readers]).sum(0)
    directions: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)
    if not any(isinstance(modules[norm], nn.LayerNorm) for norm in seen.readers):
        return directions[:, :width]
    # The student's norms take the mean of its coordinates out, so that direction must hold the teacher's mean, which is
    # taken out too.
    mean, student_mean = (
        torch.full((d, 1), d**-0.5, dtype=moment.dtype, device=moment.device) for d in (len(directions), width)
    )
    inner = torch.cat([mean, directions[:, : width - 1]], 1)
    outer, triangular = torch.linalg.qr(torch.cat([student_mean, torch.eye(width).to(student_mean)[:, 1:]], 1))
    columns: Tensor = inner @ (outer * triangular.diagonal().sign()).T
    return columns


def _kept(
    writer: str,
    seen: Reading,
    modules: dict[str, Any],
    student_modules: dict[str, Any],
    config: Any,
    student_config: Any,
) -> Tensor | None:
    """The inner coordinates that the student keeps of a matrix that writes to the stream; None if its heads differ from
    the teacher's.
    """
    weight, size = _matrix(modules[writer]), _matrix(student_modules[writer]).shape[1]
    contribution = seen.inner[writer] * exact(weight).square().sum(0)
    unit = 1
    if "attn" in writer or "attention" in writer:
        heads = _heads(config)
        if heads != _heads(student_config):
            return None
        unit = heads[0] * heads[1]
    best = contribution.view(-1, unit).sum(1).topk(size // unit).indices.sort().values.to(weight.device)
    return (best[:, None] * unit + torch.arange(unit, device=best.device)).flatten()


def _rows(name: str, kept: Tensor, rows: int, inner: int, config: Any) -> Tensor:
    """The rows of a matrix that reads the stream, for the inner coordinates that are kept."""
    if name.endswith("query_key_value"):  # GPT-NeoX: query, key and value of one head beside each other
        size = _heads(config)[0]
        heads = kept.view(-1, size)[:, 0] // size
        return (heads[:, None] * 3 * size + torch.arange(3 * size, device=kept.device)).flatten()
    if rows >= inner:  # one block, or several one below the other: GPT-2's query, key and value
        return torch.cat([kept + block * inner for block in range(rows // inner)])
    size, shared = _heads(config)  # keys and values that several heads share
    groups = kept.view(-1, size * shared)[:, 0] // (size * shared)
    return (groups[:, None] * size + torch.arange(size, device=kept.device)).flatten()


def _heads(config: Any) -> tuple[int, int]:
    """Size of a head, and how many heads share a key."""
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return size, heads // int(getattr(config, "num_key_value_heads", None) or heads)


def _scale(model: Any) -> float:
    """The factor by which an architecture multiplies its embeddings (Gemma: √d)."""
    return float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))


def _is_norm(module: Any, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and weight is not None and weight.shape == (width,)


def _gain(norm: Any) -> Float[Tensor, " d_T"]:
    """The factors of a norm. An RMS norm changes ones only by its gain."""
    gain: Tensor = norm.weight if isinstance(norm, nn.LayerNorm) else norm(torch.ones_like(norm.weight))
    return gain.float()


def _matrix(module: Any) -> Float[Tensor, "out in"]:
    weight: Tensor = module.weight.float()
    return weight.T if isinstance(module, Conv1D) else weight


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _refusal(model: Any, reason: str) -> str:
    return (
        f"{model.config.model_type!r} students cannot start from a truncated teacher ({reason}): start them at random"
    )
