"""What a dictionary says of itself. Only this module asks an SAE anything but its latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from tl_capacity.dictionaries.transcoders import cross_layer
from tl_capacity.errors import DictionaryError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.storage.digests import tensors_digest

OneSAE = SparseAutoencoder | str | Path
SAEs = OneSAE | Sequence[OneSAE] | Mapping[str, OneSAE | Sequence[OneSAE]]
"""SAEs as they are passed: in memory or by name, one or several, with or without their hook points."""


def check_dictionary(sae: Any, hook: str) -> None:
    """Check that an SAE can be measured as it is.

    Raises:
        DictionaryError: training-time BatchTopK, unfolded activation normalisation, or no SAE at all.
    """
    _check_is_sae(sae)
    if "BatchTopKTraining" in type(sae).__name__:
        raise DictionaryError(
            f"{type(sae).__name__} at {hook} is a training-time BatchTopK, whose latents depend on the whole batch: "
            "save it and load it again, which makes it JumpReLU"
        )
    if type(sae).__name__ == "TemporalSAE":
        raise DictionaryError(
            f"the SAE at {hook} is a TemporalSAE, whose latents depend on earlier tokens: choose an SAE that encodes "
            "each token by itself"
        )
    # All that SAELens keeps of which release it loaded.
    if "clt" in str(metadata_of(sae, "neuronpedia_id") or "").lower().split("-"):
        raise DictionaryError(cross_layer(f"the transcoder at {hook}"))
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


class NamedDictionary(NamedTuple):
    """An SAE, where it is tapped, and the name it is known by."""

    hook: str
    name: str
    sae: Any


def metadata_of(sae: Any, name: str) -> Any:
    """The value of a name in an SAE's metadata; None if the metadata lacks it."""
    return getattr(getattr(getattr(sae, "cfg", None), "metadata", None), name, None)


def neuronpedia_id_of(sae: Any) -> str | None:
    """The id under which Neuronpedia shows an SAE's features, such as `gpt2-small/8-res-jb`; None if its metadata has
    none.
    """
    named = metadata_of(sae, "neuronpedia_id")
    return named if isinstance(named, str) and named else None


def read_hook(sae: Any) -> str | None:
    """The hook point that an SAE was trained to read, according to its metadata."""
    return _trained_hook(sae, "hook_name")


def target_hook(sae: Any, hook: str) -> str | None:
    """The hook point that a transcoder writes to; None for an SAE, which reconstructs what it reads."""
    target = _trained_hook(sae, "hook_name_out")
    return target if target and target not in (hook, read_hook(sae)) else None


def _trained_hook(sae: Any, name: str) -> str | None:
    hook, module = metadata_of(sae, name), str(metadata_of(sae, f"hf_{name}") or "")
    if not hook:
        return None
    # SAELens calls what Gemma Scope 2's transcoders read `hook_mlp_in`, which in TransformerLens is the stream before
    # the norm; the files name the norm's output.
    if module.endswith("norm.output") and str(hook).endswith(".hook_mlp_in"):
        return str(hook).removesuffix("hook_mlp_in") + "mlp.hook_in"
    return str(hook)


def architecture_of(sae: Any) -> str:
    """SAELens' name for the kind of an SAE, or the name of its class."""
    architecture = getattr(sae.cfg, "architecture", None)
    return str(architecture() if callable(architecture) else architecture or type(sae).__name__)


def joins_heads(sae: Any) -> bool:
    """Whether an SAE of an attention layer takes separate heads and joins them itself."""
    return bool(getattr(sae, "hook_z_reshaping_mode", False))


def inputs_for(sae: Any, activations: Tensor) -> Tensor:
    """Activations [token, ...] as the SAE's `encode` takes them: [token, d_in], or separate heads if the SAE joins them
    itself.
    """
    if not joins_heads(sae):
        return activations.flatten(1)
    # Once SAELens has taken an SAE away from a bridge, its heads come joined there; joining one head changes nothing.
    return activations if activations.ndim > 2 else activations[:, None]


def decoder_vectors(sae: Any) -> Float[Tensor, "feature width"]:
    """What each latent writes if its value is 1."""
    vectors: Tensor = sae.W_dec.detach().flatten(1)
    return vectors


def decoder_bias(sae: Any) -> Float[Tensor, " width"] | None:
    """What an SAE writes if no latent is active; None without such a bias."""
    bias = getattr(sae, "b_dec", None)
    return None if bias is None else bias.detach().flatten()


def with_skip(sae: Any, written: Float[Tensor, "token width"], inputs: Tensor) -> Float[Tensor, "token width"]:
    """What a transcoder writes, with its skip connection added. SAELens adds it in `forward` and not in `decode`."""
    skip = getattr(sae, "W_skip", None)
    return written if skip is None else written + inputs.to(skip.dtype) @ skip.detach().T


