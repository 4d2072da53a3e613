"""Digests: SHA-256 in hexadecimal of bytes, of named tensors and of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def digest(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def place_of(name: str) -> float:
    """A number in [0, 1) that looks random but depends on a name alone. Names are split by it, so they never change
    sides.
    """
    return int(digest(name.encode())[:16], 16) / 2**64


def tensors_digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256 of the names, shapes, types and values of tensors, and of some texts.

    The order of the tensors makes no difference, as safetensors keeps none.
    """
    total = hashlib.sha256("\n".join(texts).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(_bytes_of(tensor))
    return total.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files, read in pieces."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def fingerprint(model: Any) -> str:
    """SHA-256 of the names and values of a model's parameters, in order."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(name.encode())
        total.update(_bytes_of(parameter))
    return total.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor of any type as bytes, on the CPU without a copy. Numpy has no bfloat16."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
