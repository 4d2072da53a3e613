"""Projecting on principal components against scikit-learn's, and against a dense loop that runs the whole model for
each width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, D_MODEL, KINDS, LAYERS
from dense import kl_per_token, logits_with
from place import placed
from sklearn.decomposition import PCA

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.rivals import pca_splice
from tl_capacity.rivals.projection import every_layer
from tl_capacity.text.counting import CountingRule

HOOK = "blocks.1.hook_resid_post"
RULE = CountingRule.without([BOS])
WIDTHS = (3, 8, 31)


@pytest.fixture
def text() -> torch.Tensor:
    """Other rows than those that the components are fitted to."""
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, 100, size=(24, 20)))
    ids[:, 0] = BOS
    return placed(ids)


def activations(model: Any, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    """At the tokens that are not BOS, by the library's own hooks."""
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return x

    logits_with(model, hook, keep, tokens)
    return seen[0][tokens != BOS]


def projecting(pca: PCA, width: int, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What scikit-learn makes of an activation with `width` components, but at BOS."""

    def change(x: torch.Tensor) -> torch.Tensor:
        coordinates = pca.transform(x.detach().flatten(0, 1).double().numpy(force=True))
        coordinates[:, width:] = 0
        new = torch.from_numpy(pca.inverse_transform(coordinates)).view_as(x).to(x)
        return torch.where((ids == BOS)[..., None], x, new)

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_dense_loop_has_it(
    models_by_kind: dict[str, Any], tokens: torch.Tensor, text: torch.Tensor, kind: str
) -> None:
    model = models_by_kind[kind]
    forecasts = pca_splice(model, text, WIDTHS, [HOOK], fitted_on=tokens, rule=RULE, progress=False)
    pca = PCA().fit(activations(model, HOOK, tokens).double().numpy(force=True))
    clean = logits_with(model, HOOK, lambda x: x, text)
    for width, floor in forecasts.floors("pca_splice", HOOK).items():
        expected = kl_per_token(clean, logits_with(model, HOOK, projecting(pca, width, text), text))
        assert floor.value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert floor.low is not None
        assert floor.low <= floor.value <= floor.high
    tails = forecasts.floors("pca_tail", HOOK)
    n = int((tokens != BOS).sum())
    for width in WIDTHS:  # scikit-learn divides by n − 1
        expected = pca.explained_variance_[width:].sum() * (n - 1) / n
        assert tails[width].value == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt2"])
def test_every_layer_at_once(
    models_by_kind: dict[str, Any], tokens: torch.Tensor, text: torch.Tensor, kind: str
) -> None:
    model, hooks = models_by_kind[kind], every_layer(models_by_kind[kind])
    assert hooks == [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    forecasts = pca_splice(model, text, (3, 8), hooks, fitted_on=tokens, rule=RULE, together=True, progress=False)
    pcas = [PCA().fit(activations(model, hook, tokens).double().numpy(force=True)) for hook in hooks]
    clean = logits_with(model, HOOK, lambda x: x, text)
    for width, floor in forecasts.floors("pca_splice", "blocks.*.hook_resid_post").items():
        changes = [projecting(pca, width, text) for pca in pcas]
        if hasattr(model, "hook_dict"):
            names = [hook if hook in model.hook_dict else hook.replace("resid_post", "out") for hook in hooks]
            with torch.no_grad():
                other = model.run_with_hooks(
                    text,
                    fwd_hooks=[
                        (name, lambda x, hook, change=change: change(x))
                        for name, change in zip(names, changes, strict=True)
                    ],
                )
        else:
            handles = [
                block.register_forward_hook(
                    lambda _, args, out, change=change: (
                        (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
                    )
                )
                for block, change in zip(model.transformer.h, changes, strict=True)
            ]
            with torch.no_grad():
                other = model(text).logits
            for handle in handles:
                handle.remove()
        assert floor.value == pytest.approx(kl_per_token(clean, other), rel=1e-3)
    assert not forecasts.floors("pca_tail", HOOK), "the variance outside is a hook point's own"


@pytest.mark.parametrize(
    ("kind", "hook"),
    [
        ("HookedTransformer", "blocks.1.attn.hook_z"),
        ("HookedTransformer", "blocks.0.hook_resid_pre"),
        ("TransformerBridge", "blocks.1.hook_mlp_out"),
    ],
)
def test_off_the_stream(
    models_by_kind: dict[str, Any], tokens: torch.Tensor, text: torch.Tensor, kind: str, hook: str
) -> None:
    model = models_by_kind[kind]
    forecasts = pca_splice(model, text, [5, 32], [hook], fitted_on=tokens, rule=RULE, progress=False)
    floors = forecasts.floors("pca_splice", hook)
    name = hook if hook in model.hook_dict else hook.replace("hook_resid_pre", "hook_in")
    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens, names_filter=name)
        pca = PCA().fit(cache[name].flatten(2)[tokens != BOS].double().numpy(force=True))
        clean = model(text)

        def change(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return projecting(pca, 5, text)(x.flatten(2)).view_as(x)

        other = model.run_with_hooks(text, fwd_hooks=[(name, change)])
    assert floors[5].value == pytest.approx(kl_per_token(clean, other), rel=1e-3)
    assert floors[32].value == pytest.approx(0, abs=1e-6)
    assert floors[32].value >= 0


def test_rows_of_several_lengths(neox: Any, tokens: torch.Tensor) -> None:
    """Rows that are padded give what each gives alone."""
    rows = [tokens[i, : 5 + i] for i in range(12)]
    table, mask = torch.full((12, 16), BOS), torch.zeros(12, 16, dtype=torch.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)], mask[i, : len(row)] = row, 1
    project = {"widths": [4], "hooks": [HOOK], "fitted_on": tokens, "rule": RULE, "progress": False}
    together = pca_splice(neox, {"input_ids": table, "attention_mask": mask}, **project)
    alone = [pca_splice(neox, row[None], **project).floors("pca_splice", HOOK)[4].value for row in rows]
    predicted = [len(row) - 1 for row in rows]
    expected = np.average(alone, weights=predicted)
    assert together.floors("pca_splice", HOOK)[4].value == pytest.approx(expected, rel=1e-4)
    assert together.about["tokens"] == sum(predicted)


def test_refusals(hooked: Any, neox: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(CapacityError, match="width 0 is not a student width"):
        pca_splice(neox, tokens, [0], [HOOK])
    with pytest.raises(CapacityError, match="nothing to project"):
        pca_splice(neox, tokens, [2], [])
    with pytest.raises(CapacityError, match="ask for at least 1"):
        pca_splice(neox, tokens, [2], [HOOK], max_tokens=0)
    with pytest.raises(CapacityError, match="the text has no token to predict"):
        pca_splice(neox, tokens[:, :1], [2], [HOOK], fitted_on=tokens)
    with pytest.raises(CapacityError, match="too few for principal components"):
        pca_splice(neox, tokens, [2], [HOOK], fitted_on=tokens[:1, :2], rule=RULE)
    with pytest.raises(HookPointError, match="is not a hook point of this model"):
        pca_splice(neox, tokens, [2], ["blocks.9.hook_resid_post"])
    with pytest.raises(HookPointError, match="did not fire before the model's head"):
        pca_splice(hooked, tokens, [2], ["unembed.hook_out"], rule=RULE)
    with pytest.raises(HookPointError, match="is not one vector per token"):
        pca_splice(hooked, tokens, [2], ["blocks.0.attn.hook_pattern"], rule=RULE)
    with pytest.raises(CapacityError, match=r"has token id 100, but the model's vocabulary"):
        pca_splice(neox, torch.full((2, 5), 100), [D_MODEL], [HOOK])


@pytest.mark.filterwarnings("ignore:overflow")
def test_damaged_weights_are_named(make_model: Callable[..., Any], tokens: torch.Tensor) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(float("nan"))
    with pytest.raises(CapacityError, match="are NaN or infinite: check the model"):
        pca_splice(model, tokens, [2], [HOOK], progress=False)
