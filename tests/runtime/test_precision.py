"""Products of float32 matrices in lower precision."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from place import on_cpu, placed

from tl_capacity.distillation.losses import LogitLoss, Output, chunked_losses
from tl_capacity.models.head import Head
from tl_capacity.runtime.precision import nearly_exact_product, rounded_products, rounded_to_tf32

TOKENS, VOCABULARY, WIDTH = 64, 3000, 48


def drawn(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def rounds() -> bool:
    """Whether this processor and this PyTorch must round. Of others, some may, and some round some products alone."""
    return torch.cpu._is_amx_tile_supported() and Version(torch.__version__) >= Version("2.13")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def test_inputs_are_rounded_and_sums_are_not() -> None:
    left, right = drawn(TOKENS, WIDTH), drawn(WIDTH, VOCABULARY)
    exact, rounded = left.double() @ right.double(), left.bfloat16().double() @ right.bfloat16().double()
    with rounded_products(left.device):
        within = left @ right
    after = left @ right
    assert error(within, rounded) < 1e-6 or (error(within, exact) < 1e-6 and not rounds())
    assert error(after, exact) < 1e-6


def test_the_nearest_of_tf32() -> None:
    """Ten bits after the first: no number of them is nearer, and what has no more bits stays."""
    values = placed(drawn(100_000) * torch.logspace(-30, 30, 100_000))
    rounded = rounded_to_tf32(values)
    assert ((rounded - values).abs() <= values.abs() * 2**-11).all()
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert torch.equal(rounded_to_tf32(rounded), rounded)
    assert abs(float(((rounded - values) / values).mean())) < 1e-5  # neither larger nor smaller on the whole
    # Of the NaN, one is what CPUs make and one what GPUs make.
    bits = placed(torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x00800000, 0], dtype=torch.int32))
    special = rounded_to_tf32(bits.view(torch.float32))
    assert special.isnan().tolist() == [True, True, False, False, False]
    assert special[2:].tolist() == [torch.inf, -torch.inf, 0.0]


def test_a_product_of_the_nearest_is_nearly_exact() -> None:
    """Errors of a product of many terms cancel; on a CPU nothing is rounded at all."""
    left, right = placed(drawn(64, 2048)), placed(drawn(2048, 64))
    exact = left.double() @ right.double()
    product = nearly_exact_product(left, right)
    assert error(product, exact) < (1e-6 if on_cpu() else 1e-3)
    assert abs(float((product * exact).sum() / exact.square().sum()) - 1) < 1e-5


@pytest.mark.skipif(on_cpu(), reason="is about a GPU")
def test_a_gpu_rounds_to_tf32() -> None:
    """Which has ten bits after the first, so that an input moves by 2^-11 of itself at most."""
    left, right = placed(drawn(512, 1024)), placed(drawn(1024, 512))
    exact = left.double() @ right.double()
    before = left @ right
    with rounded_products(left.device):
        within = left @ right
    largest = left.abs().double() @ right.abs().double() * 2**-10
    assert ((within - exact).abs() < largest).all()
    assert error(within, exact) > 1e-5
    assert error(before, exact) < 1e-6
    assert torch.equal(left @ right, before)


def test_the_precision_comes_back_after_an_error() -> None:
    left, right = drawn(TOKENS, WIDTH), drawn(WIDTH, VOCABULARY)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), rounded_products(left.device):
        left @ left
    assert error(left @ right, left.double() @ right.double()) < 1e-6


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_left_alone(device: str) -> None:
    left, right = drawn(TOKENS, WIDTH), drawn(WIDTH, VOCABULARY)
    with rounded_products(torch.device(device)):
        assert error(left @ right, left.double() @ right.double()) < 1e-6


def gradients(autocast: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
    """A student's loss, and its gradients."""
    teacher = Output(drawn(TOKENS, 2 * WIDTH), Head(drawn(VOCABULARY, 2 * WIDTH) / 5))
    hidden, weight = (part.requires_grad_() for part in (drawn(TOKENS, WIDTH), drawn(VOCABULARY, WIDTH) / 5))
    labels = torch.zeros(TOKENS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = chunked_losses(teacher, [Output(hidden, Head(weight))], labels, LogitLoss()).sum()
    of_hidden, of_weight = torch.autograd.grad(loss, [hidden, weight])
    assert of_hidden.dtype == of_weight.dtype == torch.float32
    return float(loss.detach()), of_hidden.double(), of_weight.double()


def test_a_heads_products_are_rounded_beneath_autocast_alone() -> None:
    """As those of the blocks are. What is rounded moves a gradient by hundredths of its largest entry at most."""
    loss, *exact = gradients(autocast=False)
    below, *rounded = gradients(autocast=True)
    assert below == pytest.approx(loss, rel=1e-2)
    moved = [error(found, expected) for found, expected in zip(rounded, exact, strict=True)]
    assert max(moved) < 0.03
    assert min(moved) > 1e-4 or not rounds()
    again, *after = gradients(autocast=False)
    assert again == loss
    assert all(torch.equal(found, expected) for found, expected in zip(after, exact, strict=True))
