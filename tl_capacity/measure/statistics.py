"""FeatureStatistics: the sums of one SAE's latents. They are updated chunk by chunk on the device that makes the
latents, and merged by addition over disjoint documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.results.summary import FeatureSummary
from tl_capacity.results.sums import SUMS
from tl_capacity.text.counting import MASK_REASONS
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups

ON_THE_HOST = ("tokens", "documents", "masked", "fvu_tokens")
"""Sums that follow from the tokens alone. The host knows them and need not ask a device."""


def device_of_sum(name: str, device: torch.device) -> torch.device:
    """Where a sum is kept if the latents are on the given device."""
    return torch.device("cpu") if name in ON_THE_HOST else device


@dataclass
class FeatureStatistics:
    """Sums over counted tokens, for each document group, and the summary of them.

    Counts are int64 and moments float64: float32 counts stop at 2²⁴. What each sum is and its axes:
    `tl_capacity.results.sums.SUMS`; `state` holds what importance estimators accumulated, `estimator/key` →
    [group, ...].
    """

    counts: Int64[Tensor, "group feature"]
    sums: Float64[Tensor, "group feature"]
    squares: Float64[Tensor, "group feature"]
    tokens: Int64[Tensor, " group"]
    documents: Int64[Tensor, " group"]
    incidence: Int64[Tensor, " feature"]
    masked: Int64[Tensor, " reason"]
    counted_norm: Float64[Tensor, " 1"]
    masked_norm: Float64[Tensor, " 1"]
    fvu_tokens: Int64[Tensor, " group"]
    residual: Float64[Tensor, " group"]
    energy: Float64[Tensor, " group"]
    mean_sum: Float64[Tensor, "group width"]
    decoder_norm: Float64[Tensor, " feature"]
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, features: int, width: int, decoder_norm: Tensor, device: torch.device, groups: int = DOCUMENT_GROUPS
    ) -> FeatureStatistics:
        """Zeros for `features` latents whose reconstruction has `width` dimensions."""

        sizes = {"group": groups, "feature": features, "reason": len(MASK_REASONS), "one": 1, "width": width}
        zeros = {
            name: torch.zeros(
                [sizes[axis] for axis in axes], dtype=getattr(torch, dtype), device=device_of_sum(name, device)
            )
            for name, (dtype, axes) in SUMS.items()
        }
        return cls.from_tensors({**zeros, "decoder_norm": decoder_norm.to(device=device, dtype=torch.float64)})

    def update_masked(self, masked: Int64[Tensor, " reason"]) -> None:
        """Add how many tokens of a batch do not count."""
        self.masked += masked

    def update_norms(self, counted_norm: Float64[Tensor, ""], masked_norm: Float64[Tensor, ""]) -> None:
        """Add Σ‖x‖² of the tokens that count, and of those that do not."""
        self.counted_norm += counted_norm.to(self.counted_norm.device)
        self.masked_norm += masked_norm.to(self.masked_norm.device)

    def update_tokens(self, groups: Int64[Tensor, " token"]) -> None:
        """Add counted tokens, each with its document group. The host knows both."""
        self.tokens.index_add_(0, groups, torch.ones_like(groups))

    def update_latents(
        self,
        features: Int64[Tensor, " entry"],
        values: Float64[Tensor, " entry"],
        groups: Int64[Tensor, " entry"],
        active: Bool[Tensor, " entry"] | None = None,
    ) -> None:
        """Add latents z of counted tokens, each with its feature and document group. Those that are not `active` are
        zero.
        """
        place = groups * self.counts.shape[1] + features
        self.counts.view(-1).index_add_(0, place, torch.ones_like(place) if active is None else active.long())
        self.sums.view(-1).index_add_(0, place, values)
        self.squares.view(-1).index_add_(0, place, values.square())

    def update_documents(self, documents: NDArray[np.int64], seen: Bool[Tensor, "document feature"]) -> None:
        """Add documents that have ended, each with the features that were active in it."""
        if len(documents):
            groups = torch.from_numpy(document_groups(documents)).to(self.documents.device)
            self.documents.index_add_(0, groups, torch.ones_like(groups))
            self.update_incidence(seen)

    def update_incidence(self, seen: Bool[Tensor, "document feature"]) -> None:
        """Add the features of documents that are already counted."""
        self.incidence += seen.sum(0)

    def update_reconstruction(
        self,
        target: Float[Tensor, "token width"],
        reconstruction: Float[Tensor, "token width"],
        groups: Int64[Tensor, " token"],
        known: Int64[Tensor, " token"] | None = None,
    ) -> None:
        """Add the squared error of reconstructed tokens, each with its document group. The host has the groups too, as
        `known`.
        """
        target = target.double()
        known = groups.cpu() if known is None else known
        self.fvu_tokens.index_add_(0, known, torch.ones_like(known))
        self.residual.index_add_(0, groups, (target - reconstruction.double()).square().sum(-1))
        self.energy.index_add_(0, groups, target.square().sum(-1))
        self.mean_sum.index_add_(0, groups, target)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; estimators' states as `state/estimator/key`."""
        sums = {name: getattr(self, name) for name in SUMS}
        return sums | {f"state/{key}": value for key, value in self.state.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
        """The inverse of `tensors`."""
        state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
        return cls(**{name: tensors[name] for name in SUMS}, state=state)

    def clone(self) -> FeatureStatistics:
        """A copy that later updates do not change."""
        return FeatureStatistics.from_tensors({name: value.clone() for name, value in self.tensors().items()})

    def compute(self, alive_threshold: float = 1e-5) -> FeatureSummary:
        """The summary of the sums.

        Raises:
            CapacityError: where no token was counted.
        """
        return FeatureSummary({name: value.cpu().numpy() for name, value in self.tensors().items()}, alive_threshold)
