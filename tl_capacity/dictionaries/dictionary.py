"""Dictionary: an SAE or transcoder from any trainer, usable without SAELens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_capacity.errors import DictionaryError


@dataclass(frozen=True)
class Metadata:
    """What a dictionary's files say about where it belongs, under the names that SAELens uses."""

    hook_name: str | None = None
    hook_name_out: str | None = None
    context_size: int | None = None
    hook_head_index: int | None = None
    hook_head_index_out: int | None = None
    hf_hook_name: str | None = None
    hf_hook_name_out: str | None = None
    model_name: str | None = None
    model_class_name: str | None = None
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None
    prepend_bos: bool | None = None
    seqpos_slice: Sequence[int | None] | None = None
    dataset_path: str | None = None


@dataclass(frozen=True)
class DictionaryConfig:
    """A dictionary's configuration, under the names that SAELens uses."""

    d_in: int
    d_sae: int
    architecture: str
    metadata: Metadata = Metadata()


class Dictionary(nn.Module):
    """A linear encoder, an activation and a linear decoder: z = activation((x − b_dec) W_enc + b_enc), x̂ = z W_dec +
    b_dec.

    Args:
        architecture: a key of `ACTIVATIONS`.
        weights: `W_enc` [d_in, feature], `b_enc` [feature], `W_dec` [feature, d_out], `b_dec` [d_out], and what the
            activation needs: `threshold`, `b_gate`, `r_mag`, `b_mag`; `W_skip` [d_out, d_in] of a skip transcoder;
            `b_pre` [d_in], which is taken from the input in b_dec's place.
        metadata: where it belongs.
        subtract_bias: whether b_dec is taken from the input, as in the formula.
        k: active latents per token, where the activation has that.

    Raises:
        DictionaryError: unknown architecture, or weights that are missing or do not fit one another.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self,
        architecture: str,
        weights: Mapping[str, Tensor],
        metadata: Metadata | None = None,
        *,
        subtract_bias: bool = True,
        k: int | None = None,
    ) -> None:
        super().__init__()
        if architecture not in ACTIVATIONS:
            raise DictionaryError(
                f"{architecture!r} is not an architecture that can be read: choose one of {', '.join(ACTIVATIONS)}, "
                "or load it with SAELens"
            )
        needed = {"W_enc", "b_enc", "W_dec", "b_dec", *NEEDED.get(architecture, ())}
        if missing := sorted(needed - weights.keys()):
            raise DictionaryError(
                f"the weights of this {architecture} dictionary lack {', '.join(missing)}: save it again"
            )
        for name, value in weights.items():
            self.register_buffer(name, value.float().contiguous())
        d_in, d_sae = self.W_enc.shape
        if self.W_dec.shape[0] != d_sae or self.b_enc.shape != (d_sae,) or self.b_dec.shape != self.W_dec.shape[1:]:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in weights.items())
            raise DictionaryError(
                f"the weights of this {architecture} dictionary do not fit together ({shapes}): save it again"
            )
        if architecture in ("topk", "groupmax") and not (
            k is not None and 1 <= k <= d_sae and (architecture == "topk" or d_sae % k == 0)
        ):
            raise DictionaryError(
                f"k = {k} does not fit the {d_sae:,} latents of this {architecture} dictionary: its configuration was"
                " altered"
            )
        self.cfg = DictionaryConfig(d_in, d_sae, architecture, metadata or Metadata())
        self.subtract_bias, self.k = subtract_bias, k

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token feature"]:
        """Latents of activations."""
        return ACTIVATIONS[self.cfg.architecture](self, torch.addmm(self.b_enc, self.process_sae_in(x), self.W_enc))

    def process_sae_in(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """The input of the encoder's product, under SAELens' name."""
        x = x.to(self.W_enc)
        return x - getattr(self, "b_pre", self.b_dec) if self.subtract_bias else x

    def decode(self, feature_acts: Float[Tensor, "token feature"]) -> Float[Tensor, "token d_out"]:
        """Activations from latents, without a skip connection's part."""
        return feature_acts @ self.W_dec + self.b_dec


def _relu(sae: Any, preactivations: Tensor) -> Tensor:
    return preactivations.relu()


def _topk(sae: Any, preactivations: Tensor) -> Tensor:
    values, features = preactivations.relu().topk(sae.k, dim=-1, sorted=False)
    return torch.zeros_like(preactivations).scatter_(-1, features, values)


def _groupmax(sae: Any, preactivations: Tensor) -> Tensor:
    groups = preactivations.relu().reshape(len(preactivations), sae.k, -1)
    values, place = groups.max(dim=-1, keepdim=True)
    return torch.zeros_like(groups).scatter_(-1, place, values).flatten(1)


def _jumprelu(sae: Any, preactivations: Tensor) -> Tensor:
    positive, threshold = preactivations.relu(), torch.as_tensor(sae.threshold)
    return positive * (positive > threshold)  # a product, so that NaN stays NaN


def _gated(sae: Any, preactivations: Tensor) -> Tensor:
    open_gates: Tensor = preactivations + sae.b_gate > 0
    size: Tensor = (preactivations * sae.r_mag.exp() + sae.b_mag).relu()
    return size * open_gates


ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "standard": _relu,
    "topk": _topk,
    "groupmax": _groupmax,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
"""Latents from preactivations [token, feature], for each architecture."""
NEEDED = {"jumprelu": ("threshold",), "gated": ("b_gate", "r_mag", "b_mag")}
