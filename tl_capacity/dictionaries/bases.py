"""Bases as features, by name: `neurons:HOOK` and `pca:HOOK`, optionally with `,k=24`. A basis is made for one model and
fitted to its activations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from tl_capacity.dictionaries.dictionary import DictionaryConfig, Metadata
from tl_capacity.dictionaries.moments import Moments, principal_components
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import BASES
from tl_capacity.models.forward import activation_at, evaluating
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.runtime.processes import is_first
from tl_capacity.runtime.progress import token_progress
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import TokenStream

PCA_TOKENS = 50_000
"""Tokens to fit principal components to: some hundred for each dimension of a small model."""


@dataclass(frozen=True)
class BasisSpec:
    """The parts of a name such as `neurons:blocks.3.mlp.hook_post,k=24`.

    Attributes:
        kind: one of `BASES`.
        hook: the hook point.
        k: coordinates kept per token; None for all.
    """

    kind: str
    hook: str
    k: int | None = None

    @classmethod
    def parse(cls, spec: str) -> BasisSpec | None:
        """The basis that `spec` names, or None if it names something else.

        Raises:
            DictionaryError: where it names one badly.
        """
        kind, colon, rest = spec.partition(":")
        if kind not in BASES or not colon:
            return None
        match = re.fullmatch(r"([\w.]+)(?:,k=(\d+))?", rest)
        if match is None:
            raise DictionaryError(
                f"{spec!r} names no basis: write {kind}:HOOK, or {kind}:HOOK,k=24 to keep each token's 24 largest"
            )
        return cls(kind, match[1], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"{self.kind}:{self.hook}" + (f",k={self.k}" if self.k is not None else "")

    @property
    def needs_text(self) -> bool:
        """Whether the basis depends on the text."""
        return self.kind != "neurons"

    def fit(
        self, model: Any, stream: TokenStream, tokens: int = PCA_TOKENS, *, progress: bool = True
    ) -> LargestOfABasis:
        """The basis for a model with TransformerLens hooks, or for a Hugging Face model of a registered family.

        Principal components are those of the first `tokens` counted tokens of the stream; neurons need one batch, to
        see how many there are.

        Raises:
            HookPointError: where the model has no such hook point, or does not run it.
            CapacityError: where the stream has no tokens, or the activations are not finite.
        """
        seen = activations(model, self.hook, stream)
        first = next(seen, None)
        if first is None:
            raise CapacityError(
                f"{stream.name()} has no token to count, so no basis can be made: choose another --source"
            )
        if not self.needs_text:
            return NeuronBasis(first.shape[1], self.hook, self.k)
        moments = Moments()
        with token_progress(tokens, progress and is_first(), f"fitting {self}") as advance:
            for x in chain([first], seen):
                moments.add(x)
                advance(moments.count)
                if moments.count >= tokens:
                    break
        if not moments.finite:
            raise CapacityError(f"{self.hook} has NaN or infinite activations: check the model's dtype and weights")
        return PCABasis(moments.mean, moments.covariance, self.hook, self.k)


def activations(model: Any, hook: str, stream: TokenStream) -> Iterator[Float[Tensor, "token d"]]:
    """Activations at one hook point, batch by batch, with heads joined. Special tokens and padding are left out.

    Raises:
        HookPointError: where the model has no such hook point, or does not run it.
    """
    rule, point = CountingRule.for_model(model, stream.tokenizer), find_tap_point(model, hook)
    for batch in stream:
        counted = torch.from_numpy(rule.counted(batch.tokens))
        with evaluating(model):
            seen = activation_at(model, point, torch.from_numpy(batch.filled(rule.filler)))
        if seen is None:
            raise HookPointError(f"{hook} did not fire: the model does not run it, choose another hook point")
        if seen.shape[:2] != counted.shape:
            raise HookPointError(
                f"{hook} has shape {list(seen.shape)} for tokens of shape {list(counted.shape)}: choose a hook point"
                " with one vector per token"
            )
        if bool(counted.any()):
            yield seen.flatten(2)[counted.to(seen.device)].float().cpu()


class LargestOfABasis(nn.Module):
    """An orthonormal basis as a dictionary. Latents are coordinates, and negative ones are active too.

    Coordinates are seldom zero, and a basis whose every feature is active on every token has no sparsity. With `k`,
    only the k largest in size of each token are kept, as in an AbsTopK SAE, and the FVU says what that costs.

    Args:
        kind: what the features are.
        basis: [feature, d], rows of norm 1.
        mean: [d], the origin of the coordinates.
        hook: the hook point.
        k: coordinates kept per token; None for all.

    Raises:
        DictionaryError: where k is no number of features.
    """

    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self, kind: str, basis: Float[Tensor, "feature d"], mean: Float[Tensor, " d"], hook: str, k: int | None = None
    ) -> None:
        super().__init__()
        if k is not None and not 1 <= k <= len(basis):
            raise DictionaryError(
                f"k = {k} does not fit the {kind} basis at {hook}: choose a number from 1 to its {len(basis):,} "
                "features"
            )
        self.register_buffer("W_dec", basis)
        self.register_buffer("b_dec", mean)
        self.cfg, self.k = (
            DictionaryConfig(basis.shape[1], len(basis), kind if k is None else f"{kind}, {k} largest", Metadata(hook)),
            k,
        )

    def encode(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token feature"]:
        """Coordinates of activations. All but the `k` largest in size are zero."""
        return self._largest(self._coordinates(x.to(self.W_dec) - self.b_dec))

    def decode(self, feature_acts: Float[Tensor, "token feature"]) -> Float[Tensor, "token d"]:
        """The activations with these coordinates."""
        return feature_acts @ self.W_dec + self.b_dec

    def _coordinates(self, centred: Tensor) -> Tensor:
        return centred @ self.W_dec.T

    def _largest(self, coordinates: Tensor) -> Tensor:
        if self.k is None:
            return coordinates
        places = coordinates.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(coordinates).scatter_(-1, places, coordinates.gather(-1, places))


class NeuronBasis(LargestOfABasis):
    """A basis whose features are the `width` dimensions of a hook point, such as the neurons at
    `blocks.3.mlp.hook_post`.

    Neurons behind a ReLU are sparse by themselves; behind a GELU none is ever zero, so give k. Its W_dec is the
    identity, width² numbers.
    """

    def __init__(self, width: int, hook: str, k: int | None = None) -> None:
        super().__init__("neurons", torch.eye(width), torch.zeros(width), hook, k)

    def _coordinates(self, centred: Tensor) -> Tensor:
        return centred


class PCABasis(LargestOfABasis):
    """Principal components of a hook point's activations, largest variance first. This is the best basis that ignores
    sparsity.

    Args:
        mean: [d] of the activations.
        covariance: [d, d] of the activations.
        hook: the hook point.
        k: components kept per token, the largest in size; None for all.
    """

    def __init__(
        self, mean: Float64[Tensor, " d"], covariance: Float64[Tensor, "d d"], hook: str, k: int | None = None
    ) -> None:
        _, components = principal_components(covariance)
        super().__init__("pca", components.float().contiguous(), mean.float(), hook, k)
