"""SAEs that a model carries while it is measured: what `add_sae` and `run_with_saes` attach changes neither what is
counted nor which hooks remain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, all_hooks
from place import placed

import tl_capacity as tlc
from tl_capacity.errors import HookPointError

HOOK, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
CANONICAL = {
    "HookedSAETransformer": HOOK,
    "SAETransformerBridge": "blocks.1.hook_out",
}
MLP = {
    "HookedSAETransformer": ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
    "SAETransformerBridge": ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"),
}
KINDS = tuple(CANONICAL)
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def bare(models: dict[str, Any]) -> Iterator[None]:
    """Each test begins without SAEs."""
    yield
    for model in models.values():
        model.reset_saes()


@pytest.fixture(scope="module")
def models(make_model: Make) -> dict[str, Any]:
    """Models of this file alone, as taking an SAE away leaves other hook points."""
    made = {kind: make_model(kind) for kind in KINDS}
    for model in made.values():  # at the first such run transformers leaves recorders of its own on the blocks
        model.run_with_cache(placed(torch.tensor([[BOS, 1]])))
    return made


@torch.no_grad()
def inputs_of(model: Any, tokens: torch.Tensor, name: str) -> torch.Tensor:
    """[token, d] of the tokens that count, from TransformerLens' cache of the model as it is now."""
    return model.run_with_cache(tokens)[1][name][tokens != BOS]


@torch.no_grad()
def counts_of(sae: Any, inputs: torch.Tensor) -> np.ndarray:
    """[feature] by a copy of the SAE that nothing is attached to."""
    return (copy.deepcopy(sae).encode(inputs) != 0).sum(0).numpy(force=True)


def hooks_on(module: Any) -> dict[str, list[int]]:
    """The identity of every hook, by the module that has it."""
    return {name: hooks for name, hooks in all_hooks(module).items() if hooks}


def counted(capacity: Any, hook: str) -> np.ndarray:
    return capacity.measurement()[hook].summary.arrays["counts"].sum(0)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", KINDS)
class TestTheInputIsCounted:
    """The SAE that is passed is the very object that is attached; the reference is a copy of it."""

    @pytest.mark.parametrize("name", ["as asked for", "canonical"])
    @pytest.mark.parametrize("way", ["before", "after", "call", "run_with_saes"])
    def test_of_an_sae(
        self,
        models: dict[str, Any],
        make_sae: Make,
        tokens: torch.Tensor,
        kind: str,
        error_term: bool,
        way: str,
        name: str,
    ) -> None:
        model, hook = models[kind], HOOK if name == "as asked for" else CANONICAL[kind]
        sae = make_sae("standard", hook)
        hooks, sae_hooks = hooks_on(model), hooks_on(sae)
        clean = inputs_of(model, tokens, CANONICAL[kind])
        if way == "before":
            model.add_sae(sae, use_error_term=error_term)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            if way in ("after", "call"):
                model.add_sae(sae, use_error_term=error_term)
            if way == "run_with_saes":
                model.run_with_saes(tokens, saes=[sae], use_error_term=error_term)
                once = capacity.n_tokens
                model(tokens)  # the hook point is another one again
                assert capacity.n_tokens == 2 * once
            elif way == "call":
                model(tokens)
            else:
                capacity.run(tokens.split(8))
            times = 2 if way == "run_with_saes" else 1
            np.testing.assert_array_equal(counted(capacity, hook), times * counts_of(sae, clean))
            assert capacity.n_tokens == times * len(clean)
        if way != "run_with_saes":
            assert hooks_on(model) == hooks, "an attached SAE has hook points and no hooks"
            theirs = inputs_of(model, tokens, f"{CANONICAL[kind]}.hook_sae_input")
            torch.testing.assert_close(theirs, clean, rtol=0, atol=0)
            model.reset_saes()
        assert hooks_on(model) == hooks
        assert hooks_on(sae) == sae_hooks

    def test_of_a_transcoder(
        self, models: dict[str, Any], make_sae: Make, tokens: torch.Tensor, kind: str, error_term: bool
    ) -> None:
        """SAELens takes every hook from the point that a transcoder reads when it takes the transcoder away."""
        model, (hook, hook_out) = models[kind], MLP[kind]
        sae = make_sae("transcoder", hook, hook_out)
        plain = copy.deepcopy(sae)
        clean, target = inputs_of(model, tokens, hook), inputs_of(model, tokens, hook_out)
        with torch.no_grad():
            left = (target.double() - plain(clean).double()).square().sum()
            fvu = float(left / (target.double() - target.double().mean(0)).square().sum())
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            model.run_with_saes(tokens, saes=[sae], use_error_term=error_term)
            model.add_sae(sae, use_error_term=error_term)
            model(tokens)
            model.reset_saes()
            capacity.run(tokens.split(8))
            np.testing.assert_array_equal(counted(capacity, hook), 3 * counts_of(sae, clean))
            assert capacity.measurement()[hook].summary.fvu.value == pytest.approx(fvu, rel=1e-4)

    def test_of_attention_heads(
        self, models: dict[str, Any], make_sae: Make, tokens: torch.Tensor, kind: str, error_term: bool
    ) -> None:
        """A bridge gives the SAE heads that are joined already, and SAELens tells the SAE so while it is attached."""
        model, hook = models[kind], "blocks.1.attn.hook_z"
        sae = make_sae("standard", hook, reshape_activations="hook_z")
        clean = inputs_of(model, tokens, model.blocks[1].attn.hook_z.name).flatten(1)
        with tlc.add_capacity_hooks(model, sae, fvu_every=1) as capacity:
            model.add_sae(sae, use_error_term=error_term)
            model(tokens)
            capacity.run(tokens.split(8))
            model.reset_saes()
            model(tokens)
            np.testing.assert_array_equal(counted(capacity, hook), 3 * counts_of(make_sae("standard", hook), clean))

    def test_behind_another_sae(
        self, models: dict[str, Any], make_sae: Make, tokens: torch.Tensor, kind: str, error_term: bool
    ) -> None:
        """What a later SAE is given is the model's with the earlier SAE in it, and without an error term another."""
        model, early, late = models[kind], make_sae("standard", HOOK), make_sae("standard", LATER, seed=1)
        end = LATER if kind == "HookedSAETransformer" else "blocks.2.hook_out"
        clean = counts_of(late, inputs_of(model, tokens, end))
        for sae in (early, late):
            model.add_sae(sae, use_error_term=error_term)
        with tlc.add_capacity_hooks(model, [early, late]) as capacity:
            found = capacity.run(tokens.split(8)).measurement()
        says = f"{LATER}: counted while the model ran with the reconstruction of the SAE at {HOOK}, without its error"
        assert [note.startswith(says) for note in found[LATER].notes] == ([] if error_term else [True])
        assert set(found[LATER].notes) <= set(found.warnings)
        assert not found[HOOK].notes
        given = counts_of(late, inputs_of(model, tokens, f"{end}.hook_sae_input"))
        np.testing.assert_array_equal(found[LATER].summary.arrays["counts"].sum(0), given)
        assert np.array_equal(given, clean) == error_term


