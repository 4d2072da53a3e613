"""Importances in nats against gradients taken the long way: an SAE spliced into the model, autograd through its
latents, and exact ablations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, HOOKED, KINDS, all_hooks
from place import on_cpu, placed
from tl_capacity.hooks.importance import IntegratedGradients
from torch.nn import functional as F

import tl_capacity as tlc
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import ImportanceEstimator
from tl_capacity.measure.losses import LOSSES

MakeSAE = Callable[..., Any]
HOOK, EARLY = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"


def spliced(model: Any, hook: str, sae: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as a function of latents [row, position, feature] that are a leaf: the activation is their decoding plus
    the SAE's error, held fixed.
    """
    blocks = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers"}
    kept: list[torch.Tensor] = []

    def splice(activation: torch.Tensor) -> torch.Tensor:
        latents = sae.encode(activation).detach().requires_grad_()
        kept.append(latents)
        return sae.decode(latents) + (activation - sae.decode(latents)).detach()

    if hasattr(model, "hook_dict"):
        name = (
            hook if hook in model.hook_dict else hook.replace("hook_resid_post", "hook_out")
        )  # an SAE bridge knows no aliases
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: splice(activation))])
    else:
        block = model.get_submodule(f"{blocks[model.config.model_type]}.{hook.split('.')[1]}")
        handle = block.register_forward_hook(
            lambda _, args, out: (splice(out[0]), *out[1:]) if isinstance(out, tuple) else splice(out)
        )
        logits = model(tokens).logits
        handle.remove()
    return logits, kept[0]


