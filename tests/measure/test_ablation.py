"""Exact ablations against a model into which the SAE is spliced with one latent at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BOS, KINDS, all_hooks
from torch.nn import functional as F

from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.measure.ablation import ablation_kl

MakeSAE = Callable[..., Any]
HOOK = "blocks.1.hook_resid_post"
BLOCKS = {"gpt_neox": "gpt_neox.layers.1", "gpt2": "transformer.h.1", "llama": "model.layers.1"}


@torch.no_grad()
def without(model: Any, sae: Any, tokens: torch.Tensor, latent: int | None) -> torch.Tensor:
    """Logits with the SAE spliced in, its error included, one latent at zero everywhere but at BOS."""

    def splice(activation: torch.Tensor) -> torch.Tensor:
        latents = sae.encode(activation)
        error = activation - sae.decode(latents)
        if latent is not None:
            latents[..., latent] = torch.where(tokens == BOS, latents[..., latent], 0)
        return sae.decode(latents) + error

    if hasattr(model, "hook_dict"):
        name = HOOK if HOOK in model.hook_dict else HOOK.replace("hook_resid_post", "hook_out")
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: splice(activation))])
    handle = model.get_submodule(BLOCKS[model.config.model_type]).register_forward_hook(
        lambda _, args, out: (splice(out[0]), *out[1:]) if isinstance(out, tuple) else splice(out)
    )
    logits = model(tokens).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_kl_of_setting_a_latent_to_zero(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
) -> None:
    model, sae, latents = models_by_kind[kind], make_sae(architecture, HOOK), list(range(0, 64, 7))
    before = all_hooks(model)
    found = ablation_kl(model, HOOK, sae, tokens, latents, counted=tokens != BOS, rows_at_once=5)
    assert all_hooks(model) == before
    assert (found > 0).any()
    clean = without(model, sae, tokens, None).log_softmax(-1)
    for latent, kl in zip(latents, found.tolist(), strict=True):
        ablated = without(model, sae, tokens, latent).log_softmax(-1)
        expected = F.kl_div(ablated, clean, log_target=True, reduction="sum") / (tokens != BOS).sum()
        assert kl == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_a_latent_that_never_fires_changes_nothing(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    sae = make_sae("standard", HOOK)
    with torch.no_grad():
        sae.b_enc[:2] = -1e6
    assert ablation_kl(neox, HOOK, sae, tokens, [0, 1]).tolist() == [0.0, 0.0]


def test_bad_input(hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    sae = make_sae("standard", HOOK)
    with pytest.raises(CapacityError, match=r"there are no latents \[64, -1\] among 64: choose numbers from 0 to 63"):
        ablation_kl(hooked, HOOK, sae, tokens, [3, 64, -1])
    with pytest.raises(CapacityError, match="no token counts"):
        ablation_kl(hooked, HOOK, sae, tokens, [3], counted=torch.zeros_like(tokens, dtype=torch.bool))
    with pytest.raises(HookPointError, match=r"blocks\.1\.hook_mlp_in did not fire"):
        ablation_kl(hooked, "blocks.1.hook_mlp_in", make_sae("standard", "blocks.1.hook_mlp_in"), tokens, [3])
    with pytest.raises(DictionaryError, match="does not write the sum of its decoder vectors"):
        ablation_kl(hooked, HOOK, make_sae("layer_norm", HOOK), tokens, [3])
    with pytest.raises(DictionaryError, match="writes to another hook point"):
        ablation_kl(
            hooked,
            "blocks.1.ln2.hook_normalized",
            make_sae("transcoder", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
            tokens,
            [3],
        )
