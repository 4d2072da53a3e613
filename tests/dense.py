"""A changed activation in a dense loop: the whole model once more, by the library's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

BLOCKS = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers"}


@torch.no_grad()
def logits_with(model: Any, hook: str, change: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> Any:
    """Logits of the whole model with a hook point's activation changed, by the library's own hooks."""
    tokens = tokens.to(next(model.parameters()).device)
    if hasattr(model, "hook_dict"):
        name = hook if hook in model.hook_dict else hook.replace("hook_resid_post", "hook_out")
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: change(activation))])
    layer = hook.split(".")[1]
    handle = model.get_submodule(f"{BLOCKS[model.config.model_type]}.{layer}").register_forward_hook(
        lambda _, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )
    try:
        return model(tokens).logits
    finally:
        handle.remove()


def kl_per_token(clean: torch.Tensor, other: torch.Tensor) -> float:
    """Over the positions that have a next token, in float64."""
    p, q = clean[:, :-1].double().log_softmax(-1), other[:, :-1].double().log_softmax(-1)
    return float(F.kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel())
