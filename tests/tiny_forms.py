"""A tiny random model of a family in every form: the Hugging Face model, TransformerBridge and HookedTransformer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_families import CONFIGS, SHARED, SIZES, TOKENS
from tokenizers import Tokenizer, models
from transformer_lens import HookedTransformer, HookedTransformerConfig, loading_from_pretrained
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    OlmoConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)

HUGGING_FACE, BRIDGE, HOOKED = "Hugging Face", "TransformerBridge", "HookedTransformer"
OLMO2: dict[str, Any] = {
    "original_architecture": "Olmo2ForCausalLM",
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "d_mlp": 96,
    "n_layers": 2,
    "n_ctx": 16,
    "d_vocab": 50,
    "act_fn": "silu",
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 8,
    "rotary_base": 10000.0,
    "gated_mlp": True,
    "device": "cpu",
}
"""The settings that TransformerLens has for a published OLMo 2, in this size."""
ARCHITECTURES: dict[str, Any] = CONFIGS | {
    "gemma": lambda: GemmaConfig(**SHARED, **SIZES, num_key_value_heads=2, head_dim=16),
    "olmo": lambda: OlmoConfig(**SHARED, **SIZES, num_key_value_heads=4),
    "phi3": lambda: Phi3Config(**SHARED, **SIZES, num_key_value_heads=2),
}
WITHOUT_HOOKED = {"opt", "phi", "mamba", "gemma", "olmo"}
"""Architectures that HookedTransformer 3.9 has not, or not without a hub."""
PUBLISHED = {"gemma2": "google/gemma-2-2b", "gemma3": "google/gemma-3-1b-pt"}
"""Models under whose names TransformerLens has the settings of an architecture, which it reads from no configuration.
"""


def tokenizer() -> Any:
    whole = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w49"))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="w0",
        eos_token="w0",
        pad_token="w1",
        name_or_path="local",
        add_bos_token=True,
    )


@cache
def hugging_face(family: str) -> Any:
    """A model whose every weight, norms included, is away from what it begins as."""
    torch.manual_seed(0)
    config = ARCHITECTURES[family]()
    if family == "olmo2":
        config.num_key_value_heads = config.num_attention_heads  # TransformerLens converts no other
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = [type(model).__name__]
    if family == "gpt2":
        model.config.n_ctx = 16  # older files have it, and TransformerLens asks for it
    return model


@cache
def bridge(family: str) -> Any:
    model = copy.deepcopy(hugging_face(family))
    return TransformerBridge.boot_transformers("local/x", hf_model=model, tokenizer=tokenizer(), device="cpu").eval()


@cache
def hooked(family: str) -> Any:
    """As `HookedTransformer.from_pretrained_no_processing` makes one, which takes no folder."""
    model = hugging_face(family)
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if family == "olmo2":
            settings = HookedTransformerConfig(**OLMO2, eps=config.rms_norm_eps)
        else:
            settings = loading_from_pretrained.get_pretrained_model_config(
                PUBLISHED.get(family, folder), device="cpu", n_ctx=16
            )
        if family in PUBLISHED:
            settings.d_model, settings.n_layers, settings.n_heads, settings.d_head, settings.d_mlp = 32, 2, 4, 16, 96
            settings.n_key_value_heads, settings.rotary_dim, settings.window_size = 2, 16, config.sliding_window
            settings.d_vocab = settings.d_vocab_out = 50
            settings.attn_scale, settings.eps = 4.0, config.rms_norm_eps
            settings.attn_types = ["local" if kind.startswith("sliding") else "global" for kind in config.layer_types]
            settings.output_logits_soft_cap = config.final_logit_softcapping or -1.0
        weights = loading_from_pretrained.get_pretrained_state_dict(folder, settings, model)
    lens = HookedTransformer(settings, tokenizer(), move_to_device=False)
    lens.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return lens.eval()


QUICK = {"gpt2", "gemma2", "olmo2"}
"""One architecture of each way to place norms; the others are tried by the slow tests."""
FORMS = {HUGGING_FACE: hugging_face, BRIDGE: bridge, HOOKED: hooked}


def form(family: str, name: str) -> Any:
    """A family's model in a form, the same one each time."""
    return FORMS[name](family)


def cases(families: Iterable[str], quick: Iterable[str] = QUICK) -> list[Any]:
    """`(family, form)` as parameters of a test."""
    return [
        pytest.param(family, name, marks=[] if family in quick else [pytest.mark.slow])
        for family in families
        for name in FORMS
        if name != HOOKED or family not in WITHOUT_HOOKED
    ]


@cache
def sides(family: str) -> dict[str, torch.Tensor]:
    """What every module of the Hugging Face model reads and gives for `TOKENS`, by hooks of torch on it: `PATH.input`
    and `PATH.output`.
    """
    seen: dict[str, torch.Tensor] = {}
    handles = []
    model = hugging_face(family)
    for path, module in model.named_modules():

        def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, path: str = path) -> None:
            seen[f"{path}.input"] = args[0] if args else kwargs.get("hidden_states")
            seen[f"{path}.output"] = out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(see, with_kwargs=True))
    with torch.no_grad():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    return seen
