"""Importance estimators while a model runs: their states are created, and active latents are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tl_capacity.errors import CapacityError, line_of, plugin_code
from tl_capacity.interfaces import ImportanceEstimator, LatentBatch, SparseAutoencoder
from tl_capacity.text.documents import DOCUMENT_GROUPS

SUMMABLE = (torch.float64, torch.float32, torch.int64, torch.int32)
"""Types in which sums over many tokens may be kept."""


def accumulating(estimators: Sequence[ImportanceEstimator]) -> list[ImportanceEstimator]:
    """Those of the estimators that keep sums of their own. They are given all active latents of a token together."""
    return [estimator for estimator in estimators if type(estimator).update is not ImportanceEstimator.update]


def empty_states(
    estimators: Sequence[ImportanceEstimator], sae: SparseAutoencoder, device: torch.device
) -> dict[str, Tensor]:
    """The state that each estimator starts with, under `estimator/key`.

    Raises:
        CapacityError: where a state is no mapping of tensors of zeros whose first axis is the document groups, or is
            kept in a type that sums are lost in.
        PluginError: where an estimator fails.
    """
    states = {}
    for estimator in estimators:
        with plugin_code("importance estimator", estimator.name, estimator.start):
            state = estimator.start(sae, DOCUMENT_GROUPS, device)
        starts = f"the importance estimator {estimator.name!r} starts with"
        if not isinstance(state, Mapping):
            raise CapacityError(
                f"{starts} a {type(state).__name__} instead of a mapping{line_of(estimator.start)}: return tensors by"
                " name, as {'sum': tensor}"
            )
        for key, zeros in state.items():
            if not isinstance(zeros, Tensor):
                raise CapacityError(f"{starts} {key!r}, a {type(zeros).__name__}: make it a tensor")
            if zeros.shape[:1] != (DOCUMENT_GROUPS,):
                raise CapacityError(
                    f"{starts} {key!r} of shape {tuple(zeros.shape)}: its first axis must be the {DOCUMENT_GROUPS}"
                    " document groups"
                )
            if zeros.dtype not in SUMMABLE:
                raise CapacityError(f"{starts} {key!r} in {zeros.dtype}, which loses sums: make it torch.float64")
            if bool(zeros.any()):
                raise CapacityError(
                    f"{starts} {key!r} with numbers other than zero, which each shard would add again: make it zeros"
                )
            states[f"{estimator.name}/{key}"] = zeros
    return states


def accumulate(estimator: ImportanceEstimator, states: dict[str, Tensor], latents: LatentBatch) -> None:
    """Add active latents to an estimator's state, in place.

    Raises:
        CapacityError: where the estimator replaces a tensor of its state instead, or makes another.
        PluginError: where it fails.
    """
    prefix = f"{estimator.name}/"
    before = {key.removeprefix(prefix): tensor for key, tensor in states.items() if key.startswith(prefix)}
    state = dict(before)
    with plugin_code("importance estimator", estimator.name, estimator.update):
        estimator.update(state, latents)
    if any(state.get(key) is not tensor for key, tensor in before.items()):
        raise CapacityError(
            f"the importance estimator {estimator.name!r} replaces its state, so what it added is lost: add to the "
            "tensors in place"
        )
    if len(state) > len(before):
        made = next(key for key in state if key not in before)
        raise CapacityError(
            f"the importance estimator {estimator.name!r} adds {made!r} to its state in update, where it is lost: let"
            " start return it"
        )
