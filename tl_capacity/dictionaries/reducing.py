"""Reducing: the sums of dense latents over pieces of equal length, by PyTorch's own steps or by one compiled kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tl_capacity.runtime.compiling import Compiled, compiling_wanted


class PieceSums(NamedTuple):
    """Sums over the tokens of each piece [piece, feature].

    They are of float32 at least. That is enough for a piece of a few hundred tokens: counts are exact below 2²⁴, and a
    moment is off by 1e-6 of itself at most. What is added up over pieces is float64.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor


def activated(latents: Tensor, least: Tensor | float) -> Tensor:
    """Pre-activations, with zero for those that do not exceed `least`. NaN stays, so that it is found. In place."""
    if isinstance(least, float):
        return torch.threshold_(latents, least, 0.0)
    return latents.masked_fill_(torch.le(latents, least), 0)


def sums_in_steps(latents: Tensor, bias: Tensor | None, least: Tensor | float | None, length: int) -> PieceSums:
    """The sums of [token, feature], in one pass over the latents for each sum. They are overwritten where they lack
    their bias and their activation.
    """
    latents = latents if bias is None else latents.add_(bias)
    latents = latents if least is None else activated(latents, least)
    pieces = latents.unflatten(0, (-1, length))
    exact = torch.promote_types(pieces.dtype, torch.float32)
    # A norm of order 0 counts what is not zero, and needs no flags.
    counts, norms = (torch.linalg.vector_norm(pieces, order, dim=1, dtype=exact) for order in (0, 2))
    return PieceSums(counts.long(), pieces.sum(1, dtype=exact), norms.square_())


def sums_at_once(latents: Tensor, bias: Tensor | None, least: Tensor | float | None, length: int) -> PieceSums:
    """The same for a compiler, which makes it one pass. Nothing is overwritten."""
    latents = latents if bias is None else latents + bias
    pieces = latents.unflatten(0, (-1, length))
    pieces = pieces.to(torch.promote_types(pieces.dtype, torch.float32))
    active = pieces != 0 if least is None else ~(pieces <= least)
    values = torch.where(active, pieces, 0.0)
    return PieceSums(active.sum(1), values.sum(1), (values * values).sum(1))


class Reducer:
    """The sums of dense latents over pieces, compiled if that works and pays off."""

    def __init__(self) -> None:
        self._compiled = Compiled(sums_at_once, compiling_wanted())

    def __call__(
        self, latents: Tensor, bias: Tensor | None, least: Tensor | float | None, length: int, checked: int
    ) -> tuple[Tensor, PieceSums]:
        """The latents of the first tokens, and the sums of all tokens.

        Args:
            latents: [token, feature]; or what becomes of them by adding `bias` and comparing with `least`, if these are
                given. They are overwritten then.
            bias: [feature].
            least: what a latent must exceed.
            length: tokens of a piece.
            checked: how many tokens' latents are wanted.
        """
        sums, first = self._compiled(latents.device, latents, bias, least, length), latents[:checked]
        if sums is None:
            return first, sums_in_steps(latents, bias, least, length)
        first = first if bias is None else first.add_(bias)
        return first if least is None else activated(first, least), PieceSums(*sums)
