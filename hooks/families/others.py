"""Architectures that can be tapped, and for which no rule says what a student looks like."""

from __future__ import annotations

from tl_capacity.interfaces import ModelFamily

FAMILIES = (
    ModelFamily("opt", ("opt",), "model.decoder.layers", "OPT"),
    ModelFamily("phi-olmo", ("phi", "phi3", "olmo", "olmo2"), "model.layers", "Phi, OLMo"),
)
