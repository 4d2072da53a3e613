"""Which tokens count: padding, special tokens and some positions do not. No other module masks tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tl_capacity.text.documents import document_groups
from tl_capacity.text.streams import PADDING, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # which tokens did not count is read from a measurement without importing torch

MASK_REASONS = ("padding", "special", "position")
CHECK_SALT = 2**40
"""Added to document numbers before hashing, so that the checked documents do not depend on the document groups."""


class Positions(NamedTuple):
    """Positions of a row: from `first` on, before `stop` if there is one, every `step`-th."""

    first: int = 0
    stop: int | None = None
    step: int = 1

    def __str__(self) -> str:
        until = "on" if self.stop is None else f"to {self.stop - 1}"
        return f"positions from {self.first} {until}" + (f", each {self.step}th" if self.step > 1 else "")

    def have(self, place: Int[np.ndarray, "row position"]) -> Bool[np.ndarray, "row position"]:
        """Whether each place, counted from 0, is among these positions."""
        ends = np.inf if self.stop is None else self.stop
        return np.asarray((place >= self.first) & (place < ends) & ((place - self.first) % self.step == 0))

    def are_among(self, others: Positions) -> bool:
        """Whether all of these positions are among the others."""
        steps = self.step % others.step == 0 and (self.first - others.first) % others.step == 0
        ends = others.stop is None or (self.stop is not None and self.stop <= others.stop)
        return self.first >= others.first and ends and steps


EVERY_POSITION = Positions()


@dataclass(frozen=True)
class CountingRule:
    """Which tokens of a text count.

    Attributes:
        special_ids: ids that do not count, such as BOS.
        skip_first_positions: so many positions at the beginning of each row do not count either.
        stop_position: nor do positions from here on, where it is given.
        position_step: nor do others than every so-manieth of those that are left.
    """

    special_ids: tuple[int, ...] = ()
    skip_first_positions: int = 0
    stop_position: int | None = None
    position_step: int = 1

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any, skip_first_positions: int = 0) -> CountingRule:
        """The rule by which all tokens count but special tokens of the tokenizer or the model."""
        return cls(tuple(special_token_ids(model, tokenizer)), skip_first_positions)

    @classmethod
    def without(cls, ids: Iterable[int], skip_first_positions: int = 0) -> CountingRule:
        """The rule by which all tokens count but these ids."""
        return cls(tuple(sorted({int(i) for i in ids})), skip_first_positions)

    @classmethod
    def recorded(cls, settings: Mapping[str, Any]) -> CountingRule:
        """The rule in a measurement's recorded settings."""
        first, step = (int(settings.get(*field)) for field in (("skip_first_positions", 0), ("position_step", 1)))
        rule = cls.without(settings.get("masked_token_ids", ()))
        return rule.at(Positions(first, settings.get("stop_position"), step))

    def at(self, positions: Positions) -> CountingRule:
        """The same rule for these positions of each row and no others."""
        return replace(
            self,
            skip_first_positions=positions.first,
            stop_position=positions.stop,
            position_step=positions.step,
        )

    @property
    def positions(self) -> Positions:
        """The positions that count."""
        return Positions(self.skip_first_positions, self.stop_position, self.position_step)

    @property
    def settings(self) -> dict[str, Any]:
        """The rule as a measurement records it."""
        more = {"stop_position": self.stop_position, "position_step": self.position_step}
        return {
            "masked_token_ids": list(self.special_ids),
            "skip_first_positions": self.skip_first_positions,
            **(more if self.positions[1:] != EVERY_POSITION[1:] else {}),
        }

    @property
    def filler(self) -> int:
        """An id for places after the end of a row. It is masked, so nothing depends on it."""
        return self.special_ids[0] if self.special_ids else 0

    def masks(
        self, tokens: Int[np.ndarray, "row position"], before: Int[np.ndarray, " row"] | None = None
    ) -> dict[str, Bool[np.ndarray, "row position"]]:
        """Which tokens do not count, by reason. No token has two reasons.

        Args:
            tokens: token ids, and `PADDING`, which is no position of a row.
            before: tokens of each row that came in an earlier batch.
        """
        padding = tokens == PADDING
        special = np.isin(tokens, self.special_ids) & ~padding
        first = 0 if before is None else before[:, None]
        elsewhere = ~self.positions.have(np.cumsum(~padding, axis=1) - 1 + first)
        return dict(zip(MASK_REASONS, (padding, special, elsewhere & ~padding & ~special), strict=True))

    def counted(self, tokens: Int[np.ndarray, "row position"]) -> Bool[np.ndarray, "row position"]:
        """Whether each token counts."""
        return np.asarray(~np.logical_or.reduce(list(self.masks(tokens).values())))

    def apply(self, batch: TokenBatch) -> CountedTokens:
        """Which tokens of a batch count, and the document of each."""
        return CountedTokens(batch, self)


class CountedTokens:
    """Which tokens of a batch count, and the document of each; on the CPU.

    Attributes:
        valid: bool [row, position], where a row has not ended.
        counted: bool [row, position].
        unwanted: bool [row, position], where a token is there and does not count.
        masked: int64 [reason], how many tokens do not count.
        documents: int64 [row].
        groups: int64 [row], the group of the row's document.
        row_of_token, position_of_token: int64 [token] of those that count.
    """

    def __init__(self, batch: TokenBatch, rule: CountingRule) -> None:
        import torch

        masks = rule.masks(batch.tokens, batch.before)
        counted = ~np.logical_or.reduce(list(masks.values()))
        self.valid = torch.from_numpy(~masks["padding"])
        self.counted = torch.from_numpy(counted)
        self.unwanted = self.valid & ~self.counted
        self.masked = torch.tensor([int(mask.sum()) for mask in masks.values()])
        self.documents = torch.from_numpy(batch.documents)
        self.groups = torch.from_numpy(document_groups(batch.documents))
        self.row_of_token, self.position_of_token = (torch.from_numpy(place) for place in np.nonzero(counted))

    @property
    def n_counted(self) -> int:
        """How many tokens count."""
        return len(self.row_of_token)

    @cached_property
    def unique_documents(self) -> list[int]:
        """The documents of the batch, each once, in order."""
        return list(dict.fromkeys(self.documents.tolist()))

    @cached_property
    def counted_documents(self) -> list[int]:
        """The document of each row that has a token to count."""
        return self.documents[self.counted.any(1)].tolist()

    def checked(self, every: int) -> Bool[Tensor, " row"]:
        """Whether the reconstruction is checked on each row's document. The first document is checked, and a hash
        chooses one in so many of the others.
        """
        import torch

        documents = self.documents.numpy()
        chosen = (document_groups(documents + CHECK_SALT, every) == 0) | (documents == 0)
        return torch.from_numpy(chosen)


def special_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of every special token that the tokenizer or the model's configuration names.

    Id 0 is valid (GPT-NeoX). Some configurations list several ids, some -1 for none.
    """
    ids = set(getattr(tokenizer, "all_special_ids", None) or ())
    for holder in (getattr(model, "config", None), tokenizer):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            ids |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return sorted(int(i) for i in ids if int(i) >= 0)
