"""The sums of one SAE: their names and axes, how two sets of documents are added, and what makes them valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import MeasurementError
from tl_capacity.text.counting import MASK_REASONS

SUMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "counts": ("int64", ("group", "feature")),  # tokens on which the feature is active (z ≠ 0)
    "sums": ("float64", ("group", "feature")),  # Σ z
    "squares": ("float64", ("group", "feature")),  # Σ z²
    "tokens": ("int64", ("group",)),  # counted tokens
    "documents": ("int64", ("group",)),  # documents with a counted token
    "incidence": ("int64", ("feature",)),  # documents in which the feature is active
    "masked": ("int64", ("reason",)),  # tokens left out, by MASK_REASONS
    "counted_norm": ("float64", ("one",)),  # Σ‖x‖² over counted tokens
    "masked_norm": ("float64", ("one",)),  # Σ‖x‖² over masked tokens other than padding
    "fvu_tokens": ("int64", ("group",)),  # tokens on which the reconstruction was checked
    "residual": ("float64", ("group",)),  # Σ‖x − x̂‖² over those
    "energy": ("float64", ("group",)),  # Σ‖x‖² over those
    "mean_sum": ("float64", ("group", "width")),  # Σ x over those
    "decoder_norm": ("float64", ("feature",)),  # ‖w_dec,i‖, a property of the SAE and no sum
}
"""Every sum by name, with its type and axes. Estimators' own sums come beside these, named `state/estimator/key`."""
Sums = TypeVar("Sums", bound=Any)


def merge_sums(mine: Mapping[str, Sums], theirs: Mapping[str, Sums]) -> dict[str, Sums]:
    """The sums (arrays or tensors) of two disjoint sets of documents, added together.

    Raises:
        MeasurementError: where they are not of the same SAE and estimators.
    """
    if mine.keys() != theirs.keys():
        odd = ", ".join(sorted(mine.keys() ^ theirs.keys()))
        raise MeasurementError(
            f"the shards have different sums ({odd}): measure both with the same importance estimators"
        )
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise MeasurementError(
                f"{name} has shape {tuple(value.shape)} in one shard and {tuple(theirs[name].shape)} in the other: "
                "measure both with the same SAE"
            )
    if not bool((mine["decoder_norm"] == theirs["decoder_norm"]).all()):
        raise MeasurementError("the shards' decoder norms differ: measure both with the same SAE weights")
    return {name: value if name == "decoder_norm" else value + theirs[name] for name, value in mine.items()}


def check_sums(arrays: Mapping[str, NDArray[Any]], where: str) -> None:
    """Check that `arrays` are the complete sums of one SAE.

    Raises:
        MeasurementError: where one is missing, or its type or shape does not fit the others.
    """
    sizes: dict[str, int] = {"one": 1, "reason": len(MASK_REASONS)}
    for name, (dtype, axes) in SUMS.items():
        array = arrays.get(name)
        if array is None:
            raise MeasurementError(
                f"{where} lacks the statistics {name!r}: the measurement was altered, so measure again"
            )
        fits = array.ndim == len(axes) and all(
            sizes.setdefault(axis, size) == size for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != dtype:
            seen = f"{array.dtype}{list(array.shape)}"
            raise MeasurementError(
                f"{name!r} in {where} is {seen}, not {dtype}{list(axes)}: the measurement was altered, so measure again"
            )
        if not np.isfinite(array).all() or (dtype == "int64" and (array < 0).any()):
            raise MeasurementError(
                f"{name!r} in {where} has negative counts or non-finite sums: the measurement was altered, so "
                "measure again"
            )
    for name, array in arrays.items():
        if name.startswith("state/") and (array.shape[:1] != arrays["tokens"].shape or not np.isfinite(array).all()):
            raise MeasurementError(
                f"{name!r} in {where} has shape {list(array.shape)} or non-finite sums: the measurement was altered, "
                "so measure again"
            )
    if (arrays["counts"] > arrays["tokens"][:, None]).any() or (arrays["incidence"] > arrays["documents"].sum()).any():
        raise MeasurementError(
            f"{where} counts latents on more tokens or documents than it has: the measurement was altered, so "
            "measure again"
        )