@contextmanager
def unhooked(sae: Any) -> Iterator[None]:
    """Inside the block, the SAE's own hook points call nobody. In a model that carries the SAE they belong to the
    model's run.
    """
    points = dict(getattr(sae, "hook_dict", {}))
    for name in points:
        setattr(sae, name, nn.Identity())
    try:
        yield
    finally:
        for name, point in points.items():
            setattr(sae, name, point)


def divides_by_decoder_norms(sae: Any) -> bool:
    """Whether `decode` divides each latent by the norm of its decoder vector. This is an option of SAELens."""
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


@torch.no_grad()
def decoder_norms(sae: Any, device: torch.device) -> Float64[Tensor, " feature"]:
    """The length of each latent's decoder vector; zero for latents that write nothing."""
    norms = torch.empty(len(sae.W_dec), dtype=torch.float64, device=device)
    # A few rows at a time and in place: a float64 copy of a wide decoder is larger than all else that is kept.
    for rows, place in zip(torch.split(decoder_vectors(sae), 64), torch.split(norms, 64), strict=True):
        torch.linalg.vector_norm(rows.to(device).double(), dim=1, out=place)
    return norms.sign() if divides_by_decoder_norms(sae) else norms


@torch.no_grad()
def decoder_scale(sae: Any) -> Float[Tensor, " feature"] | None:
    """The factor by which `decode` multiplies each latent before it adds up decoder vectors; None without one.

    A decoder vector of norm 0 has the scale 0. SAELens divides by its norm, and what it writes is NaN for every token.
    """
    if not divides_by_decoder_norms(sae):
        return None
    norms = decoder_vectors(sae).norm(dim=1)
    return torch.where(norms > 0, 1 / norms, 0.0)


@torch.no_grad()
def dead_latents(sae: Any) -> Bool[Tensor, " feature"] | None:
    """The latents with a decoder vector of zero, which write nothing; None if there are none."""
    dead: Tensor = torch.linalg.vector_norm(decoder_vectors(sae), ord=torch.inf, dim=1) == 0
    return dead if bool(dead.any()) else None


def dictionary_digest(sae: Any) -> str:
    """SHA-256 of an SAE's weights, in the order of their names."""
    named = (
        sae.state_dict()
        if hasattr(sae, "state_dict")
        else {k: v for k, v in vars(sae).items() if isinstance(v, Tensor)}
    )
    return tensors_digest(named)


def dictionary_name(sae: Any) -> str:
    """The name of an SAE: release and id if SAELens recorded them, else its kind and size."""
    release = metadata_of(sae, "sae_lens_release") or metadata_of(sae, "release")
    sae_id = metadata_of(sae, "sae_id")
    return f"{release}/{sae_id}" if release and sae_id else f"{type(sae).__name__} with {len(sae.W_dec):,} latents"


def given_dictionaries(saes: SAEs) -> Iterator[tuple[str | None, Any]]:
    """Every dictionary that was passed, one after the other, each with the hook point it was passed for, if any."""
    at = saes.items() if isinstance(saes, Mapping) else [(None, saes)]
    yield from ((hook, sae) for hook, several in at for sae in _several(several))


def named_dictionaries(saes: SAEs) -> Iterator[NamedDictionary]:
    """Every SAE that was passed, with its hook point and name. All must be in memory.

    Raises:
        DictionaryError: where something is no SAE, or an SAE does not name its hook point.
    """
    yield from (named_dictionary(hook, sae) for hook, sae in given_dictionaries(saes))


def named_dictionary(hook: str | None, sae: Any) -> NamedDictionary:
    """An SAE with its hook point, by default its own, and its name.

    Raises:
        DictionaryError: where it is no SAE, or names no hook point.
    """
    _check_is_sae(sae)
    return NamedDictionary(_metadata_hook(sae) if hook is None else hook, dictionary_name(sae), sae)


def _check_is_sae(sae: Any) -> None:
    if isinstance(sae, str):
        raise DictionaryError(
            f"{sae!r} is a name, not an SAE: load it first, as with sae_lens.SAE.from_pretrained or "
            "tl_capacity.load_sae"
        )
    if not isinstance(sae, SparseAutoencoder):
        raise DictionaryError(
            f"{type(sae).__name__} is not an SAE: it needs encode, decode, W_dec and cfg, as SAELens' inference "
            "classes have"
        )


def _several(saes: Any) -> list[Any]:
    """One or several dictionaries as a list. An SAE is iterable, so it is recognised before anything is iterated."""
    return [saes] if isinstance(saes, (SparseAutoencoder, str)) or not isinstance(saes, Iterable) else list(saes)


def _metadata_hook(sae: Any) -> str:
    hook = read_hook(sae)
    if not hook:
        raise DictionaryError(
            f"this {type(sae).__name__} does not name its hook point: pass a mapping such as"
            " {'blocks.3.hook_resid_post': sae}"
        )
    return hook
