"""What plugins hand over and what the core asks of models and dictionaries: protocols and small records, free of any
implementation.

Importing this module imports neither torch nor TransformerLens, so that listing plugins is cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    Tensor = Any


class _ByItems(type(Protocol)):  # type: ignore[misc]
    """An instance is whatever has the members. From Python 3.12 on, a protocol's own check misses the parameters of
    PyTorch's modules, which no class holds.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        return all(hasattr(instance, name) for name in ("W_dec", "cfg", "encode", "decode"))


@runtime_checkable
class SparseAutoencoder(Protocol, metaclass=_ByItems):
    """A dictionary as the core sees it; every SAELens inference class is one.

    `encode` maps activations [token, d_in] to latents [token, feature]; an entry is active where it is not zero.
    `decode` maps them back. `cfg` has `d_in` and `d_sae`; where it also has SAELens' `metadata`, the hook name is read
    from it.
    """

    W_dec: Tensor
    cfg: Any

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, feature_acts: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class FeatureSums:
    """Sums over the counted tokens of one SAE, or over a bootstrap resample of their documents: what importance is
    computed from.

    Attributes:
        tokens: number of counted tokens.
        counts: [feature] tokens on which the feature is active.
        sums: [feature] Σ z.
        squares: [feature] Σ z².
        decoder_norm: [feature] ‖w_dec,i‖.
        state: what the estimator itself accumulated, summed over the same documents.
    """

    tokens: float
    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    decoder_norm: NDArray[np.float64]
    state: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


ENTRIES_AT_ONCE = 2**14
"""Active latents whose decoder vectors are gathered at once."""


@dataclass(frozen=True)
class LatentBatch:
    """The active latents of some counted tokens, sparse: one entry per (token, feature) with z ≠ 0; those of one
    feature are in the order of the tokens.

    Attributes:
        features: the feature.
        tokens: the token's place in `activations`.
        groups: the document group of the token.
        values: the latent z.
        activations: what the SAE encoded.
        documents: the number of the document each token belongs to.
        token_groups: the document group of each token.
        rows: the row of each token in the forward pass.
        positions: its position in that row.
        counted: on the CPU, the token mask of the forward pass, of which this batch may be a part; false at padding,
            special tokens and skipped positions.
        sae: the dictionary.
        gradients: for each loss that an estimator asked for, its gradient ∂L/∂x at the hook point; L is in nats, summed
            over positions.
        scale: by what `decode` multiplies each latent before its decoder vector; None for 1.
    """

    features: Int64[Tensor, " entry"]
    tokens: Int64[Tensor, " entry"]
    groups: Int64[Tensor, " entry"]
    values: Float64[Tensor, " entry"]
    activations: Float[Tensor, "token ..."]
    documents: Int64[Tensor, " token"]
    token_groups: Int64[Tensor, " token"]
    rows: Int64[Tensor, " token"]
    positions: Int64[Tensor, " token"]
    counted: Bool[Tensor, "row position"]
    sae: Any
    gradients: Mapping[str, Float[Tensor, "token width"]] = field(default_factory=dict)
    scale: Float[Tensor, " feature"] | None = None

    def latent_gradients(self, loss: str) -> Float64[Tensor, " entry"]:
        """∂L/∂z of each active latent: ⟨w_dec, ∂L/∂x⟩ times its scale, the error of the reconstruction held fixed
        (Marks et al. 2024, arXiv:2403.19647).
        """
        import torch

        decoder, gradient = self.sae.W_dec.detach().flatten(1), self.gradients[loss]
        pieces = zip(
            torch.split(self.features, ENTRIES_AT_ONCE), torch.split(self.tokens, ENTRIES_AT_ONCE), strict=True
        )
        along = [
            (decoder[f.to(decoder.device)] * gradient[t.to(gradient.device)].to(decoder)).sum(-1) for f, t in pieces
        ]
        gradients = torch.cat(along).to(self.values.device).to(self.values.dtype)
        if self.scale is None:
            return gradients
        return gradients * self.scale.to(gradients.device).to(gradients.dtype)[self.features]

    def dense(self) -> Tensor:
        """Latents [token, feature] in float64; costs what the sparse form avoids."""
        import torch

        latents = torch.zeros(len(self.activations), self.sae.cfg.d_sae, dtype=torch.float64, device=self.values.device)
        latents[self.tokens, self.features] = self.values
        return latents


