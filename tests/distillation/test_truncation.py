"""Students that start from their teacher's weights in the leading directions of its residual stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import TOKENS, teacher
from torch import nn
from torch.nn import functional as F

from tl_capacity.distillation import DistillSettings, distill
from tl_capacity.distillation.students import new_student
from tl_capacity.distillation.truncation import read_stream
from tl_capacity.errors import CapacityError

UNTIED = ("gpt-neox", "mistral", "qwen2", "qwen3", "phi")


def trained(family: str) -> Any:
    """A teacher whose gains and biases are not those of a fresh one, and whose predictions differ
    from token to token.
    """
    model = teacher(family)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
            elif "embed" in name:
                parameter.mul_(10)
            else:
                parameter.mul_(4)
    return model


@torch.no_grad()
def kl(of: Any, student: Any) -> float:
    log_p, log_q = (model.eval()(TOKENS).logits.log_softmax(-1) for model in (of, student))
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("family", UNTIED)
def test_as_wide_as_its_teacher_it_is_the_teacher(family: str) -> None:
    of = trained(family)
    student = new_student(of, 32, start="truncated", tokens=TOKENS)
    assert kl(of, student) < 1e-4 * kl(of, new_student(of, 32))
    embedded, own = of.get_input_embeddings().weight, student.get_input_embeddings().weight
    assert not torch.allclose(embedded, own, atol=0.01), "it is the teacher in other coordinates"


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2", "llama", "qwen2", "phi"])
def test_narrower_it_starts_nearer_than_at_random(family: str) -> None:
    of = trained(family)
    assert kl(of, new_student(of, 16, start="truncated", tokens=TOKENS)) < 0.9 * kl(of, new_student(of, 16))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_what_a_teacher_does_not_use_is_cut_without_loss(family: str) -> None:
    """A teacher that lives in 14 of its 32 directions, with half of its heads and neurons silent, fits into a student
    of 16.
    """
    of = trained(family)
    alive = torch.linalg.qr(torch.randn(32, 14, generator=torch.Generator().manual_seed(2)))[0]
    projection = alive @ alive.T
    seen = read_stream(of, TOKENS)
    with torch.no_grad():
        for name, module in of.named_modules():
            if "Norm" in type(module).__name__ and module.weight.shape == (32,):
                module.weight.fill_(1.0)  # a gain that differs by coordinate would leave the subspace
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(module.weight @ projection)
            elif name in seen.inner:
                weight = module.weight if family == "gpt2" else module.weight.T  # [inner, stream]
                weight[len(weight) // 2 :] = 0
                weight.copy_(weight @ projection)
                if module.bias is not None:
                    module.bias.copy_(projection @ module.bias)
    assert kl(of, new_student(of, 16, start="truncated", tokens=TOKENS)) < 1e-3 * kl(of, new_student(of, 16))


def test_what_reads_and_writes_the_stream_is_found() -> None:
    seen = read_stream(teacher("llama"), TOKENS)
    block = "model.layers.1"
    assert seen.readers[f"{block}.input_layernorm"] == [f"{block}.self_attn.{name}_proj" for name in "qkv"]
    assert seen.readers[f"{block}.post_attention_layernorm"] == [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"]
    assert seen.readers["model.norm"] == ["lm_head"]
    assert {name for name in seen.inner if name.startswith(block)} == {
        f"{block}.self_attn.o_proj",
        f"{block}.mlp.down_proj",
    }


@pytest.mark.parametrize(
    ("family", "width", "says"),
    [("mamba", 16, "'mamba' students cannot start from a truncated teacher"), ("llama", 40, "from a narrower teacher")],
)
@pytest.mark.filterwarnings("ignore:the student of width 40 is wider")
def test_what_cannot_be_truncated_is_refused(family: str, width: int, says: str) -> None:
    with pytest.raises(CapacityError, match=says):
        new_student(teacher(family), width, start="truncated", tokens=TOKENS)


def test_it_needs_text() -> None:
    with pytest.raises(CapacityError, match="needs text on which its teacher's stream is seen"):
        new_student(teacher("llama"), 16, start="truncated")


def test_a_distillation_that_starts_so() -> None:
    settings = DistillSettings(tokens=300, batch_rows=4, evaluations=3, heldout_tokens=60, lr=1e-3)
    text = np.random.default_rng(0).integers(2, 50, size=(60, 12))
    of = trained("qwen2")
    random, truncated = (
        distill(of, [16, 24], text, settings=replace(settings, start=start), progress=False)
        for start in ("random", "truncated")
    )
    assert {s.start for s in truncated} == {"truncated"}
    for name in ("width16-seed0", "width24-seed0"):
        assert truncated[name].heldout_kl[0] < random[name].heldout_kl[0]


def test_seeds_that_change_nothing_are_refused() -> None:
    """Half as wide, all heads of a student are its teacher's; at 12 they have another size, and are drawn at random."""
    settings = DistillSettings(
        tokens=60, batch_rows=4, evaluations=1, heldout_tokens=60, seeds=(0, 1), start="truncated"
    )
    text = np.random.default_rng(0).integers(2, 50, size=(30, 12))
    with pytest.raises(CapacityError, match="students of width 16 start alike with every seed"):
        distill(trained("gpt-neox"), [16, 12], text, settings=settings, progress=False)
    run = distill(trained("gpt-neox"), [16, 12], text, settings=replace(settings, seeded_widths=(12,)), progress=False)
    assert [s.name for s in run] == ["width16-seed0", "width12-seed0", "width12-seed1"]
    with pytest.raises(CapacityError, match="seeded_widths = 8 are not among the widths 16,12"):
        distill(trained("gpt-neox"), [16, 12], text, settings=replace(settings, seeded_widths=(8,)), progress=False)
