"""Model families: where Hugging Face architectures keep their residual stream, and how their students are built. One
file for each family.
"""

from __future__ import annotations

from collections.abc import Callable

from tl_capacity.hooks.families import gemma, gpt2, gpt_neox, llama, mamba, opt, phi, qwen

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import ModelFamily

FAMILIES = (
    gpt_neox.FAMILY,
    gpt2.FAMILY,
    opt.FAMILY,
    llama.FAMILY,
    qwen.FAMILY,
    gemma.FAMILY,
    *phi.FAMILIES,
    mamba.FAMILY,
)


@hookimpl
def register_model_families(register: Callable[[ModelFamily], None]) -> None:
    for family in FAMILIES:
        register(family)
