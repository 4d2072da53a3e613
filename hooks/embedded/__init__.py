"""The embedded teacher: a small GPT-NeoX with three SAEs and public-domain text, installed with the package. Everything
can be tried without a hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import NamedModel, TokenSource
from tl_capacity.plugins import plugins

FOLDER = Path(__file__).parent
LAYERS = (1, 3, 5)
MEASURED, HELD_OUT = ("embedded", "embedded:measure"), "embedded:heldout"
"""The names of the two parts of the corpus: for measuring, and for judging what was made with the other."""


class EmbeddedCorpus(TokenSource):
    """Public-domain prose on which the embedded teacher was not trained: `embedded` (or `embedded:measure`) and
    `embedded:heldout`.
    """

    name = "embedded corpus"
    summary = "embedded[:measure|:heldout]: public-domain prose that the embedded teacher has not seen"

    def matches(self, spec: str) -> bool:
        return spec in (*MEASURED, HELD_OUT)

    def documents(self, spec: str) -> Iterator[str | None]:
        split = spec.partition(":")[2] or "measure"
        path = str(FOLDER / "texts" / f"{split}.jsonl.xz")
        return plugins().token_sources["jsonl file"].documents(path)


def heldout_of(source: str) -> str | None:
    """The text to judge on what was made with a text: for one part of the corpus the other; None for another text."""
    return HELD_OUT if source in MEASURED else None


def load() -> tuple[Any, Any]:
    """`(causal language model, tokenizer)` of the embedded teacher, with its float16 weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32, use_safetensors=True)
    return model, PreTrainedTokenizerFast.from_pretrained(FOLDER / "model")


@hookimpl
def register_models(register: Callable[[NamedModel], None]) -> None:
    record = FOLDER / "training.json"
    register(
        NamedModel(
            name="embedded",
            load=load,
            summary="GPT-NeoX, 6 layers, d=128, trained on public-domain prose; SAEs at layers 1, 3, 5",
            saes={f"blocks.{layer}.hook_resid_post": FOLDER / "saes" / f"layer{layer}" for layer in LAYERS},
            corpus="embedded",
            revision=json.loads(record.read_bytes()).get("weights_sha256") if record.exists() else None,
        )
    )


@hookimpl
def register_token_sources(register: Callable[[TokenSource], None]) -> None:
    register(EmbeddedCorpus())
