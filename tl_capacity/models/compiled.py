"""Compiled models: a graph of `torch.compile` runs only the hooks that existed when it was made."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def uncompiled(model: Any) -> Any:
    """The model inside `torch.compile`'s wrapper; any other model unchanged.

    Calls of the wrapper run the hooks of the model inside it.
    """
    from torch._dynamo import OptimizedModule

    return model.get_submodule("_orig_mod") if isinstance(model, OptimizedModule) else model


def forget_graphs() -> None:
    """Make PyTorch compile everything anew, since its graphs were made with other hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is a GPU, PyTorch loads its compiler, which warns of itself
        torch.compiler.reset()
