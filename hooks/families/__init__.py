"""Model families: where Hugging Face architectures keep their residual stream, and how their students are built. One file per family."""

from __future__ import annotations

from collections.abc import Callable

from tl_capacity.hooks.families import gemma, gpt2, gpt_neox, llama, mamba, others, qwen

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import ModelFamily

FAMILIES = (gpt_neox.FAMILY, gpt2.FAMILY, llama.FAMILY, qwen.FAMILY, gemma.FAMILY, mamba.FAMILY, *others.FAMILIES)


@hookimpl
def register_model_families(register: Callable[[ModelFamily], None]) -> None:
    for family in FAMILIES:
        register(family)
