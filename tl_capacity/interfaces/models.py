"""The interfaces of model families, and of models that load by a short name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESIDUAL_STREAM = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_post|hook_out)")
"""Hook points before and after a block: the block's number, and which side."""
HOOK_IN_BLOCK = re.compile(r"blocks\.(\d+)\.([\w.]+)")
"""Any hook point of a block: the block's number, and the rest of the name."""


@dataclass(frozen=True)
class ModelFamily:
    """Where a Hugging Face architecture keeps its residual stream, and how to configure a narrower model of it.

    Attributes:
        name: the family's name.
        model_types: the `config.model_type` values it covers.
        blocks: dotted path from the causal language model to its list of blocks; block N writes
            `blocks.N.hook_resid_post`.
        student: the fields that change in the teacher's configuration for a student of some width, or None where it has
            none of that width; without this function the family cannot be distilled. It needs to be cheap: nearby
            widths are tried where one cannot be built.
        places: where a block keeps what hooks inside it mean, by `config.model_type`: from the rest of the hook's name
            to a module of the block and its side, such as `{"mlp.hook_out": "mlp.output"}`. What is not in it needs a
            TransformerLens model.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    summary: str = ""
    student: Callable[[Any, int], Mapping[str, Any] | None] | None = None
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind, inside in self.places.items():
            if strange := [place for place in inside.values() if not place.endswith((".input", ".output"))]:
                raise ValueError(
                    f"the family {self.name!r} names no side of a module in its place {strange[0]!r} of {kind!r}: "
                    "end it with .input or .output"
                )

    def residual(self, hook_name: str) -> tuple[str, str] | None:
        """`(module path, "input" or "output")` of a residual-stream hook; None for any other hook."""
        match = RESIDUAL_STREAM.fullmatch(hook_name)
        if match is None:
            return None
        return f"{self.blocks}.{int(match[1])}", "input" if match[2] in ("hook_resid_pre", "hook_in") else "output"

    def place(self, hook_name: str, model_type: str) -> tuple[str, str] | None:
        """`(module path, "input" or "output")` of a hook name, inside blocks too; None if the family does not say."""
        match = HOOK_IN_BLOCK.fullmatch(hook_name)
        inside = self.places.get(model_type, {}).get(match[2]) if match else None
        if match is None or inside is None:
            return self.residual(hook_name)
        path, _, side = inside.rpartition(".")
        return f"{self.blocks}.{int(match[1])}.{path}", side

    def hook_at(self, path: str, side: str, model_type: str) -> str | None:
        """The hook name of one side of a module of the model; None if the family does not say."""
        match = re.fullmatch(re.escape(self.blocks) + r"\.(\d+)(?:\.([\w.]+))?", path)
        if match is None:
            return None
        if match[2] is None:
            return f"blocks.{match[1]}.{'hook_resid_pre' if side == 'input' else 'hook_resid_post'}"
        places = self.places.get(model_type, {})
        inside = next((hook for hook, place in places.items() if place == f"{match[2]}.{side}"), None)
        return None if inside is None else f"blocks.{match[1]}.{inside}"


@dataclass(frozen=True)
class NamedModel:
    """A model that loads by a short name from an installed package.

    Attributes:
        name: as given to `--model`.
        load: returns `(causal language model, tokenizer)`; may import whatever it needs.
        saes: hook name of each SAE that belongs to the model, and its SAELens folder.
        corpus: the token source to measure it on by default, if any.
        revision: what changes when the weights change.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]
    summary: str = ""
    saes: Mapping[str, Path] = field(default_factory=dict)
    corpus: str | None = None
    revision: str | None = None
