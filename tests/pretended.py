"""A device, pretended on the CPU, since neither MPS nor CUDA is in each machine that tests run on: its tensors compute
on the CPU, refuse what MPS refuses, and note each time that the host would wait for CUDA.

They say that they are on the device "meta", which has no values of its own; other devices that are not there cannot be
named by a tensor.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import tl_capacity

DEVICE = torch.device("meta")
PACKAGE = Path(tl_capacity.__file__).parent
ASKING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive", "is_nonzero")
"""Operations whose answer the host must have before it can go on."""


class Machine:
    """What the pretended device can do, and how often the host waited for it.

    Attributes:
        float64: whether it has float64.
        waits: the operations that the host waited for, each with its place in the package.
    """

    float64 = False
    waits: ClassVar[list[str]] = []


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `held` is on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        if held.dtype == torch.float64 and not Machine.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU; what it gives is there again, unless it is copied to the CPU."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [isinstance(x, OnDevice) for x in tensors]
    device = kwargs.get("device")
    onto_device = torch.device(device).type == "meta" if device is not None else any(there)
    moves = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if not moves:
        others = [x for x, is_there in zip(tensors, there, strict=True) if not is_there and x.dim()]
        indexes = function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        if any(there) and others and not indexes and function != torch.ops.aten.embedding.default:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {function}")
    note_wait(function, args, kwargs, any(there), onto_device)
    if not Machine.float64 and (
        (onto_device and kwargs.get("dtype") == torch.float64)
        or (moves and any(there) and kwargs.get("dtype") == torch.float64)
    ):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    given = {**kwargs, **({"device": torch.device("cpu")} if device is not None else {})}
    held, held_kwargs = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, given))
    result = function(*held, **held_kwargs)
    if function._schema.name.endswith("_") or "out" in kwargs:  # in place: the tensor that was given
        return args[0] if "out" not in kwargs else kwargs["out"]
    return tree_map(lambda x: OnDevice(x) if onto_device and isinstance(x, torch.Tensor) else x, result)


def note_wait(function: Any, args: Any, kwargs: dict[str, Any], there: bool, onto_device: bool) -> None:
    """Note an operation for which the host would wait, unless the model itself asks: an answer, a shape that depends on
    values, a copy to the host, and one from it that is not said to be `non_blocking`.
    """
    name = function._schema.name.removeprefix("aten::")
    waits = name in ASKING and there
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        waits |= any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        waits |= any(index.dim() and not isinstance(index, OnDevice) for index in indices)
    if name == "_to_copy" and there != onto_device:
        waits |= not kwargs.get("non_blocking", False) or there
    if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        waits |= args[1].dim() > 0 or not isinstance(args[0], OnDevice)
    if name in ("repeat_interleave",) and there:
        waits |= kwargs.get("output_size") is None
    if waits:
        frames = traceback.extract_stack()
        last = max((i for i, f in enumerate(frames) if PACKAGE in Path(f.filename).parents), default=0)
        if not any("transformers" in f.filename for f in frames[last:]):  # the model's own question is not ours
            Machine.waits.append(f"{name} at {'/'.join(Path(frames[last].filename).parts[-2:])}:{frames[last].lineno}")


class _Factories(TorchDispatchMode):
    """New tensors there, too."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            return run(function, args, kwargs)
        return function(*args, **kwargs)


@contextmanager
def pretended_device(float64: bool = False) -> Iterator[None]:
    """Meanwhile the device is there."""
    Machine.float64 = float64
    Machine.waits.clear()
    try:
        with _Factories():
            yield
    finally:
        Machine.float64 = False


def moved(module: Any) -> Any:
    """A module whose parameters and buffers are on the pretended device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            held = OnDevice(parameter.detach().clone())
            setattr(part, name, torch.nn.Parameter(held, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, OnDevice(buffer.clone()))
    return module
