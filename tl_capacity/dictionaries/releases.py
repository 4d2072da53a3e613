"""Releases: which SAEs SAELens' directory has for a model. The directory comes with SAELens, so no
network is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from tl_capacity.dictionaries.loading import sae_lens_works

ALIKE = 0.6
"""How alike two models' names must be, as difflib measures it, for the SAEs of one to be suggested for the other."""
SHOWN = 6
"""Most releases that a sentence names."""


@dataclass(frozen=True)
class Release:
    """One release of SAELens' directory.

    Attributes:
        name: of the release.
        model: the model that it is for, as the directory names it.
        saes: the ids of its SAEs.
    """

    name: str
    model: str
    saes: tuple[str, ...]

    @property
    def example(self) -> str:
        """`RELEASE/SAE_ID` of an SAE in the middle of the release. In most releases that is a middle layer."""
        return f"{self.name}/{self.saes[len(self.saes) // 2]}"


def releases_for(model: str) -> list[Release]:
    """The releases for a model, followed by those for models of a similar name, nearest first. Empty without SAELens.

    Releases of residual streams come before others, since every model can be tapped there.
    """
    if not sae_lens_works():
        return []
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    aliases, found = _aliases(), []
    mine = _key(model, aliases)
    for name, entry in get_pretrained_saes_directory().items():
        if entry.saes_map:
            likeness = SequenceMatcher(None, mine, _key(entry.model, aliases)).ratio()
            found.append((likeness, "-res" in name, Release(name, entry.model, tuple(entry.saes_map))))
    near = sorted((each for each in found if each[0] >= ALIKE), key=lambda each: each[:2], reverse=True)
    return [release for _, _, release in near]


def advice(model: str) -> str:
    """What to pass for a model that comes with no SAE, as part of a sentence, with names that can be pasted."""
    releases = releases_for(model)
    aliases = _aliases() if releases else {}
    own = [release for release in releases if _key(release.model, aliases) == _key(model, aliases)]
    if own:
        more = f", or of {len(own) - SHOWN} more releases" if len(own) > SHOWN else ""
        return f"pass one of those that SAELens' directory has for this model: {_pasted(own)}{more}"
    passed = "pass a folder, RELEASE/SAE_ID of SAELens' directory, or an SAE in memory"
    if not releases:
        return passed
    return (
        f"{passed}; SAELens' directory has none for this model, but some for models of similar names, which may be "
        f"other models: {_pasted(releases)}"
    )


def _pasted(releases: Sequence[Release]) -> str:
    return ", ".join(repr(release.example) for release in releases[:SHOWN])


def _key(model: str, aliases: dict[str, str]) -> str:
    """One name for all spellings of a model's name: `gpt2`, `gpt2-small` and `https://huggingface.co/gpt2`."""
    name = model.removeprefix("https://huggingface.co/").lower()
    short = name.rpartition("/")[2]
    return (aliases.get(name) or aliases.get(short) or name).lower().rpartition("/")[2]


def _aliases() -> dict[str, str]:
    """TransformerLens' other names of models, each with the name it stands for."""
    from transformer_lens import loading_from_pretrained

    known: Any = loading_from_pretrained
    return dict(known.make_model_alias_map())
