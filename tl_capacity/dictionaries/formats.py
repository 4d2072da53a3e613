"""Dictionaries of other trainers in plain torch: those that EleutherAI's `sparsify` and `dictionary_learning` save.

Each is a `SparseAutoencoder` of `tl_capacity.interfaces`. None needs SAELens, whose own folders of the three commonest
kinds are read here too, where it is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_capacity.dictionaries.configurations import up_to_date, without_scaling
from tl_capacity.dictionaries.dictionary import Dictionary, Metadata
from tl_capacity.errors import DictionaryError

SPARSIFY_WEIGHTS, DICTIONARY_LEARNING_WEIGHTS, SAE_LENS_WEIGHTS = "sae.safetensors", "ae.pt", "sae_weights.safetensors"


def read_sparsify(folder: Path) -> Dictionary:
    """A sparse coder that EleutherAI's `sparsify` saved as `cfg.json` and `sae.safetensors`. The folder's name says
    where it belongs (`layers.3`).

    Raises:
        DictionaryError: where it lacks its weights or is of a kind unknown here.
        OSError, ValueError, SafetensorError: where a file is damaged.
    """
    from safetensors.torch import load_file

    config, weights = read_json(folder / "cfg.json"), load_file(folder / SPARSIFY_WEIGHTS)
    if config.get("signed"):
        raise DictionaryError(
            f"the sparse coder in {folder} keeps the largest latents of either sign, which `sparsify` no longer "
            "does: choose another SAE"
        )
    transcodes = bool(config.get("transcode"))
    activation, k = _field(config, "activation", str) or "topk", _field(config, "k", int)
    metadata = _with_run(sparsify_hooks(folder, transcodes), folder)
    return Dictionary(activation, _renamed(weights), metadata, subtract_bias=not transcodes, k=k)


def _with_run(hooks: Metadata, folder: Path) -> Metadata:
    """The configuration with what the run's own `config.json` says of model and text. That file lies above the folders
    of the modules. Other files of that name have no such fields.
    """
    file = folder.absolute().parent / "config.json"
    if re.fullmatch(r"seed\d+", folder.name):
        file = file.parent.parent / file.name
    run = read_json(file) if file.is_file() else {}
    said = {ours: run[theirs] for theirs, (ours, kind) in SPARSIFY_RUN.items() if type(run.get(theirs)) is kind}
    return replace(hooks, **said)


SPARSIFY_RUN: dict[str, tuple[str, type]] = {
    "model": ("model_name", str),
    "dataset": ("dataset_path", str),
    "ctx_len": ("context_size", int),
}
"""Fields of a `sparsify` run, under the names that SAELens uses."""


def sparsify_hooks(folder: Path, transcodes: bool) -> Metadata:
    """Hook points of a folder that `sparsify` named after a module of the base model: `layers.3`, `h.3.mlp`,
    `layers.3.attention`. If it trained several seeds, `/seed1` follows.

    It is trained on what the module itself gives, which a norm may stand behind, and a transcoder also on what the
    module reads.
    """
    name = folder.name if not re.fullmatch(r"seed\d+", folder.name) else folder.parent.name
    match = re.search(r"(?:layers|h|blocks)\.(\d+)(?:\.([\w.]+))?$", name)
    if match is None:
        embeds = name.endswith(("embed_in", "embed_tokens", "wte")) and not transcodes
        return Metadata("hook_embed") if embeds else Metadata()
    block, inside = f"blocks.{match[1]}", match[2]
    if inside is None:
        reads, writes = f"{block}.hook_resid_pre", f"{block}.hook_resid_post"
    elif inside in SUBLAYERS:
        reads, writes = (f"{block}.{SUBLAYERS[inside]}.{side}" for side in ("hook_in", "hook_out"))
    else:
        reads, writes = f"{name}.input", name
    return Metadata(reads, writes) if transcodes else Metadata(writes)


SUBLAYERS = {"mlp": "mlp", "attention": "attn", "attn": "attn", "self_attn": "attn"}
"""TransformerLens' names for the modules of a block, by transformers' names."""


def read_dictionary_learning(folder: Path) -> Dictionary:
    """A dictionary that `dictionary_learning` saved as `config.json` and `ae.pt`. The file is a state dictionary, and
    loading it runs no code from it.

    As its own `load_dictionary` does, decoder vectors of an `AutoEncoder` are scaled to norm 1, and its latents with
    them.

    Raises:
        DictionaryError: where it lacks weights, is of a kind unknown here, or was saved before its threshold was set.
        OSError, ValueError, KeyError, RuntimeError, UnpicklingError: where a file is damaged.
    """
    trainer, buffer = (_field(read_json(folder / "config.json"), part, dict) or {} for part in ("trainer", "buffer"))
    weights: dict[str, Tensor] = torch.load(folder / DICTIONARY_LEARNING_WEIGHTS, map_location="cpu", weights_only=True)
    kind = str(trainer["dict_class"])
    if kind not in DICTIONARY_LEARNING:
        raise DictionaryError(
            f"{folder} holds a {kind!r} of dictionary_learning, which cannot be read: choose one of"
            f" {', '.join(DICTIONARY_LEARNING)}"
        )
    architecture, subtract_bias = DICTIONARY_LEARNING[kind]
    renamed = _renamed(weights)
    if architecture == "gated" and "W_enc" in renamed:
        renamed["b_enc"] = torch.zeros(renamed["W_enc"].shape[1])
    if architecture == "jumprelu" and "threshold" in renamed and float(renamed["threshold"].min()) < 0:
        raise DictionaryError(
            f"the {kind} in {folder} was saved before its threshold was set, so its latents depend on the whole "
            "batch: train it further, until the threshold is set"
        )
    if architecture != "jumprelu":
        renamed.pop("threshold", None)  # a TopK dictionary keeps one beside k, and does not use it by default
    if kind == "AutoEncoder" and {"W_enc", "b_enc", "W_dec"} <= renamed.keys():
        norms = renamed["W_dec"].norm(dim=1)
        renamed |= {
            "W_dec": renamed["W_dec"] / torch.where(norms > 0, norms, 1.0)[:, None],  # a row of norm 0 stays zero
            "W_enc": renamed["W_enc"] * norms,
            "b_enc": renamed["b_enc"] * norms,
        }
    hooks = dictionary_learning_hooks(trainer, _field(buffer, "io", str) or "out")
    metadata = replace(hooks, context_size=_field(buffer, "ctx_len", int), model_name=_field(trainer, "lm_name", str))
    return Dictionary(architecture, renamed, metadata, subtract_bias=subtract_bias, k=_field(trainer, "k", int))


DICTIONARY_LEARNING = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
"""`dict_class` of dictionary_learning: the architecture, and whether it subtracts the decoder's bias from its input."""