@dataclass(frozen=True)
class PathGradient:
    """The gradient of a loss, averaged along the straight path from the SAE's decoder bias to the activations; costs
    `steps` passes for each hook point.

    Attributes:
        loss: `cross_entropy`, whose points on the path have one target.
        steps: points on the path.
    """

    loss: str = "cross_entropy"
    steps: int = 8

    @property
    def name(self) -> str:
        """What it is called among `batch.gradients`."""
        return f"{self.loss} along a path of {self.steps}"


class ImportanceEstimator:
    """Base of an importance estimator: subclass, name it, and override `compute`; add `start` and `update` if the sums
    above do not suffice.

    An estimator that needs gradients names the losses in `gradient_of`; `batch.gradients` then has them, and the model
    runs to its end and back.

    An estimator keeps nothing in itself. What it accumulates is a mapping of tensors whose first axis is the document
    group, so that shards merge by addition and the document bootstrap can resample it.
    """

    name: str
    """Short name, as given to `--importance`."""
    unit: str
    """Unit of the importance, and so of the floors predicted from it."""
    summary: str = ""
    """One line for `tl-capacity plugins`."""
    gradient_of: tuple[str | PathGradient, ...] = ()
    """Losses whose gradients `update` needs: `cross_entropy`, `sampled` (see `tl_capacity.measure.backward`), or
    `PathGradient`s.
    """
    is_default: bool = False
    """Whether this estimator is meant where none is named; of all plugins' estimators, one says so."""
    compares_with_reconstruction_error: bool = False
    """Whether importances add up in the unit of the dictionary's error E‖x − x̂‖², so that floor and error can be
    compared; then `compute` needs no state.
    """

    def start(self, sae: SparseAutoencoder, groups: int, device: torch.device) -> dict[str, Tensor]:
        """The empty state: tensors [group, ...] of zeros."""
        return {}

    def update(self, state: dict[str, Tensor], batch: LatentBatch) -> None:
        """Add the active latents of some tokens to `state`, in place."""

    def compute(self, sums: FeatureSums) -> NDArray[np.float64]:
        """Importance [feature] ≥ 0, as a mean per counted token."""
        raise NotImplementedError(f"the importance estimator {self.name!r} does not override compute()")


@dataclass(frozen=True)
class CapacityContext:
    """What a capacity law is told of the features at a hook point, and of the widths there.

    Attributes:
        alpha: sparsity α of the features.
        importance: [feature] importances of the alive features, in no particular order.
        hook_width: d, the dimensions of the hook point; 0 where it is not known, as of a bare curve.
        teacher_width: d_T, the dimensions of the teacher's residual stream; 0 where it is not known.
    """

    alpha: float
    importance: NDArray[np.float64]
    hook_width: int = 0
    teacher_width: int = 0

    @property
    def n_features(self) -> int:
        """F, the number of alive features."""
        return len(self.importance)


class CapacityLaw:
    """Base of a capacity law: how many features a student's width holds. Subclass, name it, and override one method:
    `features_per_dimension`, or `kept` for a law that looks at other widths or is not linear in the student's.
    """

    name: str
    summary: str = ""
    caveat: str = ""
    """Where the law must not be trusted; printed beside every figure that rests on it."""
    is_default: bool = False
    """Whether this law is meant where none is named; of all plugins' laws, one says so."""

    def features_per_dimension(self, alpha: float, importance: NDArray[np.float64]) -> float:
        """ĝ for sparsity `alpha` and the alive features' importances [feature]."""
        raise NotImplementedError(
            f"the capacity law {self.name!r} overrides neither features_per_dimension() nor kept()"
        )

    def kept(self, width: int, at: CapacityContext) -> float:
        """Features that a student of width d_S keeps, before they are rounded down; it must not fall as the width
        grows. Called only where both widths of `at` are known.
        """
        return width * self.features_per_dimension(at.alpha, at.importance)


RESIDUAL_STREAM = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_post|hook_out)")
"""Hook points before and after a block: its number, and where."""
HOOK_IN_BLOCK = re.compile(r"blocks\.(\d+)\.([\w.]+)")
"""Any hook point of a block: its number, and the rest of the name."""


