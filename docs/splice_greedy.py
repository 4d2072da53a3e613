"""An order of latents by greedy elimination, for docs/results/splice_controls.md.

The KL of each latent that is still kept is measured without it and without all that went before it. Those that cost
least go, at most a third at a time, and then the rest are measured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import decoder_vectors
from tl_capacity.models.forward import evaluating
from tl_capacity.models.head import head_of
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.splicing.running import hidden_states, variant_divergences

SHARE_AT_ONCE = 1 / 3
"""The largest share of the kept latents that goes before the rest are measured again."""
VARIANTS_AT_ONCE = 16


def greedy_order(
    model: Any,
    point: TapPoint,
    sae: Any,
    rows: Tensor,
    counted: Tensor,
    latents: NDArray[np.int64],
    stops: Iterable[int],
) -> list[int]:
    """The latents, those first that stayed longest.

    Args:
        model: the model that predicts.
        point: where the dictionary reads and writes.
        sae: a dictionary whose decoder vectors add up.
        rows: token ids [row, position] without padding.
        counted: where an activation is replaced [row, position].
        latents: all that may stay.
        stops: numbers of latents at which the elimination stops to measure anew.
    """
    kept, gone = latents, list[int]()
    for number in _numbers(len(latents), sorted(stops)):
        kl = removal_kl(model, point, sae, rows, counted, kept)
        by_cost = kept[np.argsort(kl, kind="stable")]
        gone += by_cost[: len(kept) - number].tolist()
        kept = by_cost[len(kept) - number :]
        print(f"greedy: {number} of {len(latents)} latents stay", flush=True)
    return [*kept[::-1].tolist(), *reversed(gone)]


def _numbers(latents: int, stops: list[int]) -> Iterator[int]:
    """How many latents stay after each round."""
    while latents > stops[0]:
        latents = max(int(latents * (1 - SHARE_AT_ONCE)), *(stop for stop in stops if stop < latents))
        yield latents


@torch.no_grad()
def removal_kl(
    model: Any, point: TapPoint, sae: Any, rows: Tensor, counted: Tensor, kept: NDArray[np.int64]
) -> NDArray[np.float64]:
    """KL(model ‖ model with the kept latents but one) [kept], in nats per predicted token; the lost leave nothing.

    Where a latent does not fire, a row costs what it costs with all kept latents.
    """
    total, head, decoder = np.zeros(len(kept)), head_of(model), decoder_vectors(sae)
    vectors = decoder[torch.from_numpy(kept).to(decoder.device)]
    predicting = torch.ones_like(rows[:1, 1:], dtype=torch.bool)
    with evaluating(model):
        for ids, replaced in zip(torch.split(rows, 1), torch.split(counted, 1), strict=True):
            seen: list[Tensor] = []
            hidden_states(model, ids, 0, [(point, seen.append)])
            x = seen[0][0]
            latents = sae.encode(x)
            strength = latents[:, torch.from_numpy(kept).to(x.device)] * replaced.T.to(x)  # [position, kept]
            spliced = torch.where(replaced.T, sae.decode(torch.zeros_like(latents)) + strength @ vectors, x)
            [whole] = _kl_of(model, point, head, ids, predicting, spliced[None])
            costs = np.full(len(kept), whole)
            fires = (strength != 0).any(0).nonzero()[:, 0]
            for some in torch.split(fires, VARIANTS_AT_ONCE):
                without = spliced - strength.T[some][:, :, None] * vectors[some][:, None]
                costs[some.cpu().numpy()] = _kl_of(model, point, head, ids, predicting, without)
            total += costs
    return total / (len(rows) * predicting.sum().item())


def _kl_of(
    model: Any, point: TapPoint, head: Any, ids: Tensor, predicting: Tensor, variants: Tensor
) -> NDArray[np.float64]:
    """KL of each variant [variant] of a row's activations [variant, position, width], summed over its tokens."""

    def behind(x: Tensor) -> Tensor:
        return torch.cat([x, variants.to(x)])

    hidden = hidden_states(model, ids, len(variants), [(point, behind)])
    found: NDArray[np.float64] = variant_divergences(head, hidden, predicting).sum(1).cpu().numpy()
    return found
