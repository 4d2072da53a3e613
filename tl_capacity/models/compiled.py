"""Compiled models: a graph of `torch.compile` keeps to the hooks that it was made with, and runs past those that came
later.
"""

from __future__ import annotations

from typing import Any

import torch


def uncompiled(model: Any) -> Any:
    """The model inside the wrapper that `torch.compile` puts around one; any other as it is.

    Calls of the wrapper run the hooks of the model inside it.
    """
    from torch._dynamo import OptimizedModule

    return model.get_submodule("_orig_mod") if isinstance(model, OptimizedModule) else model


def forget_graphs() -> None:
    """Have PyTorch compile anew whatever it compiled: its graphs were made with other hooks than there are now."""
    torch.compiler.reset()