@dataclass(frozen=True)
class ModelFamily:
    """Where a Hugging Face architecture keeps its residual stream, and how a narrower model of it looks.

    Attributes:
        name: the family's name.
        model_types: the `config.model_type` values it covers.
        blocks: dotted path from the causal language model to its list of blocks; block N writes
            `blocks.N.hook_resid_post`.
        student: the fields that change in the teacher's configuration for a student of some width, or None where it has
            none of that width; without this function the family cannot be distilled. It needs to be cheap: nearby
            widths are tried where one cannot be built.
        places: where a block keeps what hooks inside it mean, by `config.model_type`: from the rest of the hook's name
            to a module of the block and its side, such as `{"mlp.hook_out": "mlp.output"}`. What is not in it needs a
            TransformerLens model.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    summary: str = ""
    student: Callable[[Any, int], Mapping[str, Any] | None] | None = None
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for kind, inside in self.places.items():
            if strange := [place for place in inside.values() if not place.endswith((".input", ".output"))]:
                raise ValueError(
                    f"the family {self.name!r} has no side of a module in its place {strange[0]!r} of {kind!r}: end it"
                    " with .input or .output"
                )

    def residual(self, hook_name: str) -> tuple[str, str] | None:
        """`(module path, "input" or "output")` that carries a residual-stream hook, or None where the hook is no
        residual stream.
        """
        match = RESIDUAL_STREAM.fullmatch(hook_name)
        if match is None:
            return None
        return f"{self.blocks}.{int(match[1])}", "input" if match[2] in ("hook_resid_pre", "hook_in") else "output"

    def place(self, hook_name: str, model_type: str) -> tuple[str, str] | None:
        """`(module path, "input" or "output")` that carries what a hook name means, inside blocks too; None where the
        family does not say.
        """
        match = HOOK_IN_BLOCK.fullmatch(hook_name)
        inside = self.places.get(model_type, {}).get(match[2]) if match else None
        if match is None or inside is None:
            return self.residual(hook_name)
        path, _, side = inside.rpartition(".")
        return f"{self.blocks}.{int(match[1])}.{path}", side

    def hook_at(self, path: str, side: str, model_type: str) -> str | None:
        """The hook name that means one side of a module of the model, or None where the family does not say."""
        match = re.fullmatch(re.escape(self.blocks) + r"\.(\d+)(?:\.([\w.]+))?", path)
        if match is None:
            return None
        if match[2] is None:
            return f"blocks.{match[1]}.{'hook_resid_pre' if side == 'input' else 'hook_resid_post'}"
        places = self.places.get(model_type, {})
        inside = next((hook for hook, place in places.items() if place == f"{match[2]}.{side}"), None)
        return None if inside is None else f"blocks.{match[1]}.{inside}"


@dataclass(frozen=True)
class NamedModel:
    """A model that loads by a short name from an installed package.

    Attributes:
        name: as given to `--model`.
        load: returns `(causal language model, tokenizer)`; may import whatever it needs.
        saes: hook name of each SAE that belongs to the model, and its SAELens folder.
        corpus: the token source to measure it on by default, if any.
        revision: what changes when the weights change.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]
    summary: str = ""
    saes: Mapping[str, Path] = field(default_factory=dict)
    corpus: str | None = None
    revision: str | None = None


class TokenSource:
    """Base of a token source: turns a specification such as a path into documents."""

    name: str
    summary: str = ""

    def matches(self, spec: str) -> bool:
        """Whether this source can read `spec`; sources are asked in the order in which plugins registered them."""
        raise NotImplementedError(f"the token source {self.name!r} does not override matches()")

    def documents(self, spec: str) -> Iterator[str | None]:
        """The documents, always in the same order; None where a row has no text, which is left out and counted."""
        raise NotImplementedError(f"the token source {self.name!r} does not override documents()")


@dataclass(frozen=True)
class LabelledText:
    """One text of a concept.

    Attributes:
        text: what is probed.
        label: its class.
        document: what it is from: texts of one document stay in one split and are resampled together; by default each
            text is a document of its own.
        split: "train", "validation" or "test"; by default a hash of the document decides.
    """

    text: str
    label: str
    document: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Concept:
    """A property of texts that a probe is to read off activations: texts of two classes.

    Attributes:
        name: as given to `--concepts`.
        classes: the class that the concept is named after, and the other.
        load: the texts, always in the same order; may import and read whatever it needs.
        collection: the name of the set it belongs to, which `--concepts` also takes.
        licence: of the texts.
    """

    name: str
    classes: tuple[str, str]
    load: Callable[[], Iterable[LabelledText]]
    summary: str = ""
    collection: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Recipe:
    """An experiment for `tl-capacity run NAME`.

    Attributes:
        name: as typed on the command line.
        summary: one line.
        target: a function of one frozen dataclass, whose fields become the command's options; or where it is, as
            `module:function`, which is imported only when the recipe runs. The module may be a plugin file's own name.
    """

    name: str
    summary: str
    target: str | Callable[[Any], Any]


BASES = ("neurons", "pca")
"""How the architecture of a basis begins; it has as many features as the hook point has dimensions, whatever the model
holds.
"""
