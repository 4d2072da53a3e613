"""Weight processing of TransformerLens: what it does to activations, and whether a model at hand has undergone it.

`HookedTransformer.from_pretrained` can rewrite a model so that it computes the same with simpler weights. Its logits
stay, and some of its activations change.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

CENTRED = re.compile(
    r"hook_embed|hook_pos_embed|(pos_)?embed\.hook_out"
    r"|blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(attn|mlp)_out|hook_in|hook_out|(attn|mlp)\.hook_out)"
)
"""Hook points in the residual stream, or of what is written to it: `center_writing_weights` takes their mean away."""

CHANGED = {
    "center_writing_weights": CENTRED,
    "fold_value_biases": re.compile(r"blocks\.\d+\.attn\.hook_[vz]"),
    "refactor_factored_attn_matrices": re.compile(r"blocks\.\d+\.attn\.hook_(q|k|v|z|rot_q|rot_k)"),
    "fold_ln": re.compile(r"unembed\.hook_in|ln_final\.hook_out|blocks\.\d+\.(ln[12]|attn|mlp)\.hook_(in|out)"),
    "center_unembed": re.compile(r"unembed\.hook_out"),
}
"""Which hook points each option of `HookedTransformer.from_pretrained_no_processing` changes."""

CENTRED_WITHIN = 1e-5
"""The mean of an embedding vector, over the largest entry of all, below which embeddings were centred."""


def changes(option: str, hook: str) -> bool:
    """Whether an option of the weight processing changes what a hook point carries."""
    return option in CHANGED and CHANGED[option].fullmatch(hook) is not None


def ignores_the_mean(model: nn.Module) -> bool:
    """Whether everything that reads the residual stream normalises it by LayerNorm first, so that its mean over d_model
    does not matter.

    Then taking the mean away is what `center_writing_weights` does, exactly. With RMSNorm the mean matters, and
    TransformerLens leaves the weights as they are.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    return any("LayerNorm" in kind for kind in kinds) and not any("RMSNorm" in kind for kind in kinds)


def normalises_after(model: Any) -> bool:
    """Whether a model's blocks normalise what they write instead of what they read, as OPT-350m's do."""
    return getattr(getattr(model, "config", None), "do_layer_norm_before", True) is False


def is_centred(model: Any) -> bool:
    """Whether the weights that write to the residual stream were centred, as `HookedTransformer.from_pretrained` does
    unless told otherwise.
    """
    embedding = getattr(model, "W_E", None) if hasattr(model, "hook_dict") else None
    if not isinstance(embedding, Tensor) or not ignores_the_mean(model):
        return False
    rows = embedding.detach()[:1024].float()
    return bool(rows.mean(-1).abs().max() <= CENTRED_WITHIN * rows.abs().max())
