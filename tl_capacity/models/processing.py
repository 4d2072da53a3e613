"""Weight processing of TransformerLens: which activations each option changes, and whether a model was processed with
it.

`HookedTransformer.from_pretrained` can rewrite a model so that it computes the same with simpler weights. Its logits
stay, and some of its activations change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from tl_capacity.errors import CapacityError
from tl_capacity.runtime.hub import reason_of

CENTRING = "center_writing_weights"

CENTRED_WITHIN = 0.01
"""Weights count as centred if their mean is below this share of the mean that independent entries have by chance.
Rounding to bfloat16 leaves a thousandth.
"""


@dataclass(frozen=True)
class Processing:
    """One option of `HookedTransformer.from_pretrained_no_processing`.

    Attributes:
        changes: the hook points at which activations are others afterwards.
        undergone: whether a model of TransformerLens was processed so, as far as its weights tell.
    """

    changes: re.Pattern[str]
    undergone: Callable[[Any], bool]


def is_centred(model: Any) -> bool:
    """Whether what is written to the residual stream has a mean of zero over d_model."""
    last = model.blocks[len(model.blocks) - 1]
    written = [_weight(model, "W_E"), _weight(last, "mlp.W_out"), _weight(last, "attn.W_O")]
    return is_layer_norm(model) and all(_has_no_mean(weight) for weight in written if weight is not None)


def values_are_folded(model: Any) -> bool:
    """Whether value biases are zero while output biases are not, as after folding."""
    values, outputs = ([_weight(block, f"attn.{name}") for block in model.blocks] for name in ("b_V", "b_O"))
    return not any(map(_is_not_zero, values)) and any(map(_is_not_zero, outputs)) and None not in values


def norms_are_folded(model: Any) -> bool:
    """Whether the weights of normalisations were folded into the layers that read them."""
    if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre"):
        return True
    # A bridge keeps the norms with weights of 1.
    norms = [_weight(block, "ln1.w") for block in model.blocks] if getattr(model, "compatibility_mode", False) else []
    return bool(norms) and all(norm is not None and bool((norm == norm.flatten()[0]).all()) for norm in norms)


def cannot_be_told(_: Any) -> bool:
    """False, because this processing leaves no trace in a model."""
    return False


PROCESSING: Mapping[str, Processing] = {
    CENTRING: Processing(
        re.compile(
            r"hook_embed|hook_pos_embed|(pos_)?embed\.hook_out|ln_final\.hook_in|blocks\.\d+\."
            r"(hook_resid_(pre|mid|post)|hook_(attn|mlp)_(in|out)|hook_[qkv]_input|hook_in|hook_out|ln[12]\.hook_in"
            r"|(attn|mlp)\.hook_out|attn\.(o\.hook_out|hook_hidden_states|hook_result)|mlp\.out\.hook_out)"
        ),
        is_centred,
    ),
    "fold_value_biases": Processing(
        re.compile(r"blocks\.\d+\.attn\.(hook_[vz]|v\.hook_out|o\.hook_in)"), values_are_folded
    ),
    "refactor_factored_attn_matrices": Processing(
        re.compile(r"blocks\.\d+\.attn\.(hook_(q|k|v|z|rot_q|rot_k)|[qkv]\.hook_out|o\.hook_in)"), cannot_be_told
    ),
    "fold_ln": Processing(
        re.compile(
            r"unembed\.hook_in|ln_final\.hook_out|blocks\.\d+\.(ln[12]\.hook_out|(attn|mlp)\.hook_in|attn\.[qkv]\.hook_in"
            r"|mlp\.in\.hook_in)"
        ),
        norms_are_folded,
    ),
    "center_unembed": Processing(re.compile(r"unembed\.hook_out"), cannot_be_told),
}
"""The processing options, by name."""


def is_layer_norm(model: Any) -> bool:
    """Whether a model normalises its residual stream by LayerNorm. Only LayerNorm subtracts the mean, so
    TransformerLens centres no other model's weights.
    """
    if hasattr(model, "hook_dict"):
        kind, config = str(getattr(model.cfg, "normalization_type", "")), model.cfg
        return kind.startswith("LN") and not getattr(config, "final_rms", False)
    kinds = {type(module).__name__ for module in model.modules()}
    return any("LayerNorm" in kind and kind not in RMS for kind in kinds) and not any("RMSNorm" in k for k in kinds)


RMS = ("T5LayerNorm",)
"""Normalisations that keep the mean, whatever their names say."""


def mean_is_ignored(model: Any) -> bool:
    """Whether subtracting the mean over d_model from a residual stream equals `center_writing_weights` exactly. It does
    if everything that reads the stream first normalises it by LayerNorm, and everything that writes to it is a weight.

    BLOOM normalises its embedding, whose mean that option leaves; OPT-350m normalises what it writes.
    """
    config = getattr(model, "cfg", None) if hasattr(model, "hook_dict") else getattr(model, "config", None)
    normalises_embedding = bool(getattr(config, "post_embedding_ln", False)) or any(
        "LayerNorm" in type(module).__name__ and "embed" in name.lower() for name, module in model.named_modules()
    )
    normalises_late = getattr(config, "do_layer_norm_before", True) is False
    return is_layer_norm(model) and not normalises_embedding and not normalises_late


def processed(model: Any, tokenizer: Any, options: Collection[str]) -> Any:
    """A `HookedTransformer` with a Hugging Face model's weights, processed by the given options only, as
    `HookedTransformer.from_pretrained_no_processing` processes a published model.

    Raises:
        CapacityError: where TransformerLens cannot make one of it.
    """
    try:
        from transformer_lens import HookedTransformer, loading_from_pretrained
    except ImportError as problem:
        raise CapacityError(
            f"an SAE needs a model with {_listed(options)}, which only HookedTransformer provides, and this "
            "TransformerLens has none: install transformer-lens<4"
        ) from problem
    try:
        with TemporaryDirectory() as folder:
            _write_configuration(model, Path(folder))
            config = loading_from_pretrained.get_pretrained_model_config(
                folder, device=str(model.device), dtype=model.dtype, fold_ln="fold_ln" in options
            )
            weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, model, dtype=model.dtype)
        lens = HookedTransformer(config, tokenizer, move_to_device=False)
        lens.load_and_process_state_dict(weights, **{name: name in options for name in PROCESSING})
    except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError, OSError) as problem:
        raise CapacityError(
            f"an SAE needs a model with {_listed(options)}, and TransformerLens cannot make a HookedTransformer of "
            f"this {model.config.model_type!r} ({reason_of(problem)}): measure a processed model in a session, or "
            "leave out that SAE"
        ) from problem
    return lens.to(model.device, print_details=False).eval()


def _listed(options: Collection[str]) -> str:
    return " and ".join(sorted(options))


def _write_configuration(model: Any, folder: Path) -> None:
    """A configuration that TransformerLens can read. It knows published models by name, and others by their class."""
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if not hasattr(config, "n_ctx") and (positions := getattr(config, "max_position_embeddings", None)):
        config.n_ctx = positions  # GPT-2's files of old have it
    config.save_pretrained(folder)


def _weight(owner: Any, path: str) -> Tensor | None:
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner.detach() if isinstance(owner, Tensor) else None


def _has_no_mean(weight: Tensor) -> bool:
    """Whether vectors [..., d_model] have a mean of zero; at most a thousand of them are checked."""
    rows = weight.flatten(0, -2)[:1024].float()
    by_chance = rows.square().mean().sqrt() / rows.shape[-1] ** 0.5
    return bool(rows.mean(-1).square().mean().sqrt() <= CENTRED_WITHIN * by_chance)


def _is_not_zero(weight: Tensor | None) -> bool:
    return weight is not None and bool(weight.any())
