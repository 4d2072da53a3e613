"""Ranking: how well a readout tells when features fire, computed from counts.

Scores go into fixed bins as they come. AUROC, average precision and R² follow from the counts.

Binning makes ties of scores that differ; how much AUROC and average precision can be off for it is computed beside
them, for every feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from torch import Tensor

from tl_capacity.errors import MeasurementError
from tl_capacity.probing.ridge import Latents, Readout
from tl_capacity.probing.scores import Scores
from tl_capacity.runtime.processes import Processes
from tl_capacity.runtime.threads import cores_for, side_by_side
from tl_capacity.text.documents import DOCUMENT_GROUPS

BINS = 256
FINE = 2.0
"""Half of the bins lie within this many standard deviations.

A score t falls into bin ½(1 + t/(2 + |t|)) · 256. Bins widen outwards, so no score is too large.
"""
BLOCK_SCORES = 2**19
"""How many scores each core has at once: 2 MB, of which most stays in its cache while they are used."""
FEATURES_AT_ONCE = 256
"""How many features each core has float64 counts of at once: half a MB, for the same reason."""


class _Sums:
    """Sums over tokens, which a checkpoint keeps and the processes of a launch add up."""

    names: tuple[str, ...]
    """The attributes that are sums."""

    def to_tensors(self) -> dict[str, Tensor]:
        """The sums by name, for a checkpoint."""
        return {name: getattr(self, name) for name in self.names}

    def go_on_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the sums that `to_tensors` gave.

        Raises:
            MeasurementError: where some are missing, as those of firings of either sign in an earlier version's.
        """
        if missing := set(self.names) - tensors.keys():
            raise MeasurementError(
                f"the checkpoint lacks {', '.join(sorted(missing))}, because an earlier version wrote it: delete it,"
                " and start again"
            )
        for name in self.names:
            setattr(self, name, tensors[name].to(getattr(self, name)))

    def over_all(self, processes: Processes) -> None:
        """Replace the sums by those over the tokens of all processes."""
        for name, total in zip(self.names, processes.sums([*self.to_tensors().values()]), strict=True):
            setattr(self, name, total)


class Firings(_Sums):
    """Sums over held-out tokens of the latents alone, which all readouts are held against.

    Attributes:
        tokens: their number.
        z, zz: Σz and Σz² [feature].
        firings: tokens with z ≠ 0 [group, feature].
    """

    names = ("tokens", "z", "zz", "firings")

    def __init__(self, features: int, device: torch.device | str = "cpu", groups: int = DOCUMENT_GROUPS) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.z, self.zz = (torch.zeros(features, dtype=torch.float64, device=device) for _ in range(2))
        self.firings = torch.zeros(groups, features, dtype=torch.int32, device=device)

    def update(self, latents: Latents, groups: Int64[Tensor, " token"]) -> None:
        """Add some tokens.

        Args:
            groups: the document group of each.
        """
        self.tokens += latents.n_tokens
        self.z.index_add_(0, latents.features, latents.values)
        self.zz.index_add_(0, latents.features, latents.values.square())
        place = groups[latents.tokens] * self.firings.shape[1] + latents.features
        self.firings.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.int32))