RENAMED = {
    "W_enc": "W_enc",
    "W_dec": "W_dec",
    "b_enc": "b_enc",
    "encoder.bias": "b_enc",
    "b_dec": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "decoder.bias": "b_dec",
    "W_skip": "W_skip",
    "threshold": "threshold",
    "gate_bias": "b_gate",
    "r_mag": "r_mag",
    "mag_bias": "b_mag",
}
"""Other trainers' names for the weights."""

TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""The weights that are stored [out, in], as `torch.nn.Linear` does."""


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name: weights[theirs] for theirs, name in RENAMED.items() if theirs in weights}
    return renamed | {name: weights[theirs].T for theirs, name in TRANSPOSED.items() if theirs in weights}


def dictionary_learning_hooks(trainer: Mapping[str, Any], side: str) -> Metadata:
    """The hook points, from the layer, the submodule's name, and whether its input or output was read."""
    layer = _field(trainer, "layer", int)
    name = str(trainer.get("submodule_name") or "resid_post")
    part = next((part for part in DICTIONARY_LEARNING_HOOKS if part in name), None)
    if layer is None or part is None:
        return Metadata()
    reads, writes = (f"blocks.{layer}.{hook}" for hook in DICTIONARY_LEARNING_HOOKS[part])
    return {"in": Metadata(reads), "in_and_out": Metadata(reads, writes)}.get(side, Metadata(writes))


