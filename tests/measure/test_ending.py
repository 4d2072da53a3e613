"""Slopes at a head's input against autograd through all logits, and models whose logits are not their head's alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOKED, all_hooks
from place import placed
from torch.nn import functional as F

from tl_capacity.measure.ending import Ending, separate_head, slopes_at_head
from tl_capacity.measure.losses import draw
from tl_capacity.models.forward import forward_options
from tl_capacity.models.head import LOGIT_TOKENS, Head

ROWS, POSITIONS, WIDTH, VOCABULARY = 3, LOGIT_TOKENS, 8, 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, None), (True, 2.0)])
@pytest.mark.parametrize("sharp", [1.0, 30.0])
def test_slopes_are_those_of_autograd(dtype: torch.dtype, bias: bool, cap: float | None, sharp: float) -> None:
    """Sharp heads give probabilities of nearly 1, and a word that is drawn is then often the next token as well."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, POSITIONS, WIDTH, generator=random).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=random) * sharp / WIDTH**0.5).to(dtype)
    head = Head(weight, torch.randn(VOCABULARY, generator=random).to(dtype) if bias else None, cap)
    ids = torch.randint(VOCABULARY, (ROWS, POSITIONS), generator=random)
    valid = torch.ones(ROWS, POSITIONS, dtype=torch.bool)
    valid[1, 90:] = valid[2, 2:] = False
    ours = slopes_at_head(head, hidden, ids, valid, ("cross_entropy", "sampled"), torch.Generator().manual_seed(5))

    exact = torch.float64 if dtype != torch.bfloat16 else dtype  # which rounds the logits, and so is part of the model
    whole = hidden.to(exact).requires_grad_()
    logits = F.linear(whole, weight.to(exact), None if head.bias is None else head.bias.to(exact)).float()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    predicting = valid[:, 1:]
    p = logits[:, :-1][predicting].detach().softmax(-1).float()
    drawn = draw(p, torch.rand(len(p), generator=torch.Generator().manual_seed(5)))
    assert (drawn == ids[:, 1:][predicting]).any()
    for found, wanted in zip(ours, (ids[:, 1:][predicting], drawn), strict=True):
        loss = F.cross_entropy(logits[:, :-1][predicting], wanted, reduction="sum")
        [expected] = torch.autograd.grad(loss, whole, retain_graph=True)
        assert found.dtype == dtype
        assert not found[:, -1].any()
        assert not found[2, 1:].any()
        rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.to(exact), expected, rtol=0, atol=rounding * float(expected.abs().max()))


def test_words_are_drawn_as_often_as_they_are_probable() -> None:
    p = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0])
    chances = (torch.arange(1000) + 0.5) / 1000
    drawn = draw(p.expand(1000, -1), chances)
    np.testing.assert_array_equal(drawn.bincount(minlength=6), (1000 * p).int())
    edges = draw(p.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    np.testing.assert_array_equal(edges, [1, 4])


@pytest.mark.parametrize("kind", [*HOOKED, "gpt_neox"])
def test_a_pass_ends_at_the_head(models_by_kind: dict[str, Any], tokens: torch.Tensor, kind: str) -> None:
    model = models_by_kind[kind]
    hooks, options = all_hooks(model), forward_options(model)
    head = separate_head(model, tokens[:1, :8], options)
    assert head is not None
    ending, whole = Ending(), Ending(whole=True)
    valid = torch.ones(tokens.shape, dtype=torch.bool)
    slopes = []
    for each in (ending, whole):
        each.decide(model, tokens, options)
        [(end, slope)] = each.slopes(model, tokens, options, valid, ["cross_entropy"], 0)
        embedding = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        slopes.append(torch.autograd.grad(end, embedding, slope)[0])
        assert (slope is None) == (each is whole)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4 * float(slopes[1].abs().max()))
    assert all_hooks(model) == hooks


def test_logits_that_are_scaled_behind_the_head_are_taken_whole() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = placed(torch.arange(1, 9)[None])
    for scaling, separate in ((1.0, True), (4.0, False)):
        config = GraniteConfig(vocab_size=40, hidden_size=16, intermediate_size=16, **layers, logits_scaling=scaling)
        model = placed(GraniteForCausalLM(config).eval())
        assert (separate_head(model, tokens, {}) is not None) is separate


def test_a_head_whose_weights_are_elsewhere_is_left_to_the_model(make_model: Callable[..., Any]) -> None:
    from accelerate import cpu_offload

    model, tokens = make_model("gpt_neox").cpu(), torch.arange(1, 9)[None]
    assert separate_head(model, tokens, {}) is not None
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.get_output_embeddings().weight.device.type == "meta"
    assert separate_head(offloaded, tokens, {}) is None
