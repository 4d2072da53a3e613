"""Running a model: in evaluation mode, up to a hook point, on tokens in its vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.models.defaults import longest_row
from tl_capacity.models.hook_points import TapPoint

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def forward_options(model: Any) -> dict[str, Any]:
    """Options of a forward pass. They turn off the cache of keys and values, which takes memory; TransformerLens keeps
    none by default.
    """
    return (
        {"use_cache": False}
        if not hasattr(model, "hook_dict") and "use_cache" in inspect.signature(model.forward).parameters
        else {}
    )


class NothingMoreToSeeError(Exception):
    """Ends a forward pass whose remaining part nobody needs."""


def activation_at(model: Any, point: TapPoint, tokens: Int[Tensor, "row position"]) -> Tensor | None:
    """The activation [row, position, ...] at a hook point, from a run that stops there; None if the hook point does not
    fire.

    Raises:
        CapacityError: where a token is not in the model's vocabulary.
    """
    return activations_at(model, [point], tokens)[0]


@torch.no_grad()
def activations_at(model: Any, points: Sequence[TapPoint], tokens: Int[Tensor, "row position"]) -> list[Tensor | None]:
    """The activation [row, position, ...] at each of some hook points, from one run that stops at the last; None for
    one that does not fire.

    Raises:
        CapacityError: where a token is not in the model's vocabulary.
    """
    check_token_ids(model, tokens.numpy(force=True))
    seen: dict[int, Tensor] = {}

    def keep(place: int, activation: Tensor) -> None:
        seen[place] = activation.detach()
        if len(seen) == len(points):
            raise NothingMoreToSeeError

    with ExitStack() as watching:
        for place, point in enumerate(points):
            watching.callback(point.watch(partial(keep, place)))
        with suppress(NothingMoreToSeeError):
            model(tokens.to(device_of(model)), **forward_options(model))
    return [seen.get(place) for place in range(len(points))]


def at_places(
    activation: Float[Tensor, "row position ..."], places: Int[Tensor, " token"]
) -> Float[Tensor, "token ..."]:
    """An activation at some places of all rows together, one row after the other. A mask would make the host wait for a
    device, to know how many there are.
    """
    return activation.flatten(0, 1).index_select(0, places.to(activation.device))


def embedding_of(model: Any) -> nn.Module:
    """The module that turns token ids into vectors.

    Raises:
        HookPointError: where the model has none.
    """
    embedding = (
        model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else getattr(model, "embed", None)
    )
    if not isinstance(embedding, nn.Module):
        raise HookPointError(
            f"{type(model).__name__} has no embedding at which its tokens can be seen: pass a TransformerLens or"
            " Hugging Face model"
        )
    return embedding


def longest(model: Any) -> int:
    """The most positions that a row of this model may have."""
    return longest_row(getattr(model, "cfg", None) or getattr(model, "config", None))


def device_of(model: Any) -> torch.device:
    """The device on which a model takes its tokens, which is where its embedding is."""
    device: torch.device = next(model.parameters()).device
    # What Accelerate keeps elsewhere is on no device until it is needed; its hooks move the tokens there.
    return torch.device("cpu") if device.type == "meta" else device


def check_token_ids(model: Any, ids: NDArray[np.integer[Any]], who: str = "the model") -> None:
    """Check that a model has an embedding for each token.

    Raises:
        CapacityError: where it has not.
    """
    vocabulary = int(next(embedding_of(model).parameters()).shape[0])
    strange = ids[(ids < 0) | (ids >= vocabulary)]
    if len(strange):
        raise CapacityError(
            f"the text has token id {strange[0]}, but {who}'s vocabulary has {vocabulary:,}: use {who}'s own tokenizer"
        )


def check_row_length(model: Any, rows: NDArray[np.integer[Any]], who: str = "the model") -> None:
    """Check that a model has a position for each token of rows [row, position].

    Raises:
        CapacityError: where it has not.
    """
    limit = longest(model)
    if rows.shape[1] > limit:
        raise CapacityError(
            f"rows have {rows.shape[1]:,} positions, more than {who}'s {limit:,}: choose a shorter context"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block, and each module back as it was afterwards.

    Meanwhile graphs of `torch.compile` are not used, since they run past hooks that came later.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def drops_out(model: nn.Module) -> bool:
    """Whether a model leaves something out at random, as dropout does in training mode."""
    return any(_drops_out(module) for module in model.modules() if module.training)


def _drops_out(module: nn.Module) -> bool:
    # Attention passes its share of dropout on as a number, and drops out without a module for it.
    numbers = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return any(share > 0 for share in [*numbers, getattr(module, "p", 0.0) if isinstance(module, DROPOUT) else 0.0])