class Ranking(_Sums):
    """Sums over tokens that say how well a readout's scores tell each feature on held-out tokens.

    Nothing of the size tokens · features is ever kept.

    A latent that fires below zero is told by a low score, so firings of either sign are counted apart and each side is
    scored in its own direction.

    Args:
        signed: whether latents have either sign, as those of AbsTopK SAEs and of bases. The readout then predicts z
            itself, and max(0, ẑ) otherwise.
    """

    def __init__(self, readout: Readout, groups: int = DOCUMENT_GROUPS, signed: bool = False) -> None:
        features, device = len(readout.weight), readout.weight.device
        still = readout.spread == 0
        self.ridge, self.scale = readout.ridge, torch.where(still, 1.0, readout.spread)
        # Standardised and centred before they are rounded to float32, which keeps what a large mean would drown; some
        # at a time, as the quotients of all in float64 would take the readout's memory once more.
        self._weight = torch.empty(readout.weight.shape, dtype=torch.float32, device=device)
        for first in range(0, features, FEATURES_AT_ONCE):
            some = slice(first, first + FEATURES_AT_ONCE)
            self._weight[some] = readout.weight[some] / self.scale[some, None]
        self._weight.masked_fill_(still[:, None], 0.0)
        self._mean = readout.x_mean.float()
        self._offset = (readout.z_mean / self.scale).float()
        self._basis = None if readout.basis is None else readout.basis.float()

        def zeros(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.all, self.firing = zeros(features, BINS, dtype=torch.int32), zeros(features, BINS, dtype=torch.int32)
        self.negative = zeros(features, BINS, dtype=torch.int32) if signed else None
        self.cross, self.squares = zeros(features), zeros(features)
        self.ranks = zeros(groups, features)
        self.names = ("all", "firing", "cross", "squares", "ranks", *(("negative",) if signed else ()))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "token width"], latents: Latents, groups: Int64[Tensor, " token"]) -> None:
        """Score some held-out tokens.

        Args:
            groups: the document group of each token.
        """
        x = x.float() if self._basis is None else x.float() @ self._basis
        inputs = (x - self._mean).T.contiguous()
        step, last = max(1, BLOCK_SCORES // len(x)), len(self._weight)
        blocks = [slice(first, min(first + step, last)) for first in range(0, last, step)]
        starts = latents.starts.tolist()  # once, as a device is waited for
        cores = cores_for(inputs.device)
        memory = inputs.new_empty(cores, 2, step, len(x))

        def score(core: int, block: slice) -> None:
            entries = slice(starts[block.start], starts[block.stop])
            self._score(block, inputs, latents, entries, groups, memory[core])

        side_by_side(score, blocks, cores)

    def _score(
        self, block: slice, inputs: Tensor, latents: Latents, entries: slice, groups: Tensor, memory: Tensor
    ) -> None:
        """Score a block of features on inputs [dimension, token]. Other threads may score other blocks meanwhile.

        Args:
            entries: the block's entries among the latents.
            memory: for two blocks of scores [2, feature, token].
        """
        weight, n_tokens = self._weight[block], inputs.shape[1]
        features, tokens, values = latents.features[entries], latents.tokens[entries], latents.values[entries]
        entry = (features - block.start) * n_tokens + tokens
        scores, other = memory[:, : len(weight)]
        torch.mm(weight, inputs, out=scores)
        predicted = torch.add(scores, self._offset[block, None], out=other)
        predicted = predicted.clamp_(min=0) if self.negative is None else predicted
        self.cross.index_add_(0, features, values * predicted.view(-1)[entry])
        self.squares[block] += torch.linalg.vector_norm(predicted, dim=1).double().square()
        bins = bins_of_(scores, other)
        fired = bins.view(-1)[entry].long()
        place = (features - block.start) * BINS + fired
        below = None if self.negative is None else values < 0
        single = torch.ones((), dtype=torch.int32, device=bins.device)
        for counts, some in self._sides(place, below):
            counts[block].view(-1).index_add_(0, some, single.expand(len(some)))
        bins += torch.arange(0, len(bins) * BINS, BINS, dtype=torch.int32, device=bins.device)[:, None]
        self.all[block].view(-1).index_add_(0, bins.view(-1), single.expand(bins.numel()))
        self._rank(block, place, below, features, groups[tokens])

    def _sides(self, place: Tensor, below: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The counts of firings above and below zero, each with the bins of some of those firings."""
        if self.negative is None or below is None:
            yield self.firing, place
        else:
            yield self.firing, place[~below]
            yield self.negative, place[below]

    def _rank(
        self,
        block: slice,
        place: Int64[Tensor, " entry"],
        below: Bool[Tensor, " entry"] | None,
        features: Int64[Tensor, " entry"],
        groups: Int64[Tensor, " entry"],
    ) -> None:
        """Add each firing's share of the silent tokens that score lower; higher, if it fires below zero.

        It counts the silent tokens scored so far. They are many, so the order hardly matters.

        AUROC is the mean of these over firings. Kept per document group, they say how much it varies with the documents
        that the firings are in.
        """
        silent = self.all[block] - self.firing[block]
        silent = silent if self.negative is None else silent - self.negative[block]
        lower = (silent.cumsum(1) - 0.5 * silent) / silent.sum(1, keepdim=True).clamp(min=1)
        share = lower.view(-1)[place].double()
        share = share if below is None else torch.where(below, 1 - share, share)
        group_and_feature = groups * self.ranks.shape[1] + features
        self.ranks.view(-1).index_add_(0, group_and_feature, share)

    def scores(self, held: Firings) -> Scores:
        """How well each feature is told on the tokens so far, whose latents were added to `held`.

        Over several processes, a firing's rank is that among the silent tokens of its own process.
        """
        blocks = [slice(first, first + FEATURES_AT_ONCE) for first in range(0, len(self.firing), FEATURES_AT_ONCE)]
        areas = side_by_side(lambda _, block: self._areas(block), blocks, cores_for(self.firing.device))
        auroc, auroc_error, precision, precision_error = (torch.cat(pieces) for pieces in zip(*areas, strict=True))
        squares, cross, tokens = self.squares * self.scale.square(), self.cross * self.scale, int(held.tokens)
        r2 = 1 - (squares - 2 * cross + held.zz) / (held.zz - held.z.square() / tokens)
        scores = {
            "auroc": auroc,
            "auroc_error": auroc_error,
            "average_precision": precision,
            "average_precision_error": precision_error,
            "r2": r2,
        }
        scores |= {"ranks": self.ranks, "firings": held.firings}
        arrays = {name: array.cpu().numpy() for name, array in scores.items()}
        return Scores(**arrays, tokens=tokens, ridge=self.ridge)

    def _areas(self, block: slice) -> tuple[Tensor, ...]:
        """AUROC, its error, average precision and its error of a block of features."""
        firing, silent = self.firing[block], self.all[block] - self.firing[block]
        if self.negative is None:
            return _areas(firing.double(), silent.double())
        negative = self.negative[block]
        return _areas_of_both_sides(firing.double(), negative.double(), (silent - negative).double())


def _areas(firing: Tensor, silent: Tensor) -> tuple[Tensor, ...]:
    """AUROC, its error, average precision and its error [feature]."""
    return (*auroc_of(firing, silent), *average_precision_of(firing, silent))


def _areas_of_both_sides(positive: Tensor, negative: Tensor, silent: Tensor) -> tuple[Tensor, ...]:
    """`_areas` for a random firing of either sign.

    Firings above zero are ranked against silent tokens by the score, those below zero by the negated score.
    """
    share = positive.sum(1) / (positive.sum(1) + negative.sum(1))
    above, below = _areas(positive, silent), _areas(negative.flip(1), silent.flip(1))
    return tuple(
        torch.where(share == 1, up, torch.where(share == 0, down, share * up + (1 - share) * down))
        for up, down in zip(above, below, strict=True)
    )


def bins_of_(scores: Float32[Tensor, "*any"], spare: Float32[Tensor, "*any"]) -> Int32[Tensor, "*any"]:
    """The bin of each score, in the memory of `spare`; overwrites the scores."""
    # A hair less than half, so that a score whose quotient rounds to 1 stays in the last bin.
    half = 0.5 * BINS * (1 - 1e-6)
    scores.div_(torch.abs(scores, out=spare).add_(FINE)).add_(1).mul_(half)
    return spare.view(torch.int32).copy_(scores)


def auroc_of(
    firing: Float64[Tensor, "feature bin"], silent: Float64[Tensor, "feature bin"]
) -> tuple[Float64[Tensor, " feature"], Float64[Tensor, " feature"]]:
    """Area under the ROC curve of binned scores, and the largest error that binning can cause. Ties count half.

    Whatever the order within a bin, only its own pairs of a firing and a silent token change sides: the error is at
    most ½ Σ_b p_b n_b, the shares of firing and of silent tokens in each bin. NaN for features that never fire or are
    never silent.
    """
    p, n = firing / firing.sum(1, keepdim=True), silent / silent.sum(1, keepdim=True)
    return (p * (n.cumsum(1) - 0.5 * n)).sum(1), 0.5 * (p * n).sum(1)


def average_precision_of(
    firing: Float64[Tensor, "feature bin"], silent: Float64[Tensor, "feature bin"]
) -> tuple[Float64[Tensor, " feature"], Float64[Tensor, " feature"]]:
    """Average precision Σ (Rₙ − Rₙ₋₁) Pₙ of binned scores, and the largest error that binning can cause.

    Tied scores are treated as in scikit-learn.

    The error is taken from the two extreme orders within each bin: all its firing tokens first, or all last. NaN for
    features that never fire.
    """
    down, silent = firing.flip(1), silent.flip(1)
    hits, seen = down.cumsum(1), (down + silent).cumsum(1)
    share = down / firing.sum(1, keepdim=True)

    def mean(precision: Tensor) -> Tensor:
        return (share * precision.nan_to_num(0.0)).sum(1)

    value = mean(hits / seen)
    highest = mean(hits / (seen - silent))
    lowest = mean((hits - down + 1) / (seen - down + 1))
    return value, torch.maximum(highest - value, value - lowest)
