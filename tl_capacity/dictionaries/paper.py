"""SAEs of the paper (Sarkar & Deka, arXiv:2604.04037), read from the `.pt` files that its public training script
writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_capacity.dictionaries.dictionary import Dictionary, Metadata
from tl_capacity.errors import DictionaryError

SUFFIXES = (".pt", ".pth")
WEIGHTS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "b_pre")
WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes that `torch.compile` and data-parallel training put before the names of weights."""
LAYER_FIELDS = ("layer", "layer_idx", "layer_index")


def read_paper_sae(path: Path) -> Dictionary:
    """An SAE of the residual stream after one layer: z = ReLU(W(x − b_pre) + b), x̂ = W_dec z + b_dec + b_pre.

    The file holds `model_state`, the weights, and `config`. Its layer is the configuration's, else that of the file's
    name, as in `sae_layer12_final.pt`; where neither says it, the SAE names no hook point. No code in the file is run.

    Raises:
        DictionaryError: where it holds something else, or its parts contradict one another.
        OSError, ValueError, RuntimeError, UnpicklingError: where it is damaged, or holds more than tensors and numbers.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state = saved.get("model_state") if isinstance(saved, Mapping) else None
    weights = _unwrapped(state) if isinstance(state, Mapping) else {}
    if lacking := [name for name in WEIGHTS if not isinstance(weights.get(name), Tensor)]:
        raise DictionaryError(
            f"{path} is not an SAE of the paper's training script, as its model_state lacks {', '.join(lacking)}: "
            "pass such an SAE, or a folder of SAELens, sparsify or dictionary_learning"
        )
    config = saved.get("config") or {}
    if not isinstance(config, Mapping):
        raise DictionaryError(f"the config in {path} is {config!r}, not a mapping: save it again")
    encoder, decoder = weights["encoder.weight"], weights["decoder.weight"]
    if encoder.ndim != 2 or decoder.shape != encoder.shape[::-1] or weights["b_pre"].shape != encoder.shape[1:]:
        shapes = ", ".join(f"{name} {list(weights[name].shape)}" for name in WEIGHTS)
        raise DictionaryError(f"the weights in {path} do not fit together ({shapes}): save it again")
    if (d_sae := config.get("d_sae")) is not None and d_sae != len(encoder):
        raise DictionaryError(
            f"{path} has {len(encoder):,} latents, but its config says d_sae = {d_sae!r}: the config was altered, so "
            "take the original file"
        )
    layer, model = _layer(path, config), config.get("model_name")
    renamed = {
        "W_enc": encoder.T,
        "b_enc": weights["encoder.bias"],
        "W_dec": decoder.T,
        "b_dec": weights["decoder.bias"].double() + weights["b_pre"].double(),
        "b_pre": weights["b_pre"],
    }
    metadata = Metadata(
        None if layer is None else f"blocks.{layer}.hook_resid_post",
        model_name=model if isinstance(model, str) else None,
    )
    return Dictionary("standard", renamed, metadata)


def _unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Weights under the names that the SAE itself gives them."""
    names = [str(name) for name in state]
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in names):
            names = [name.removeprefix(wrapper) for name in names]
    return dict(zip(names, state.values(), strict=True))


def _layer(path: Path, config: Mapping[str, Any]) -> int | None:
    """The layer after which the SAE belongs, if the file says it.

    Raises:
        DictionaryError: where the configuration and the name say different ones, or the former no layer at all.
    """
    said = next((config[name] for name in LAYER_FIELDS if config.get(name) is not None), None)
    if said is not None and (type(said) is not int or said < 0):
        raise DictionaryError(
            f"the config in {path} names the layer {said!r}, which is not a whole number: save it again"
        )
    match = re.search(r"layer[_-]?(\d+)", path.stem, re.IGNORECASE)
    named = int(match[1]) if match else None
    if said is not None and named is not None and said != named:
        raise DictionaryError(
            f"{path} is of layer {named} by its name, but of layer {said} by its config: rename it, or choose "
            "another file"
        )
    return named if said is None else said