def attribution(model: Any, hook: str, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """z·∂L/∂z [token, feature] of the tokens that are not BOS."""
    logits, latents = spliced(model, hook, sae, tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return (latents * torch.autograd.grad(loss, latents)[0])[tokens != BOS].double().detach()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_attribution_of_each_latent(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
) -> None:
    model, sae = models_by_kind[kind], make_sae(architecture, HOOK)
    with tlc.add_capacity_hooks(model, sae, importance=["gradient"]) as capacity:
        summary = capacity.run(tokens.split(5)).measurement()[HOOK].summary
    expected = attribution(model, HOOK, sae, tokens)
    assert expected.abs().sum() > 0
    for name, values in (("signed", expected), ("absolute", expected.abs()), ("square", expected.square())):
        found = summary.arrays[f"state/gradient/{name}"].sum(0)
        np.testing.assert_allclose(
            found, values.sum(0).numpy(force=True), rtol=2e-3, atol=1e-4 * float(values.sum(0).abs().max())
        )


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_gradient_is_the_slope_of_the_loss(
    make_model: Callable[..., Any], make_sae: MakeSAE, architecture: str
) -> None:
    """Central differences of the loss where zᵢ·w_dec,i is scaled by 1 ± ε at one position: no autograd, and in float64,
    so that they are exact to ε².
    """
    model, sae, position, epsilon = make_model("gpt_neox").double(), make_sae(architecture, HOOK).double(), 4, 1e-4
    row = placed(torch.tensor([[BOS, *range(1, 12)]]))
    others = [token for token in row[0].tolist() if token != row[0, position]]
    with tlc.add_capacity_hooks(model, sae, importance=["gradient"], mask_token_ids=others) as capacity:
        summary = capacity.run(row).measurement()[HOOK].summary
    assert summary.n_tokens == 1
    found = summary.arrays["state/gradient/signed"].sum(0)

    @torch.no_grad()
    def loss(shift: torch.Tensor) -> float:
        def shifted(_: Any, args: Any, out: Any) -> Any:
            changed = (out[0] if isinstance(out, tuple) else out).clone()
            changed[0, position] += shift
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handle = model.gpt_neox.layers[1].register_forward_hook(shifted)
        logits = model(row).logits
        handle.remove()
        return float(F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum"))

    with torch.no_grad():
        latents = sae.encode(model(row, output_hidden_states=True).hidden_states[2])[0, position]
    active = latents.nonzero()[:, 0].tolist()
    assert len(active) > 3
    assert not found[latents.numpy(force=True) == 0].any()
    slopes = [
        (loss(epsilon * latents[i] * sae.W_dec[i]) - loss(-epsilon * latents[i] * sae.W_dec[i])) / (2 * epsilon)
        for i in active
    ]
    np.testing.assert_allclose(found[active], slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
def test_one_backward_serves_all_layers(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
) -> None:
    model, saes = models_by_kind[kind], {EARLY: make_sae("standard", EARLY), HOOK: make_sae("topk", HOOK)}
    with tlc.add_capacity_hooks(model, saes, importance=["gradient", "fisher", "second_moment"]) as capacity:
        together = capacity.run(tokens.split(8)).measurement()
    for hook, sae in saes.items():
        with tlc.add_capacity_hooks(model, {hook: sae}, importance=["gradient", "fisher"]) as capacity:
            alone = capacity.run(tokens.split(8)).measurement()[hook]
        for name in ("gradient", "fisher"):
            np.testing.assert_allclose(together[hook].importance(name), alone.importance(name), rtol=1e-4)
        assert together[hook].estimator("fisher").unit == "nats per token"


def test_fisher_is_half_the_expected_squared_score(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    """Against the Fisher information summed over the whole vocabulary, with no sampling."""
    sae, rows = make_sae("standard", HOOK), tokens[:2, :4]
    logits, latents = spliced(neox, HOOK, sae, rows)
    log_p = logits[:, :-1].log_softmax(-1)
    exact = torch.zeros_like(latents, dtype=torch.float64)
    for row, position, word in np.ndindex(*log_p.shape):
        score = torch.autograd.grad(log_p[row, position, word], latents, retain_graph=True)[0]
        exact += log_p[row, position, word].exp().item() * (latents * score).double().detach().square()
    counted = rows != BOS
    expected = exact[counted].sum(0).cpu() / 2
    repeated = rows.repeat(500, 1)
    with tlc.add_capacity_hooks(neox, sae, importance=["fisher"]) as capacity:
        found = (
            capacity.run(repeated.split(100)).measurement()[HOOK].summary.arrays["state/fisher/square"].sum(0) / 2 / 500
        )
    largest = expected.argsort(descending=True)[:10]
    np.testing.assert_allclose(found[largest], expected[largest].numpy(force=True), rtol=0.35)
    assert found.sum() == pytest.approx(float(expected.sum()), rel=0.1)


@pytest.mark.slow
def test_fisher_predicts_the_kl_of_small_changes(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    """Weakening one firing by ε changes the output by a KL of ε² times its term, here with the exact Fisher
    information.
    """
    sae, rows, epsilon = make_sae("standard", HOOK), tokens[:1, :6], 0.05
    blocks = neox.gpt_neox.layers[1]
    with torch.no_grad():
        clean = neox(rows).logits[:, :-1].log_softmax(-1)
    position, ratios = 2, []
    logits, latents = spliced(neox, HOOK, sae, rows)
    log_p = logits[:, :-1].log_softmax(-1)
    active = latents[0, position].nonzero()[:, 0].tolist()[:5]
    for feature in active:
        exact = 0.0
        for place, word in np.ndindex(*log_p.shape[1:]):
            score = torch.autograd.grad(log_p[0, place, word], latents, retain_graph=True)[0][0, position, feature]
            change = (latents[0, position, feature] * score).detach()
            exact += float(log_p[0, place, word].detach().exp()) * float(change) ** 2

        def weaken(_: Any, args: Any, out: Any, feature: int = feature) -> Any:
            changed = (out[0] if isinstance(out, tuple) else out).clone()
            changed[0, position] -= epsilon * latents[0, position, feature].detach() * sae.W_dec[feature].detach()
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handle = blocks.register_forward_hook(weaken)
        with torch.no_grad():
            other = neox(rows).logits[:, :-1].log_softmax(-1)
        handle.remove()
        ratios.append(float((clean.exp() * (clean - other)).sum().double()) / (epsilon**2 * exact / 2))
    assert np.median(ratios) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("kind", HOOKED)
def test_nothing_is_left_behind(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
) -> None:
    model, sae = models_by_kind[kind], make_sae("standard", HOOK)
    before, asking = all_hooks(model), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad(), tlc.add_capacity_hooks(model, sae, importance=["gradient", "fisher"]) as capacity:
        capacity.run(tokens.split(8))
    assert all_hooks(model) == before
    assert [p.requires_grad for p in model.parameters()] == asking
    assert all(p.grad is None for p in [*model.parameters(), *sae.parameters()])
    assert torch.equal(torch.get_rng_state(), random)


def test_frozen_parameters(make_model: Callable[..., Any], make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    found = []
    for frozen in (False, True):
        model = make_model("gpt_neox").requires_grad_(not frozen)
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK), importance=["gradient"]) as capacity:
            found.append(capacity.run(tokens).measurement()[HOOK].importance("gradient"))
        assert all(p.requires_grad is not frozen for p in model.parameters())
    np.testing.assert_allclose(*found, rtol=0 if on_cpu() else 1e-12)  # a GPU adds in no fixed order


def test_an_interrupted_run_draws_what_a_whole_one_does(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    sae, batches = make_sae("standard", HOOK), tokens.split(6)
    with tlc.add_capacity_hooks(neox, sae, importance=["fisher"]) as capacity:
        whole = capacity.run(batches).measurement()
    with tlc.add_capacity_hooks(neox, sae, importance=["fisher"]) as capacity:
        saved = capacity.run(batches[:2]).checkpoint()
    with tlc.add_capacity_hooks(neox, sae, importance=["fisher"]) as capacity:
        capacity.resume(*saved)
        resumed = capacity.run(batches).measurement()
    np.testing.assert_allclose(
        resumed[HOOK].summary.arrays["state/fisher/square"],
        whole[HOOK].summary.arrays["state/fisher/square"],
        rtol=0 if on_cpu() else 1e-12,
    )


def test_a_plain_call_is_refused(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK), importance=["gradient"]) as capacity:
        with pytest.raises(
            CapacityError,
            match=r"needs the gradient of cross_entropy, which a plain call of the model does not provide: use run\(\)",
        ):
            neox(tokens)
        assert capacity.run(tokens).n_tokens > 0


def test_an_sae_that_does_not_write_its_decoder_vectors_is_refused(
    hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor
) -> None:
    for sae, says in (
        (make_sae("layer_norm", HOOK), "does not write the sum of its decoder vectors"),
        (
            make_sae("transcoder", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
            "writes to another hook point",
        ),
    ):
        with (
            tlc.add_capacity_hooks(hooked, sae, importance=["gradient"]) as capacity,
            pytest.raises(DictionaryError, match=says),
        ):
            capacity.run(tokens)


def test_a_tap_that_never_fires(hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    hook = "blocks.1.hook_mlp_in"
    with (
        tlc.add_capacity_hooks(hooked, make_sae("standard", hook), importance=["gradient"]) as capacity,
        pytest.raises(HookPointError, match=f"{hook} did not fire in 1 forward pass"),
    ):
        capacity.run(tokens)


def test_unknown_losses_are_refused(neox: Any, make_sae: MakeSAE) -> None:
    class Odd(ImportanceEstimator):
        name, unit, gradient_of = "odd", "1", ("perplexity",)

    with pytest.raises(
        CapacityError,
        match=f"there is no gradient of perplexity: .* name some of {', '.join(LOSSES)}",
    ):
        tlc.add_capacity_hooks(neox, make_sae("standard", HOOK), importance=[Odd()])


class TestIntegratedGradients:
    """Against a loop over the path by hand, and against the difference of the loss that all attributions together must
    account for.
    """

    def on_the_path(
        self, model: Any, sae: Any, tokens: torch.Tensor, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss at α, with latents [row, position, feature] and the SAE's error, both already times α, as leaves;
        BOS is left as it is.
        """
        kept: list[torch.Tensor] = []

        def splice(_: Any, args: Any, out: Any) -> Any:
            x = (out[0] if isinstance(out, tuple) else out).detach()
            z = sae.encode(x).detach()
            leaves = [(alpha * z).requires_grad_(), (alpha * (x - sae.decode(z))).detach().requires_grad_()]
            kept.extend(leaves)
            moved = torch.where((tokens == BOS)[..., None], x, sae.decode(leaves[0]) + leaves[1])
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = model.gpt_neox.layers[1].register_forward_hook(splice)
        logits = model(tokens).logits
        handle.remove()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), kept[0], kept[1]

    def measured(self, model: Any, sae: Any, tokens: torch.Tensor, steps: int) -> dict[str, np.ndarray]:
        with tlc.add_capacity_hooks(model, {HOOK: sae}, importance=[IntegratedGradients(steps)]) as capacity:
            arrays = capacity.run(tokens.split(6)).measurement()[HOOK].summary.arrays
        return {name: arrays[f"state/integrated_gradients/{name}"].sum(0) for name in ("signed", "absolute", "error")}

    @pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
    def test_a_loop_over_the_path(self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor, architecture: str) -> None:
        sae = make_sae(architecture, HOOK)
        z, error, slopes = None, None, 0
        for place, weight in (
            (0.5 - 0.6**0.5 / 2, 5 / 18),
            (0.5, 4 / 9),
            (0.5 + 0.6**0.5 / 2, 5 / 18),
        ):  # Gauss-Legendre of three points on [0, 1]
            loss, latents, rest = self.on_the_path(neox, sae, tokens, place)
            by_latent, by_rest = torch.autograd.grad(loss, [latents, rest])
            z, error = latents.detach() / place, rest.detach() / place
            slopes = (
                slopes
                + torch.cat([weight * z * by_latent, (weight * error * by_rest).sum(-1, keepdim=True)], dim=-1).double()
            )
        expected = slopes[tokens != BOS]
        found = self.measured(neox, sae, tokens, 3)
        for name, values in (
            ("signed", expected[:, :-1].sum(0)),
            ("absolute", expected[:, :-1].abs().sum(0)),
            ("error", expected[:, -1].sum(0)),
        ):
            np.testing.assert_allclose(
                found[name], values.numpy(force=True), rtol=2e-3, atol=1e-3 * float(values.abs().max())
            )

    @pytest.mark.slow
    def test_attributions_and_error_sum_to_the_loss_difference(
        self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        sae = make_sae("standard", HOOK)
        with torch.no_grad():
            difference = float(
                self.on_the_path(neox, sae, tokens, 1.0)[0] - self.on_the_path(neox, sae, tokens, 0.0)[0]
            )
        missing = []
        for steps in (1, 4, 16, 64):
            found = self.measured(neox, sae, tokens, steps)
            missing.append(abs(float(found["signed"].sum() + found["error"]) / difference - 1))
        assert missing[-1] < 0.002
        assert missing[0] > missing[1] > missing[-1]

    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt2", "llama"])
    def test_each_hook_has_its_own_path(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model, saes = models_by_kind[kind], {EARLY: make_sae("topk", EARLY), HOOK: make_sae("standard", HOOK)}
        with tlc.add_capacity_hooks(model, saes, importance=["integrated_gradients", "gradient"]) as capacity:
            together = capacity.run(tokens[:8]).measurement()
        for hook, sae in saes.items():
            with tlc.add_capacity_hooks(model, {hook: sae}, importance=["integrated_gradients"]) as capacity:
                alone = capacity.run(tokens[:8]).measurement()[hook]
            np.testing.assert_allclose(
                together[hook].importance("integrated_gradients"),
                alone.importance("integrated_gradients"),
                rtol=1e-3,
                atol=1e-7,
            )
            with tlc.add_capacity_hooks(model, {hook: sae}, importance=["gradient"]) as capacity:
                plain = capacity.run(tokens[:8]).measurement()[hook]
            np.testing.assert_allclose(
                together[hook].importance("gradient"), plain.importance("gradient"), rtol=1e-3, atol=1e-7
            )
            assert (together[hook].summary.arrays["counts"] == plain.summary.arrays["counts"]).all()

    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
    def test_nothing_is_left_behind(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str
    ) -> None:
        model = models_by_kind[kind]
        before, asking = all_hooks(model), [p.requires_grad for p in model.parameters()]
        with (
            torch.no_grad(),
            tlc.add_capacity_hooks(model, make_sae("standard", HOOK), importance=["integrated_gradients"]) as capacity,
        ):
            attached = all_hooks(model)
            capacity.run(tokens[:4])
            assert all_hooks(model) == attached
        assert all_hooks(model) == before
        assert [p.requires_grad for p in model.parameters()] == asking

    def test_bad_input(self, hooked: Any, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="steps = 0 is outside its domain steps ≥ 1"):
            IntegratedGradients(0)
        with (
            tlc.add_capacity_hooks(neox, make_sae("standard", HOOK), importance=["integrated_gradients"]) as capacity,
            pytest.raises(CapacityError, match="use run"),
        ):
            neox(tokens)
        transcoder = make_sae("transcoder", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
        with (
            tlc.add_capacity_hooks(hooked, transcoder, importance=["integrated_gradients"]) as capacity,
            pytest.raises(DictionaryError, match="writes to another hook point"),
        ):
            capacity.run(tokens)
