"""Hook points of every family, in every form of the model, against hooks of torch on the modules of transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import TOKENS
from tiny_forms import ARCHITECTURES, BRIDGE, FORMS, HOOKED, HUGGING_FACE, cases, form, hugging_face, sides

from tl_capacity.errors import HookPointError
from tl_capacity.interfaces import ModelFamily
from tl_capacity.models.hook_points import find_tap_point, hook_names

SPEC = importlib.util.spec_from_file_location("write_taps", Path(__file__).parents[2] / "docs" / "write_taps.py")
assert SPEC is not None
assert SPEC.loader is not None
write_taps: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(write_taps)

ATTENTION = {"gpt-neox": "attention", "gpt2": "attn"}
JOINED_BY = {"gpt-neox": "dense", "gpt2": "c_proj", "opt": "out_proj", "phi": "dense"}
NEURONS_READ_BY = {"gpt-neox": "dense_4h_to_h", "gpt2": "c_proj", "phi": "fc2"}
NORM_BEHIND = {"gemma2", "gemma3", "olmo2"}
"""Families whose sublayers' outputs pass through a norm before they are added to the stream."""
NORM_BEFORE_MLP = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm", "gemma3": "pre_feedforward_layernorm"}
BLOCKS = {"gpt-neox": "gpt_neox.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}
TRANSFORMERS = [family for family in ARCHITECTURES if family != "mamba"]


def modules(family: str) -> dict[str, str]:
    """For each hook in a block, the side of a module of transformers, by hand."""
    attention, behind = ATTENTION.get(family, "self_attn"), family in NORM_BEHIND
    expected = {
        "hook_resid_pre": "input",
        "hook_resid_post": "output",
        "attn.hook_in": f"{attention}.input",
        "attn.hook_out": f"{attention}.output",
        "attn.hook_z": f"{attention}.{JOINED_BY.get(family, 'o_proj')}.input",
        "hook_attn_out": f"{'post_attention_layernorm' if behind else attention}.output",
    }
    if family != "opt":
        expected |= {
            "mlp.hook_in": "mlp.input",
            "mlp.hook_out": "mlp.output",
            "mlp.hook_post": f"mlp.{NEURONS_READ_BY.get(family, 'down_proj')}.input",
            "hook_mlp_out": f"{'post_feedforward_layernorm' if behind else 'mlp'}.output",
        }
    if family not in ("opt", "gpt-neox", "phi"):
        norm = NORM_BEFORE_MLP.get(family, "post_attention_layernorm")
        expected["hook_resid_mid"] = f"{'mlp' if family == 'olmo2' else norm}.input"
    return {hook: f"{BLOCKS.get(family, 'model.layers')}.1.{side}" for hook, side in expected.items()}


def tapped(model: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """What the taps see in one forward pass, heads joined."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    watching = [find_tap_point(model, name).watch(kept.append) for name, kept in seen.items()]
    with torch.no_grad():
        model(TOKENS)
    for remove in watching:
        remove()
    assert {name: len(kept) for name, kept in seen.items()} == dict.fromkeys(seen, 1)
    return {name: kept[0].flatten(2) for name, kept in seen.items()}


def check(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].shape == expected[name].shape, name
        assert (found[name] - expected[name]).abs().max() < 1e-4, name


CASES = cases(TRANSFORMERS)


@pytest.mark.fidelity(
    source="SAELens",
    says="`hook_name` of TransformerLens (Gemma Scope's too)",
    obeyed="the tensor that TransformerLens has under that name is read, on the Hugging Face model too",
)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_hook_carries_what_transformers_modules_say(family: str, name: str) -> None:
    """Modules are names too, as `sparsify` has them, from the base model, and SAELens, from the model with its head."""
    base = BLOCKS.get(family, "model.layers").partition(".")[0] + "."
    expected = {}
    for hook, side in modules(family).items():
        said = side.removesuffix(".output")
        for hook_name in (f"blocks.1.{hook}", said, said.removeprefix(base)):
            expected[hook_name] = sides(family)[side]
    check(tapped(form(family, name), expected), expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_the_embedding(family: str, name: str) -> None:
    """Gemma's is scaled in the module itself."""
    embedding = {"gemma2": "model.embed_tokens.output", "gpt2": "transformer.wte.output"}[family]
    check(tapped(form(family, name), ["hook_embed"]), {"hook_embed": sides(family)[embedding]})


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
@pytest.mark.parametrize("name", [BRIDGE, HOOKED])
def test_what_a_norm_divides_by_comes_before_its_weight(family: str, name: str) -> None:
    """`hook_normalized` of TransformerLens 3; the norm's output is `ln2.hook_out`, or what the MLP reads."""
    norm, config = f"{BLOCKS.get(family, 'model.layers')}.1.{NORM_BEFORE_MLP[family]}", hugging_face(family).config
    read, after = (sides(family)[f"{norm}.{side}"] for side in ("input", "output"))
    centred = read - read.mean(-1, keepdim=True) if family == "gpt2" else read
    eps = config.layer_norm_epsilon if family == "gpt2" else config.rms_norm_eps
    before = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    assert (after - before).abs().max() > 0.1
    expected = {"blocks.1.ln2.hook_normalized": before, "blocks.1.ln2.hook_out": after, "blocks.1.mlp.hook_in": after}
    check(tapped(form(family, name), expected), expected)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_table_in_the_docs(family: str) -> None:
    """Its cells, as they are read off the model families, are what the tests above compare."""
    block = f"{BLOCKS.get(family, 'model.layers')}.1."
    kind = hugging_face(family).config.model_type
    said = {hook: place for hook, place in write_taps.places()[kind].items() if hook in write_taps.HOOKS}
    inside = {
        hook: side.removeprefix(block) for hook, side in modules(family).items() if "." in side.removeprefix(block)
    }
    assert said == inside


def test_a_norm_behind_makes_a_difference() -> None:
    """A test that compares equal tensors would pass for either of the two."""
    for family in NORM_BEHIND:
        own, added = (sides(family)[modules(family)[hook]] for hook in ("mlp.hook_out", "hook_mlp_out"))
        assert (own - added).abs().max() > 0.5


def test_bad_input() -> None:
    model = form("gemma2", HUGGING_FACE)
    for said in ("blocks.1.ln2.hook_normalized", "model.layers.1.mpl"):
        with pytest.raises(HookPointError, match=rf"'{said}' is not a hook point that"):
            find_tap_point(model, said)
    with pytest.raises(
        HookPointError, match=r"'blocks.7.mlp.hook_out' is not a hook point of this model: did you mean"
    ):
        find_tap_point(model, "blocks.7.mlp.hook_out")
    for name in (BRIDGE, HOOKED):
        for said in ("blocks.7.mlp.hook_out", "model.layers.7.mlp", "model.layers.1.mpl"):
            with pytest.raises(HookPointError, match=rf"'{said}' is not a hook point of this model: "):
                find_tap_point(form("gemma2", name), said)
    assert "blocks.1.mlp.hook_out" in hook_names(model)
    with pytest.raises(ValueError, match=r"the family 'toy' names no side .* in its place 'mlp' of 'toy': end it with"):
        ModelFamily("toy", ("toy",), "stack", places={"toy": {"mlp.hook_out": "mlp"}})