DICTIONARY_LEARNING_HOOKS = {
    "resid": ("hook_resid_pre", "hook_resid_post"),
    "mlp": ("mlp.hook_in", "mlp.hook_out"),
    "att": ("attn.hook_in", "attn.hook_out"),
}
"""For a part of a submodule's name, the hook points of its input and output."""


def read_sae_lens(folder: Path) -> Dictionary:
    """A standard, TopK or JumpReLU SAE that SAELens saved, read without SAELens.

    Raises:
        DictionaryError: where it is of another kind, or expects inputs that are normalised or reshaped.
        OSError, ValueError, SafetensorError: where a file is damaged.
    """
    from safetensors.torch import load_file

    config = up_to_date(read_json(folder / "cfg.json"))
    architecture, said = str(config.get("architecture")), _field(config, "metadata", dict) or {}
    check_described(config, said)
    plain = (
        config.get("normalize_activations", "none") == "none" and config.get("reshape_activations", "none") == "none"
    )
    if architecture not in ("standard", "topk", "jumprelu") or not plain or config.get("rescale_acts_by_decoder_norm"):
        raise DictionaryError(
            f"the SAE in {folder} ({architecture}) cannot be read without SAELens, which is not installed for this"
            " TransformerLens: install transformer-lens<4"
        )
    metadata = Metadata(**{field.name: said.get(field.name) for field in fields(Metadata)})
    subtract_bias = bool(config.get("apply_b_dec_to_input", True))
    weights = without_scaling(load_file(folder / SAE_LENS_WEIGHTS))
    return Dictionary(architecture, weights, metadata, subtract_bias=subtract_bias, k=config.get("k"))


def check_described(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Check that an SAE's configuration has the types that SAELens writes. SAELens itself also loads others.

    Raises:
        ValueError: where a field that decides what the SAE does, or where, has another type, or more latents are to be
            kept than there are.
    """
    for name, kind in SAE_LENS_FIELDS.items():
        if name in config:
            _typed(name, config[name], kind)
    k, d_sae = config.get("k"), config.get("d_sae")
    if k is not None and d_sae is not None and not 1 <= k <= d_sae:
        raise ValueError(f"k = {k} does not fit the {d_sae:,} latents")
    for name, kind in SAE_LENS_METADATA.items():
        _field(metadata, name, kind)


SAE_LENS_FIELDS: dict[str, type] = {
    "d_in": int,
    "d_sae": int,
    "k": int,
    "apply_b_dec_to_input": bool,
    "rescale_acts_by_decoder_norm": bool,
    "normalize_activations": str,
    "reshape_activations": str,
}
SAE_LENS_METADATA: dict[str, type] = {
    "hook_name": str,
    "hook_name_out": str,
    "hook_head_index": int,
    "hook_head_index_out": int,
    "hf_hook_name": str,
    "hf_hook_name_out": str,
    "context_size": int,
    "prepend_bos": bool,
}
KINDS: dict[type, str] = {int: "a whole number", str: "a text", bool: "true or false", dict: "an object"}
"""The name of a type in an error message."""


def _field(content: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of a configuration; None if it is missing or null.

    Raises:
        ValueError: where it is of another kind.
    """
    value = content.get(name)
    return None if value is None else _typed(name, value, kind)


def _typed(name: str, value: Any, kind: type) -> Any:
    """The value of a field, checked to be of a type. Neither `true` nor infinity is a whole number."""
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise ValueError(f"{name} = {value!r} is not {KINDS[kind]}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError, OSError: where it is damaged, or holds something else.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} does not hold a JSON object")
    return content
