"""A device without float64, pretended on the CPU, since MPS is in no machine that tests run on: its tensors compute on
the CPU, and refuse what MPS refuses.

They say that they are on the device "meta", which has no values of its own; other devices that are not there cannot be
named by a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `held` is on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        if held.dtype == torch.float64:
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
    if (onto_device and kwargs.get("dtype") == torch.float64) or (
        moves and any(there) and kwargs.get("dtype") == torch.float64
    ):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    given = {**kwargs, **({"device": torch.device("cpu")} if device is not None else {})}
    held, held_kwargs = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, given))
    result = function(*held, **held_kwargs)
    if function._schema.name.endswith("_") or "out" in kwargs:  # in place: the tensor that was given
        return args[0] if "out" not in kwargs else kwargs["out"]
    return tree_map(lambda x: OnDevice(x) if onto_device and isinstance(x, torch.Tensor) else x, result)


class _Factories(TorchDispatchMode):
    """New tensors there, too."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            return run(function, args, kwargs)
        return function(*args, **kwargs)


@contextmanager
def pretended_device() -> Iterator[None]:
    """Meanwhile the device is there."""
    with _Factories():
        yield


def moved(module: Any) -> Any:
    """A module whose parameters and buffers are on the pretended device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            held = OnDevice(parameter.detach().clone())
            setattr(part, name, torch.nn.Parameter(held, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, OnDevice(buffer.clone()))
    return module
