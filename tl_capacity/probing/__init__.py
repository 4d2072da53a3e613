"""Probing: which concepts a linear probe reads off a model's activations, and which features of the teacher a student's stream still tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.probing.activations import Activations as Activations
    from tl_capacity.probing.activations import collect as collect
    from tl_capacity.probing.concepts import LabelledTexts as LabelledTexts
    from tl_capacity.probing.concepts import load_concepts as load_concepts
    from tl_capacity.probing.probes import Probe as Probe
    from tl_capacity.probing.probes import fit_probes as fit_probes
    from tl_capacity.probing.recover import recover_features as recover_features

_HOMES = {
    "Activations": "activations",
    "LabelledTexts": "concepts",
    "Probe": "probes",
    "collect": "activations",
    "fit_probes": "probes",
    "load_concepts": "concepts",
    "recover_features": "recover",
}

__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