@pytest.mark.parametrize("kind", KINDS)
class TestTheHooksOfAnAttachedSAE:
    def test_its_own_hook_point_is_counted_once(
        self, models: dict[str, Any], make_sae: Make, tokens: torch.Tensor, kind: str
    ) -> None:
        """Counting encodes with the SAE, whose hook points must not take that for the model's run."""
        model, sae = models[kind], make_sae("gated", HOOK)
        model.add_sae(sae)
        name = f"{CANONICAL[kind]}.hook_sae_input"
        with tlc.add_capacity_hooks(model, {name: sae}) as capacity:
            capacity.run(tokens.split(8))
        np.testing.assert_array_equal(counted(capacity, name), counts_of(sae, inputs_of(model, tokens, name)))

    def test_an_intervention_sees_the_model_s_run_alone(
        self, models: dict[str, Any], make_sae: Make, tokens: torch.Tensor, kind: str
    ) -> None:
        model, sae, shapes = models[kind], make_sae("standard", HOOK), []
        model.add_sae(sae)
        name = f"{CANONICAL[kind]}.hook_sae_acts_post"

        def without_some(latents: torch.Tensor, hook: Any) -> torch.Tensor:
            shapes.append(tuple(latents.shape))
            return latents * (torch.arange(latents.shape[-1], device=latents.device) > 32)

        wanted = model.run_with_hooks(tokens, fwd_hooks=[(name, without_some)])
        before = counts_of(sae, inputs_of(model, tokens, f"{CANONICAL[kind]}.hook_sae_input"))
        with tlc.add_capacity_hooks(model, sae) as capacity:
            found = model.run_with_hooks(tokens, fwd_hooks=[(name, without_some)])
        assert torch.equal(wanted, found)
        assert shapes == [(*tokens.shape, sae.cfg.d_sae)] * 2
        np.testing.assert_array_equal(counted(capacity, HOOK), before)
        assert before[:32].any()

    def test_a_hook_point_that_is_gone(
        self, models: dict[str, Any], make_sae: Make, tokens: torch.Tensor, kind: str
    ) -> None:
        model, sae = models[kind], make_sae("standard", HOOK)
        model.add_sae(sae)
        name = f"{CANONICAL[kind]}.hook_sae_input"
        with tlc.add_capacity_hooks(model, {name: sae}) as capacity:
            model.reset_saes()
            with pytest.raises(HookPointError, match=f"{name} was removed after .* attach them again"):
                capacity.run(tokens)
