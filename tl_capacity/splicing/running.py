"""Run a model together with variants of its own activations, and compare their predictions.

The variants are more rows behind edited hook points. All are compared with the model's own predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.models.head import Head, divergences, last_hidden
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.models.hooks import Change
from tl_capacity.runtime.processes import Processes
from tl_capacity.text.counting import CountedTokens
from tl_capacity.text.documents import DOCUMENT_GROUPS

TOKENS_AT_ONCE = 4096
"""Tokens of all variants that pass through the model's upper layers together."""


@dataclass(frozen=True)
class RowsOfText:
    """Rows that pass through a model together.

    Attributes:
        ids: token ids; where a row has ended, any.
        counted: whether the activation of a token is replaced.
        predicting: whether the next token of each position but the last is there.
        groups: document group of each predicting position, row by row.
    """

    ids: Int[Tensor, "row position"]
    counted: Bool[Tensor, "row position"]
    predicting: Bool[Tensor, "row predicting_position"]
    groups: NDArray[np.int64]


def rows_of(ids: Int[Tensor, "row position"], text: CountedTokens, at_once: int) -> Iterator[RowsOfText]:
    """The rows of a batch, `at_once` at a time, cut to the longest of them.

    Rows of a single token predict nothing. They are left out if they would come alone.
    """
    lengths = text.valid.sum(1)
    for start in range(0, len(ids), at_once):
        rows = slice(start, start + at_once)
        longest = int(lengths[rows].max())
        predicting = text.valid[rows, 1:longest]
        if predicting.any():
            groups = text.groups[rows][predicting.nonzero()[:, 0]].numpy()
            yield RowsOfText(ids[rows, :longest], text.counted[rows, :longest], predicting, groups)


def rows_at_once(points: Sequence[TapPoint], longest: int, variants: int) -> int:
    """How many rows go into one forward pass.

    Several fit only if the whole residual stream passes the hook point. Elsewhere the variants are added to a stream of
    one row, which broadcasts.
    """
    if any(point.centred or not point.carries_the_stream for point in points):
        return 1
    return max(1, TOKENS_AT_ONCE // (longest * (variants + 1)))


def hidden_states(
    model: Any,
    ids: Int[Tensor, "row position"],
    variants: int,
    edits: Sequence[tuple[TapPoint, Change]],
    watched: Sequence[tuple[TapPoint, Callable[[Tensor], None]]] = (),
) -> Float[Tensor, "one_more row position d_model"]:
    """Last hidden states of the model, then those of each variant.

    Args:
        edits: hook points, and what gives the model's own rows with those of each variant behind them.
        watched: further hook points that something looks at.

    Raises:
        HookPointError: where a hook point does not fire, or nothing of it reaches the head.
    """
    fired: set[str] = set()

    def noted(point: TapPoint, change: Change) -> Change:
        def changed(x: Tensor) -> Tensor | None:
            fired.add(point.name)
            return change(x)

        return changed

    with ExitStack() as hooks:
        for point, see in watched:
            hooks.callback(point.watch(see))
        for point, change in edits:
            hooks.callback(point.edit(noted(point, change)))
        hidden = last_hidden(model, ids)
    for point, _ in edits:
        if point.name not in fired:
            raise HookPointError(
                f"{point.name} did not fire before the model's head: splice at a hook point that the model runs"
            )
    if len(hidden) != (variants + 1) * len(ids):
        raise HookPointError(f"nothing of {edits[0][0].name} reaches the model's head: splice at another hook point")
    return hidden.view(variants + 1, *ids.shape, -1)


def check_finite_activations(name: str, activations: Tensor) -> None:
    """Refuse activations that are NaN or infinite, as from damaged weights.

    Raises:
        CapacityError: where an activation is not finite.
    """
    if not bool(torch.isfinite(activations).all()):
        raise CapacityError(f"the activations at {name} are NaN or infinite: check the model")


def variant_divergences(
    head: Head,
    hidden: Float[Tensor, "one_more row position d_model"],
    predicting: Bool[Tensor, "row predicting_position"],
) -> Float64[Tensor, "variant token"]:
    """KL(model ‖ variant) at the predicting positions, in nats."""
    states = hidden[:, :, :-1][:, predicting.to(hidden.device)]
    return divergences(head, states[0], states[1:])


class DivergenceSums:
    """KL of several variants, summed over the tokens of each document group.

    Attributes:
        kl: [group, variant] in nats.
        tokens: [group] predicted tokens.
    """

    def __init__(self, variants: int) -> None:
        self.kl = np.zeros((DOCUMENT_GROUPS, variants))
        self.tokens = np.zeros(DOCUMENT_GROUPS, dtype=np.int64)

    def add(self, values: Float64[Tensor, "variant token"], groups: NDArray[np.int64]) -> None:
        """Add some tokens of every variant."""
        np.add.at(self.kl, groups, values.T.cpu().numpy())
        np.add.at(self.tokens, groups, 1)


def sum_over_all(several: Sequence[DivergenceSums], processes: Processes) -> None:
    """Add the sums of all processes."""
    parts: list[NDArray[Any]] = [part for sums in several for part in (sums.kl, sums.tokens)]
    for part, total in zip(parts, processes.sums([torch.from_numpy(part) for part in parts]), strict=True):
        part[...] = total.numpy()
