"""SAEs that a model carries: SAELens' `add_sae` puts them in the place of hook points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def carried_saes(model: Any) -> Mapping[str, Any]:
    """The SAEs that `add_sae` put into a model, by the hook point that each reads."""
    return dict(getattr(model, "acts_to_saes", {}))


def is_hook_point(module: Any) -> bool:
    """Whether a module is a hook point of TransformerLens."""
    from transformer_lens.hook_points import HookPoint

    return isinstance(module, HookPoint)


def replaces_hook_point(module: Any) -> bool:
    """Whether a module is what SAELens puts in the place of a hook point to attach an SAE."""
    return isinstance(module, nn.Module) and is_hook_point(getattr(module, "hook_sae_input", None))
