"""A seed decides what is drawn, and the caller's own stream of random numbers goes on as if nothing had been drawn."""

from __future__ import annotations

import torch

from tl_capacity.runtime.seeds import seeded


def test_the_seed_decides_and_leaves_no_trace(device: str) -> None:
    def draw() -> torch.Tensor:
        return torch.cat([torch.randn(4), torch.randn(4, device=device).cpu()])

    torch.manual_seed(5)
    expected = draw()
    torch.manual_seed(5)
    with seeded(3):
        first = draw()
    assert torch.equal(draw(), expected)
    with seeded(3):
        assert torch.equal(draw(), first)
    with seeded(4):
        assert not torch.equal(draw(), first)


def test_it_draws_as_a_seed_that_is_set_for_good(device: str) -> None:
    torch.zeros(1, device=device)  # a GPU that nobody has used yet is left alone
    with seeded(7):
        found = torch.randn(4, device=device)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(4, device=device), found)
