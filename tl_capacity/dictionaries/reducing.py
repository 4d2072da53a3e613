"""Reducing: the sums of dense latents over pieces of equal length, by PyTorch's own steps or by one compiled kernel."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tl_capacity.runtime.logs import log

COMPILE = "TL_CAPACITY_COMPILE"
"""An environment variable: 1 compiles the sums at once, 0 never compiles them."""
COMPILED_AFTER = 256
"""Blocks summed on CUDA before compiling pays off. Compiling takes as long as some thousands of them."""


class PieceSums(NamedTuple):
    """Sums over the tokens of each piece [piece, feature].

    float32 is enough for a piece of a few hundred tokens: counts are exact below 2²⁴, and a moment is off by 1e-6 of
    itself at most; what is added up over pieces is float64.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor


def activated(latents: Tensor, least: Tensor | float) -> Tensor:
    """Pre-activations, with zero for those that do not exceed `least`. NaN stays, so that it is found. In place."""
    if isinstance(least, float):
        return torch.threshold_(latents, least, 0.0)
    return latents.masked_fill_(torch.le(latents, least), 0)


def sums_in_steps(latents: Tensor, least: Tensor | float | None, length: int) -> PieceSums:
    """The sums of [token, feature], in one pass over the latents for each sum."""
    latents = latents if least is None else activated(latents, least)
    pieces = latents.unflatten(0, (-1, length))
    return PieceSums(
        (pieces != 0).sum(1),
        pieces.sum(1, dtype=torch.float32),
        torch.linalg.vector_norm(pieces, dim=1, dtype=torch.float32).square_(),
    )


def sums_at_once(latents: Tensor, least: Tensor | float | None, length: int) -> PieceSums:
    """The same for a compiler, which makes it one pass. Nothing is overwritten."""
    pieces = latents.unflatten(0, (-1, length)).float()
    active = pieces != 0 if least is None else ~(pieces <= least)
    values = torch.where(active, pieces, 0.0)
    return PieceSums(active.sum(1), values.sum(1), (values * values).sum(1))


class Reducer:
    """The sums of dense latents over pieces, compiled if that works and pays off."""

    def __init__(self) -> None:
        wanted = os.environ.get(COMPILE)
        self._compiles_after: dict[str, int] = {"cuda": COMPILED_AFTER} if wanted is None else {}
        self._at_once, self._blocks = wanted == "1", 0
        self._compiled: Callable[..., PieceSums] | None = None
        self._fails = False

    def __call__(
        self, latents: Tensor, least: Tensor | float | None, length: int, checked: int
    ) -> tuple[Tensor, PieceSums]:
        """The latents of the first tokens, and the sums of all tokens.

        Args:
            latents: [token, feature], before the activation where `least` is given; they are overwritten then.
            least: what a latent must exceed.
            length: tokens of a piece.
            checked: how many tokens' latents are wanted.
        """
        sums = self._sums_at_once(latents, least, length) if self._due(latents.device) else None
        if sums is None:
            sums = sums_in_steps(latents, least, length)
            return latents[:checked], sums
        first = latents[:checked]
        return first if least is None else activated(first, least), sums

    def _due(self, device: torch.device) -> bool:
        """Whether to compile this block's sums."""
        self._blocks += 1
        after = 0 if self._at_once else self._compiles_after.get(device.type)
        return not self._fails and after is not None and self._blocks > after

    def _sums_at_once(self, latents: Tensor, least: Tensor | float | None, length: int) -> PieceSums | None:
        """Compiled sums; None if compiling fails, which is logged once."""
        try:
            # A run holds compiled models back, whose graphs would go past hooks; there are none here.
            with torch.compiler.set_stance("default"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a compiler warns of its own libraries, and of products not in here
                if self._compiled is None:
                    self._compiled = torch.compile(sums_at_once)
                return PieceSums(*self._compiled(latents, least, length))
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a compiler stumbles over
            self._fails, self._compiled = True, None
            log.warning(f"torch.compile does not work here ({type(problem).__name__}): sums are computed without it")
            return None
