"""Writes the tables of docs/taps.md on which tensor a dictionary is measured: `python docs/write_taps.py [--check]`.

They come from the functions that read dictionaries and from the places of the model families. The tests compare both
with the modules of transformers. With `--check` nothing is written, and the exit code is 1 where the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pages import with_parts, write_or_check

from tl_capacity.dictionaries.dictionary import Metadata
from tl_capacity.dictionaries.formats import dictionary_learning_hooks, sparsify_hooks
from tl_capacity.dictionaries.transcoders import hook_of_layer
from tl_capacity.plugins import plugins

PAGE = Path(__file__).with_name("taps.md")
NAMES = {
    "gpt2": "GPT-2",
    "gpt_neox": "Pythia, GPT-NeoX",
    "opt": "OPT",
    "phi": "Phi 1, 1.5 and 2",
    "llama": "Llama",
    "mistral": "Mistral",
    "olmo": "OLMo",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "phi3": "Phi 3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "olmo2": "OLMo 2",
}
"""Names of the architectures that have places, in the table's order."""
HOOKS = (
    "hook_resid_mid",
    "attn.hook_in",
    "attn.hook_z",
    "attn.hook_out",
    "hook_attn_out",
    "mlp.hook_in",
    "mlp.hook_post",
    "mlp.hook_out",
    "hook_mlp_out",
)


def formats() -> Iterator[tuple[str, str, Metadata]]:
    """The format, what its files say, and the hook points that follow."""
    for module in ("layers.3", "layers.3.mlp", "layers.3.self_attn", "layers.3.mlp.down_proj"):
        yield "sparsify", f"folder `{module}`", sparsify_hooks(Path(module), transcodes=False)
    for module in ("layers.3", "layers.3.mlp", "layers.3.self_attn"):
        yield "sparsify", f"folder `{module}`, `transcode: true`", sparsify_hooks(Path(module), transcodes=True)
    for submodule in ("resid_post_layer_3", "mlp_out_layer3", "attn_out_layer3"):
        trainer = {"layer": 3, "submodule_name": submodule}
        yield "dictionary_learning", f"`submodule_name: {submodule}`", dictionary_learning_hooks(trainer, "out")
    trainer = {"layer": 3, "submodule_name": "mlp_layer3"}
    yield "dictionary_learning", "the same of an MLP, `io: in`", dictionary_learning_hooks(trainer, "in")
    yield "dictionary_learning", "the same, `io: in_and_out`", dictionary_learning_hooks(trainer, "in_and_out")
    config = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    reads, writes = (hook_of_layer(config, name, "3") for name in config)
    says = "`layer_3.safetensors`, `feature_input_hook: mlp.hook_in`, `feature_output_hook: hook_mlp_out`"
    yield "circuit-tracer", says, Metadata(reads, writes)


def format_table() -> Iterator[str]:
    """A row for each statement of a format."""
    yield "| format | its files say | it reads | it writes |"
    yield "|---|---|---|---|"
    for trainer, says, hooks in formats():
        writes = f"`{hooks.hook_name_out}`" if hooks.hook_name_out else "the same"
        yield f"| {trainer} | {says} | `{hooks.hook_name}` | {writes} |"
    yield "| SAELens, Gemma Scope | `hook_name`, `hook_name_out` | the same | the same |"
    yield (
        "| SAELens | `hook_name: model.layers.3.mlp` with `model_class_name: AutoModelForCausalLM` | the same:"
        " the module's output | the same |"
    )
    yield (
        "| SAELens, Gemma Scope 2 | `hook_name: blocks.3.hook_mlp_in` beside `hf_hook_name:"
        " ….pre_feedforward_layernorm.output` | `blocks.3.mlp.hook_in` | `hook_name_out` |"
    )


def places() -> dict[str, dict[str, str]]:
    """For each architecture with places, the place of each hook point in a block."""
    families = {kind: family for family in plugins().model_families for kind in family.model_types}
    return {kind: dict(families[kind].places[kind]) for kind in NAMES}


def family_table() -> Iterator[str]:
    """A column for the architectures that have the same places."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for kind, found in places().items():
        groups.setdefault(tuple(found.get(hook, "") for hook in HOOKS), []).append(NAMES[kind])
    yield "| hook point | " + " | ".join(", ".join(names) for names in groups.values()) + " |"
    yield "|---" * (len(groups) + 1) + "|"
    for number, hook in enumerate(HOOKS):
        cells = (f"`{column[number]}`" if column[number] else "–" for column in groups)
        yield f"| `{hook}` | {' | '.join(cells)} |"
    yield "| `ln2.hook_normalized` |" + " inside the norm |" * len(groups)


def page() -> str:
    """The page with its tables written from the code."""
    return with_parts(PAGE, "write_taps.py", {"formats": format_table(), "families": family_table()})


def main(arguments: list[str]) -> int:
    return write_or_check(PAGE, "write_taps.py", "the code says", page, arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
