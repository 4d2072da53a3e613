"""Configurations of SAELens, of any version, under the names of version 6."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tl_capacity.errors import DictionaryError

RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Names that versions before 6 had."""
SCALING = ("scaling_factor", "finetuning_scaling_factor")
"""The name of the factors in a weights file, and the name that SAELens gives them."""


def up_to_date(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration under the names of SAELens 6.

    Before version 6 an activation function stood beside the architecture, so that a `standard` SAE with `topk` is a
    TopK SAE. What is now metadata stood beside everything else.

    Raises:
        DictionaryError: where the activation is one that SAELens 6 does not have, and takes for ReLU.
        ValueError: where k is missing.
    """
    known = {RENAMED.get(name, name): value for name, value in config.items()}
    known["architecture"] = known.get("architecture") or "standard"
    activation = known.get("activation_fn") or "relu"
    if activation == "topk":
        arguments = known.get("activation_fn_kwargs")
        k = known.get("k") if not isinstance(arguments, Mapping) else arguments.get("k", known.get("k"))
        if k is None:
            raise ValueError("activation_fn is topk, and activation_fn_kwargs has no k")
        known |= {"architecture": "topk", "k": k, "activation_fn_kwargs": {"k": k}}
    elif activation != "relu":
        raise DictionaryError(
            f"the SAE's activation function {activation!r} is no longer in SAELens, which would use ReLU instead: "
            "choose another SAE"
        )
    normalisation = known.get("normalize_activations")
    if normalisation is None or isinstance(normalisation, bool):
        known["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    if "metadata" not in known:
        known["metadata"] = {"prepend_bos": True, **known}
        if "hook_z" in str(known.get("hook_name", "")):
            known.setdefault("reshape_activations", "hook_z")
    return known


def without_scaling(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights without the factors by which versions before 6 multiplied latents after finetuning, if all factors are 1.

    Raises:
        DictionaryError: where one is not.
    """
    kept = {name: value for name, value in weights.items() if name not in SCALING}
    if any(bool((weights[name] != 1).any()) for name in SCALING if name in weights):
        raise DictionaryError(
            "the SAE has a scaling_factor from finetuning, which SAELens no longer applies to latents: choose "
            "another SAE"
        )
    return kept


def with_activation(load: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A loader of SAELens that obeys the activation named in a configuration, whatever its version.

    Args:
        load: returns a configuration, weights, and whatever else.

    The loader raises what `up_to_date` and `without_scaling` do.
    """

    def loaded(*args: Any, **options: Any) -> tuple[Any, ...]:
        config, weights, *rest = load(*args, **options)
        known = up_to_date(config)
        activation = {name: known[name] for name in ("architecture", "k", "activation_fn_kwargs") if name in known}
        return ({**config, **activation}, without_scaling(weights), *rest)

    return loaded
