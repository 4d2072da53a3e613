"""Streaming ridge regression of an SAE's latents on activations.

Sums over tokens merge by addition. The closed form follows from them.

Memory is O(width · features) whatever the number of tokens; latents stay sparse throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tl_capacity.dictionaries.encoding import Entries
from tl_capacity.errors import CapacityError
from tl_capacity.runtime.processes import Processes

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties to choose from, in units of the activations' mean variance per dimension."""
CHOOSING_FEATURES = 1024
"""How many features choose the penalty; they are evenly spaced.

Solving for all features of a wide SAE with every penalty would cost more than the pass over the tokens.
"""
CANDIDATES = 4 * CHOOSING_FEATURES
"""Evenly spaced features of which these are taken, once it is known which fire; fewer than twice as many."""
SOLVED_AT_ONCE = 1024
"""Features whose weights are solved for at once, so that no copy of all sums is made on the way."""


@dataclass(frozen=True)
class Latents:
    """The active latents of some tokens, sorted by feature: one entry for each (token, feature) with z ≠ 0.

    Attributes:
        features: the feature's place among those that are looked at.
        tokens: the token's place in the batch.
        values: z.
        starts: where each feature's entries begin, and the number of all entries.
        n_tokens: tokens in the batch, with an active latent or not.
    """

    features: Int64[Tensor, " entry"]
    tokens: Int64[Tensor, " entry"]
    values: Float64[Tensor, " entry"]
    starts: Int64[Tensor, " boundary"]
    n_tokens: int

    @classmethod
    def from_entries(cls, entries: Entries, place: Int64[Tensor, " latent"], n_features: int, n_tokens: int) -> Latents:
        """The entries of an encoder, for latents that are read out.

        Args:
            place: of each latent of the SAE, or −1 for those that are not looked at.
        """
        tokens, latents, values = entries
        features = place[latents]
        wanted = torch.nonzero(features >= 0).view(-1)
        order = wanted[torch.argsort(features[wanted], stable=True)]
        features = features[order]
        starts = torch.zeros(n_features + 1, dtype=torch.int64, device=features.device)
        torch.cumsum(torch.bincount(features, minlength=n_features), 0, out=starts[1:])
        return cls(features, tokens[order], values[order].double(), starts, n_tokens)

    def every(self, step: int) -> Latents:
        """Those of every so many-th feature."""
        wanted = torch.nonzero(self.features % step == 0).view(-1)
        features, starts = self.features[wanted] // step, self.starts.new_zeros((len(self.starts) - 2) // step + 2)
        torch.cumsum(torch.bincount(features, minlength=len(starts) - 1), 0, out=starts[1:])
        return Latents(features, self.tokens[wanted], self.values[wanted], starts, self.n_tokens)

    def matrix(self) -> Tensor:
        """Z transposed [feature, token], as a sparse CSR matrix."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.starts, self.tokens, self.values, (len(self.starts) - 1, self.n_tokens), check_invariants=False
            )


@dataclass
class Moments:
    """Sums over tokens for a regression of latents z on activations x, in float64."""

    tokens: int
    x: Float64[Tensor, " width"]
    z: Float64[Tensor, " feature"]
    xx: Float64[Tensor, "width width"]
    zx: Float64[Tensor, "feature width"]
    zz: Float64[Tensor, " feature"]

    @classmethod
    def zeros(cls, width: int, features: int, device: torch.device | str = "cpu") -> Moments:
        """The sums over no tokens."""
        sizes = [(width,), (features,), (width, width), (features, width), (features,)]
        return cls(0, *(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def update(self, x: Float[Tensor, "token width"], latents: Latents) -> None:
        """Add some tokens."""
        x = x.to(self.x)
        self.tokens += len(x)
        self.x += x.sum(0)
        self.xx.addmm_(x.T, x)
        self.zx.addmm_(latents.matrix(), x)
        self.z.index_add_(0, latents.features, latents.values)
        self.zz.index_add_(0, latents.features, latents.values.square())

    def merge(self, other: Moments) -> Moments:
        """The sums over both sets of tokens."""
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_tensors(self) -> dict[str, Tensor]:
        """The sums by name, for a checkpoint."""
        return {f.name: torch.as_tensor(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Moments:
        """The sums that `to_tensors` gave."""
        return cls(int(tensors["tokens"]), *(tensors[f.name].to(device) for f in fields(cls)[1:]))

    def over_all(self, processes: Processes) -> Moments:
        """The sums over the tokens of all processes."""
        tokens, *sums = processes.sums([torch.as_tensor(getattr(self, f.name)) for f in fields(self)])
        return Moments(int(tokens), *sums)

    def less(self, other: Moments) -> Moments:
        """The sums over the tokens that are not among others', which are a part of these."""
        return Moments(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def about(self, x: Float64[Tensor, " width"], z: Float64[Tensor, " feature"]) -> Moments:
        """The sums of (x − x₀), of (z − z₀), and of their products."""
        n = self.tokens
        return Moments(
            n,
            self.x - n * x,
            self.z - n * z,
            self.xx - torch.outer(self.x, x) - torch.outer(x, self.x) + n * torch.outer(x, x),
            self.zx.addr(z, self.x, alpha=-1).addr_(self.z - n * z, x, alpha=-1),
            self.zz - 2 * z * self.z + n * z.square(),
        )

    def centred(self) -> Moments:
        """The sums about the means."""
        return self.about(self.x / self.tokens, self.z / self.tokens)

    def take(self, features: Int64[Tensor, " chosen"]) -> Moments:
        """Of some of the features."""
        return Moments(self.tokens, self.x, self.z[features], self.xx, self.zx[features], self.zz[features])

    def every(self, step: int) -> Moments:
        """Of every so many-th feature, without a copy."""
        return Moments(self.tokens, self.x, self.z[::step], self.xx, self.zx[::step], self.zz[::step])

    def project(self, basis: Float64[Tensor, "width dimension"]) -> Moments:
        """The sums for the projected activations x·basis."""
        return Moments(self.tokens, self.x @ basis, self.z, basis.T @ self.xx @ basis, self.zx @ basis, self.zz)


@dataclass(frozen=True)
class Readout:
    """A linear readout of every feature: ẑ = z̄ + W(x·basis − x̄).

    Attributes:
        weight: W.
        x_mean, z_mean: x̄ of the projected activations, and z̄.
        spread: standard deviation of each feature's ẑ on the tokens that the readout was fitted to.
        ridge: the penalty, in units of the mean variance per dimension.
        basis: what activations are projected on first; None for the activations themselves.
    """

    weight: Float64[Tensor, "feature dimension"]
    x_mean: Float64[Tensor, " dimension"]
    z_mean: Float64[Tensor, " feature"]
    spread: Float64[Tensor, " feature"]
    ridge: float
    basis: Float64[Tensor, "width dimension"] | None = None


def step_among(features: int) -> int:
    """Of so many features, every how many-th is a candidate for those that choose the penalty."""
    return max(1, features // CANDIDATES)


@dataclass
class FitSums:
    """The sums that a readout is fitted from.

    Attributes:
        whole: over the documents that fit and those that choose the penalty.
        validation: over those that choose, for every `step`-th feature; the sums of all would be as large again.
        step: which features' they are.
    """

    whole: Moments
    validation: Moments
    step: int

    @classmethod
    def zeros(cls, width: int, features: int, device: torch.device | str = "cpu") -> FitSums:
        """Of no tokens."""
        step = step_among(features)
        validation = Moments.zeros(width, len(range(0, features, step)), device)
        return cls(Moments.zeros(width, features, device), validation, step)

    @classmethod
    def of_parts(cls, training: Moments, validation: Moments) -> FitSums:
        """Of both kinds of documents apart, each over all features."""
        step = step_among(len(training.z))
        return cls(training.merge(validation), validation.every(step), step)

    def update(self, x: Float[Tensor, "token width"], latents: Latents, chooses: bool) -> None:
        """Add some tokens; `chooses` says whether their document chooses the penalty."""
        self.whole.update(x, latents)
        if chooses:
            self.validation.update(x, latents if self.step == 1 else latents.every(self.step))

    def training(self) -> Moments:
        """The sums over the documents that fit, for every `step`-th feature."""
        return self.whole.every(self.step).less(self.validation)

    def project(self, basis: Float64[Tensor, "width dimension"]) -> FitSums:
        """Of the projected activations x·basis."""
        return FitSums(self.whole.project(basis), self.validation.project(basis), self.step)

    def over_all(self, processes: Processes) -> FitSums:
        """The sums over the tokens of all processes."""
        return FitSums(self.whole.over_all(processes), self.validation.over_all(processes), self.step)


def fit(
    sums: FitSums,
    basis: Float64[Tensor, "width dimension"] | None = None,
    ridges: Sequence[float] = RIDGES,
    *,
    used_up: bool = False,
) -> Readout:
    """The readout of all documents that fit or choose.

    Its penalty is the one whose readout of those that fit predicts those that choose best.

    Best is the lowest mean over features of Σ(z − ẑ)² / Σ(z − z̄)²; both come from the sums, so no token is looked at
    again.

    Args:
        used_up: the sums are needed no longer, so the readout may take their memory.

    Raises:
        CapacityError: where there are no tokens or the activations are all the same.
    """
    if basis is not None:
        sums, used_up = sums.project(basis), True
    ridge = choose_ridge(sums.training(), sums.validation, ridges) if len(ridges) > 1 else ridges[0]
    return solve(sums.whole, ridge, basis, used_up=used_up)


def solve(
    moments: Moments,
    ridge: float,
    basis: Float64[Tensor, "width dimension"] | None = None,
    *,
    used_up: bool = False,
) -> Readout:
    """Ridge regression with an intercept that is not penalised: W = Σ(z − z̄)(x − x̄)ᵀ (Σ(x − x̄)(x − x̄)ᵀ + αI)⁻¹.

    α is `ridge` times the mean over dimensions of Σ(x − x̄)²: scaling the activations or repeating the tokens changes
    no prediction.

    Args:
        used_up: W takes the place of Σ z xᵀ.

    Raises:
        CapacityError: where there are no tokens, or the activations are all the same.
    """
    if moments.tokens == 0:
        raise CapacityError("there are no tokens to fit a readout to: pass more documents")
    x_mean, z_mean = moments.x / moments.tokens, moments.z / moments.tokens
    xx = moments.xx.addr(moments.x, x_mean, alpha=-1)
    alpha = ridge * float(xx.diagonal().mean())
    if not alpha > 0:
        raise CapacityError(
            f"{moments.tokens:,} tokens all have the same activation, so nothing can be read from it: check the hook"
            " point, or pass more text"
        )
    lower = torch.linalg.cholesky(xx + alpha * torch.eye(len(xx), dtype=xx.dtype, device=xx.device))
    weight, spread = moments.zx if used_up else torch.empty_like(moments.zx), torch.empty_like(moments.z)
    for start in range(0, len(weight), SOLVED_AT_ONCE):
        some = slice(start, start + SOLVED_AT_ONCE)
        zx = moments.zx[some].addr(z_mean[some], moments.x, alpha=-1)
        solved = torch.cholesky_solve(zx.T, lower).T
        # The normal equations give wᵀ Σ(x − x̄)(x − x̄)ᵀ w without another product of width² · features.
        explained = (solved * zx).sum(1) - alpha * solved.square().sum(1)
        weight[some], spread[some] = solved, (explained.clamp(min=0) / moments.tokens).sqrt()
    return Readout(weight, x_mean, z_mean, spread, ridge, basis)


def choose_ridge(training: Moments, validation: Moments, ridges: Sequence[float] = RIDGES) -> float:
    """The penalty whose readout, fitted to `training`, predicts `validation` best.

    Raises:
        CapacityError: where none of the features fires there.
    """
    errors = ridge_errors(training, validation, ridges)
    return min(errors, key=errors.__getitem__)


def ridge_errors(training: Moments, validation: Moments, ridges: Sequence[float] = RIDGES) -> dict[float, float]:
    """The mean over features of Σ(z − ẑ)² / Σ(z − z̄)² on `validation`, for a readout of `training` with each penalty.

    Raises:
        CapacityError: where none of the features fires there.
    """
    variance = validation.centred().zz if validation.tokens else torch.zeros_like(validation.zz)
    firing = torch.nonzero((variance > 0) & (training.zz > 0)).view(-1)
    if not len(firing):
        raise CapacityError(
            "no feature fires both on the documents that fit and on those that choose the ridge: pass more documents"
        )
    chosen = firing[:: -(-len(firing) // CHOOSING_FEATURES)]
    training, validation, variance = training.take(chosen), validation.take(chosen), variance[chosen]

    def error(ridge: float) -> float:
        readout = solve(training, ridge)
        about, weight = validation.about(readout.x_mean, readout.z_mean), readout.weight
        squared = about.zz - 2 * (weight * about.zx).sum(1) + ((weight @ about.xx) * weight).sum(1)
        return float((squared / variance).mean())

    return {ridge: error(ridge) for ridge in ridges}


def principal_axes(moments: Moments, dimensions: int) -> Float64[Tensor, "width dimension"]:
    """The activations' directions of largest variance; at most as many as they have dimensions."""
    axes: Tensor = torch.linalg.eigh(moments.centred().xx).eigenvectors
    return axes[:, -dimensions:]
