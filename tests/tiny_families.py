"""A tiny random model of every family, and tokens that all of them know."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

SHARED: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 16,
}
CONFIGS: dict[str, Any] = {
    "gpt-neox": lambda: GPTNeoXConfig(**SHARED, **SIZES, hidden_dropout=0.5, attention_dropout=0.5, rotary_pct=0.25),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=16),
    "opt": lambda: OPTConfig(
        **SHARED,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=16,
        word_embed_proj_dim=16,
        layerdrop=0.5,
    ),
    "llama": lambda: LlamaConfig(**SHARED, **SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHARED, **SIZES, num_key_value_heads=2, sliding_window=8),
    "olmo2": lambda: Olmo2Config(**SHARED, **SIZES, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SHARED, **SIZES, num_key_value_heads=4),
    "qwen3": lambda: Qwen3Config(**SHARED, **SIZES, num_key_value_heads=2, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **SHARED, **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHARED, **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8
    ),
    "phi": lambda: PhiConfig(**SHARED, **SIZES, partial_rotary_factor=0.5, resid_pdrop=0.5),
    "mamba": lambda: MambaConfig(**SHARED, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def teacher(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


TOKENS = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(0))
