"""What a dictionary says of itself: the only place that asks an SAE anything but its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_capacity.errors import DictionaryError
from tl_capacity.interfaces import SparseAutoencoder

SAEs = SparseAutoencoder | Sequence[SparseAutoencoder] | Mapping[str, SparseAutoencoder | Sequence[SparseAutoencoder]]


def check_dictionary(sae: Any, hook: str) -> None:
    """Whether an SAE can be measured as it is.

    Raises:
        DictionaryError: training-time BatchTopK, unfolded activation normalisation, or no SAE at all.
    """
    _check_is_sae(sae)
    if "BatchTopKTraining" in type(sae).__name__:
        raise DictionaryError(
            f"{type(sae).__name__} at {hook} is a training-time BatchTopK, whose latents depend on the whole batch: "
            "save it and load it back, which makes it JumpReLU"
        )
    if type(sae).__name__ == "TemporalSAE":
        raise DictionaryError(
            f"the SAE at {hook} is a TemporalSAE, whose latents depend on the tokens before: choose one that encodes"
            " each token by itself"
        )
    normalisation = getattr(sae.cfg, "normalize_activations", "none")
    if normalisation in ("expected_average_only_in", "covariance_whitening"):
        fold = (
            "fold_activation_whitening"
            if normalisation == "covariance_whitening"
            else "fold_activation_norm_scaling_factor"
        )
        raise DictionaryError(
            f"the SAE at {hook} expects activations normalised by {normalisation!r}, which encode does not apply: fold"
            f" it in first with sae.{fold}(…)"
        )


def target_hook(sae: Any, hook: str) -> str | None:
    """The hook point that a transcoder writes to; None for an SAE, which reconstructs what it reads."""
    target = getattr(getattr(sae.cfg, "metadata", None), "hook_name_out", None)
    return str(target) if target and target != hook else None


@torch.no_grad()
def _decoder_norms(sae: Any, device: torch.device) -> Tensor:
    """float64 [feature]: the length of what each latent writes where it is 1."""
    norms = torch.ones(len(sae.W_dec), dtype=torch.float64, device=device)
    if not getattr(
        sae.cfg, "rescale_acts_by_decoder_norm", False
    ):  # where it is set, SAELens' decode divides by the norms
        # A few rows at a time and in place: a float64 copy of a wide decoder is larger than all else that is kept.
        for rows, place in zip(torch.split(sae.W_dec.detach().flatten(1), 64), torch.split(norms, 64), strict=True):
            torch.linalg.vector_norm(rows.to(device, torch.float64), dim=1, out=place)
    return norms


def dictionary_digest(sae: Any) -> str:
    """SHA-256 over an SAE's weights, in the order of their names."""
    named = (
        sae.state_dict()
        if hasattr(sae, "state_dict")
        else {k: v for k, v in vars(sae).items() if isinstance(v, Tensor)}
    )
    sha = hashlib.sha256()
    for name in sorted(named):
        values = named[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        sha.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def dictionary_name(sae: Any) -> str:
    """The name an SAE is known by: release and id where SAELens recorded them, else its kind and size."""
    metadata = getattr(sae.cfg, "metadata", None)
    release, sae_id = (
        (getattr(metadata, key, None) for key in ("sae_lens_release", "release")),
        getattr(metadata, "sae_id", None),
    )
    named = next((r for r in release if r), None)
    return f"{named}/{sae_id}" if named and sae_id else f"{type(sae).__name__} with {len(sae.W_dec):,} latents"


def hook_sae_pairs(saes: SAEs) -> Iterator[tuple[str, SparseAutoencoder]]:
    """`(hook point, SAE)` of everything that was passed."""
    if isinstance(saes, Mapping):
        for hook, several in saes.items():
            for sae in _several(several):
                yield hook, sae
    else:
        for sae in _several(saes):
            _check_is_sae(sae)
            yield _metadata_hook(sae), sae


def _check_is_sae(sae: Any) -> None:
    if isinstance(sae, str):
        raise DictionaryError(
            f"{sae!r} is no SAE but a name: load it, as with sae_lens.SAE.from_pretrained or"
            " tl_capacity.models.loading.load_sae"
        )
    if not isinstance(sae, SparseAutoencoder):
        raise DictionaryError(
            f"{type(sae).__name__} is no SAE: it needs encode, decode, W_dec and cfg, as SAELens' inference classes"
            " have"
        )


def _several(saes: Any) -> list[Any]:
    """One or several as a list; an SAE is iterable, so it is recognised before anything is iterated."""
    return [saes] if isinstance(saes, (SparseAutoencoder, str)) or not isinstance(saes, Iterable) else list(saes)


def _metadata_hook(sae: Any) -> str:
    hook = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "hook_name", None)
    if not hook:
        raise DictionaryError(
            f"this {type(sae).__name__} does not name its hook point: pass a mapping such as"
            " {'blocks.3.hook_resid_post': sae}"
        )
    return str(hook)
