"""Transcoders as `circuit-tracer` stores them: one file for each layer, and a `config.yaml` that says where they all
read and write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_capacity.dictionaries.dictionary import Dictionary, Metadata
from tl_capacity.errors import DictionaryError

CONFIG = "config.yaml"
WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
THRESHOLDS = ("threshold", "activation_function.threshold")
CROSS_LAYER = re.compile(r"W_(enc|dec)_\d+")
"""The names by which weights and files of a cross-layer transcoder are recognised."""


def read_transcoder(file: Path) -> Dictionary:
    """The transcoder of one layer: z = ReLU(W_enc x + b_enc), or JumpReLU if it has thresholds, and ŷ = W_decᵀ z +
    b_dec, plus W_skip x.

    Args:
        file: such as `layer_3.safetensors`, with `config.yaml` beside it. The last number in its name is the layer.

    Raises:
        DictionaryError: where it is a cross-layer transcoder's, or lacks what is needed.
        OSError, ValueError, SafetensorError: where a file is damaged.
    """
    from safetensors.torch import load_file

    config, layers = read_config(file.parent), re.findall(r"\d+", file.stem)
    weights: dict[str, Tensor] = load_file(file)
    if config.get("model_kind") == "cross_layer_transcoder" or any(CROSS_LAYER.fullmatch(name) for name in weights):
        raise DictionaryError(cross_layer(file))
    if not layers:
        raise DictionaryError(
            f"the name of {file} does not tell its layer: name it as circuit-tracer does, such as layer_3.safetensors"
        )
    if missing := sorted(WEIGHTS - weights.keys()):
        raise DictionaryError(f"the transcoder in {file} lacks {', '.join(missing)}: download it again")
    known = {*WEIGHTS, *THRESHOLDS, "W_skip"}
    if strange := sorted(weights.keys() - known):
        raise DictionaryError(
            f"the transcoder in {file} has {', '.join(strange)}, which are unknown: choose a ReLU or JumpReLU "
            "transcoder"
        )
    renamed = {name: weights[name] for name in (*WEIGHTS, "W_skip") if name in weights}
    renamed["W_enc"] = renamed["W_enc"].T
    thresholds = [weights[name].flatten() for name in THRESHOLDS if name in weights]
    if thresholds:
        renamed["threshold"] = thresholds[0]
    reads, writes = (hook_of_layer(config, name, layers[-1]) for name in ("feature_input_hook", "feature_output_hook"))
    model = config.get("model_name")
    metadata = Metadata(reads, writes, model_name=None if model is None else str(model))
    return Dictionary("jumprelu" if thresholds else "standard", renamed, metadata, subtract_bias=False)


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.yaml` says of all transcoders in a folder.

    Raises:
        DictionaryError: where there is none.
        ValueError: where it holds something else.
    """
    import yaml

    if not (folder / CONFIG).is_file():
        raise DictionaryError(
            f"{folder} holds no {CONFIG}, which says where its transcoders read and write: download it too"
        )
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except yaml.YAMLError as problem:
        raise ValueError(f"{CONFIG} is not YAML: {problem}") from problem
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} does not hold a mapping")
    return config


def refuse_folder(folder: Path) -> None:
    """Refuse a folder with transcoders of several layers, and name the files to choose from.

    Raises:
        DictionaryError: where it does.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(CROSS_LAYER.match(name) for name in files):
        raise DictionaryError(cross_layer(folder))
    if files and (folder / CONFIG).is_file():
        raise DictionaryError(
            f"{folder} holds transcoders of {len(files)} layers: name the file of one, such as {folder / files[0]}"
        )


def cross_layer(what: object) -> str:
    """Why a cross-layer transcoder cannot be measured, in a sentence."""
    return (
        f"{what} is of a cross-layer transcoder, whose features write to several layers, so no single hook point "
        "shows what they explain: choose a per-layer transcoder"
    )


def hook_of_layer(config: Mapping[str, Any], name: str, layer: str) -> str:
    """The hook point in a layer's block that a configuration names, with or without its block.

    Raises:
        ValueError: where it names none.
    """
    hook = config.get(name)
    if not isinstance(hook, str) or not hook:
        raise ValueError(f"{CONFIG} has no {name}, the name of a hook point such as mlp.hook_in")
    hook = hook.replace("{layer}", layer)
    return hook if hook.startswith("blocks.") else f"blocks.{layer}.{hook}"
