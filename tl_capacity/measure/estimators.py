"""Importance estimators while a model runs: their states begin, and active latents are added to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_capacity.errors import CapacityError, plugin_code
from tl_capacity.interfaces import ImportanceEstimator, LatentBatch, SparseAutoencoder
from tl_capacity.text.documents import DOCUMENT_GROUPS


def accumulating(estimators: Sequence[ImportanceEstimator]) -> list[ImportanceEstimator]:
    """Those that add up something of their own; they are given the active latents of a token together."""
    return [estimator for estimator in estimators if type(estimator).update is not ImportanceEstimator.update]


def empty_states(
    estimators: Sequence[ImportanceEstimator], sae: SparseAutoencoder, device: torch.device
) -> dict[str, Tensor]:
    """The state that each estimator starts with, as `estimator/key`.

    Raises:
        CapacityError: where a state is no tensor, or its first axis is not the document groups.
        PluginError: where an estimator fails.
    """
    states = {}
    for estimator in estimators:
        with plugin_code("importance estimator", estimator.name, estimator):
            state = dict(estimator.start(sae, DOCUMENT_GROUPS, device))
        for key, zeros in state.items():
            if not isinstance(zeros, Tensor):
                raise CapacityError(
                    f"the importance estimator {estimator.name!r} starts with {key!r}, a {type(zeros).__name__}:"
                    " make it a tensor"
                )
            if zeros.shape[:1] != (DOCUMENT_GROUPS,):
                raise CapacityError(
                    f"the importance estimator {estimator.name!r} starts with {key!r} of shape"
                    f" {tuple(zeros.shape)}: its first axis must be the {DOCUMENT_GROUPS} document groups"
                )
            states[f"{estimator.name}/{key}"] = zeros
    return states


def accumulate(estimator: ImportanceEstimator, states: dict[str, Tensor], latents: LatentBatch) -> None:
    """Add active latents to an estimator's state, in place.

    Raises:
        CapacityError: where the estimator replaces a tensor of its state instead.
        PluginError: where it fails.
    """
    prefix = f"{estimator.name}/"
    before = {key.removeprefix(prefix): tensor for key, tensor in states.items() if key.startswith(prefix)}
    state = dict(before)
    with plugin_code("importance estimator", estimator.name, estimator):
        estimator.update(state, latents)
    if any(state.get(key) is not tensor for key, tensor in before.items()):
        raise CapacityError(
            f"the importance estimator {estimator.name!r} replaces its state, and what it added is lost: add to the"
            " tensors in place"
        )
