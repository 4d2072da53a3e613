"""SAEs by name: a folder of any trainer, a release in SAELens' directory, or a repository of the hub."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tl_capacity.dictionaries.configurations import with_activation
from tl_capacity.errors import DictionaryError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.devices import device_named
from tl_capacity.runtime.hub import hub_or_cache, loading_errors, reason_of

NEAR = 0.75
"""How alike two names must be, as difflib measures it, for one to be suggested for the other."""
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
"""Architectures that only SAELens' training classes have."""


@checked
def load_sae(spec: str, device: str = "cpu") -> tuple[str, SparseAutoencoder]:
    """The SAE that `spec` names, in float32. `spec` is a folder saved by SAELens, `sparsify` or `dictionary_learning`,
    a file of `circuit-tracer` or of the paper, `RELEASE/SAE_ID` of SAELens' directory, or `OWNER/REPOSITORY/SAE_ID` of
    any of these trainers on the hub.

    Returns:
        the SAE's name for the record, and the SAE.

    Raises:
        DictionaryError: where there is no such SAE, or its files are damaged.
    """
    device = device_named(device)
    if not spec.strip():
        raise DictionaryError("no SAE is named: pass a folder, RELEASE/SAE_ID or OWNER/REPOSITORY/SAE_ID")
    from tl_capacity.dictionaries import paper

    folder = Path(spec).expanduser()
    if folder.is_dir():
        return spec, _load_sae_folder(folder, device)
    if folder.is_file() and folder.suffix in paper.SUFFIXES:
        return spec, _read(folder, "the paper's training script", paper.read_paper_sae, device)
    if folder.is_file() and folder.suffix == ".safetensors":
        from tl_capacity.dictionaries import transcoders

        return spec, _read(folder, "circuit-tracer", transcoders.read_transcoder, device)

    if not sae_lens_works():
        raise DictionaryError(
            f"there is no folder {spec!r}, and SAELens, which finds SAEs by name, is not installed for this "
            "TransformerLens: pass a folder"
        )
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS, get_conversion_loader_name

    release, sae_id = _release_and_id(spec)
    _refuse_cross_layer(release, sae_id)
    try:
        with hub_or_cache(), _own_account_is_read():
            converter = with_activation(NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(release)])
            return spec, _described(SAE.from_pretrained(release, sae_id, device=device, converter=converter))
    except DictionaryError:
        raise
    except loading_errors() as problem:
        if (downloaded := _of_another_trainer(release, sae_id)) is not None:
            return spec, load_sae(str(downloaded), device)[1]
        raise DictionaryError(
            f"the SAE {sae_id!r} of {release!r} cannot be loaded ({reason_of(problem)}): check the name and the"
            " network, or pass a folder that SAELens saved"
        ) from problem


def _load_sae_folder(folder: Path, device: str) -> SparseAutoencoder:
    """The dictionary in a folder. The files in it tell which trainer saved it."""
    from tl_capacity.dictionaries import formats as dictionaries
    from tl_capacity.dictionaries import transcoders

    formats: dict[tuple[str, str], tuple[str, Callable[[Path], Any]]] = {
        ("cfg.json", dictionaries.SPARSIFY_WEIGHTS): ("sparsify", dictionaries.read_sparsify),
        ("config.json", dictionaries.DICTIONARY_LEARNING_WEIGHTS): (
            "dictionary_learning",
            dictionaries.read_dictionary_learning,
        ),
        ("cfg.json", dictionaries.SAE_LENS_WEIGHTS): ("SAELens", _read_sae_lens),
    }
    for names, (trainer, read) in formats.items():
        if all((folder / name).is_file() for name in names):
            return _read(folder, trainer, read, device)
    transcoders.refuse_folder(folder)
    if not (folder / "cfg.json").is_file():
        raise DictionaryError(
            f"{folder} holds no cfg.json: pass a folder that SAELens saved, with cfg.json and"
            f" {dictionaries.SAE_LENS_WEIGHTS} in it"
        )
    raise DictionaryError(f"{folder} holds no {dictionaries.SAE_LENS_WEIGHTS}: pass a folder that SAELens saved")


def _read(path: Path, trainer: str, read: Callable[[Path], Any], device: str) -> SparseAutoencoder:
    """What a function reads from a trainer's files. Any failure but a lack of memory becomes one sentence."""
    from torch import OutOfMemoryError

    try:
        sae: SparseAutoencoder = read(path).to(device)
        return sae
    except (DictionaryError, OutOfMemoryError):
        raise
    except loading_errors() as problem:
        raise DictionaryError(
            f"the SAE in {path} cannot be loaded ({reason_of(problem)}): save it again with {trainer}"
        ) from problem


def _read_sae_lens(folder: Path) -> Any:
    from tl_capacity.dictionaries import formats as dictionaries

    architecture = dictionaries.read_json(folder / "cfg.json").get("architecture")
    if architecture in TRAINING_ONLY:
        raise DictionaryError(
            f"the SAE in {folder} is a training-time {architecture}, whose latents depend on the whole batch: save it"
            " with save_inference_model, which makes it JumpReLU"
        )
    if not sae_lens_works():
        return dictionaries.read_sae_lens(folder)
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    with _own_account_is_read():
        return _described(SAE.load_from_disk(folder, dtype="float32", converter=with_activation(sae_lens_disk_loader)))


@contextmanager
def _own_account_is_read() -> Iterator[None]:
    """Silence SAELens' advice on how to load the model. `reading_of` looks at the actual model instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs", UserWarning)
        yield


def _described(sae: Any) -> Any:
    """An SAE of SAELens, unchanged, once its configuration is checked."""
    from tl_capacity.dictionaries.formats import check_described

    check_described(vars(sae.cfg), vars(sae.cfg.metadata))
    return sae


def sae_lens_works() -> bool:
    """Whether SAELens can be imported. Beside TransformerLens 4 it cannot, even if it is installed."""
    try:
        importlib.import_module("sae_lens")
    except ImportError:
        return False
    return True


def _of_another_trainer(repository: str, name: str) -> Path | None:
    """The SAE that a hub repository holds under a name that SAELens does not find: a folder of another trainer, or a
    file of circuit-tracer or the paper. None if it holds neither.
    """
    from huggingface_hub import hf_hub_download

    from tl_capacity.dictionaries import formats, paper, transcoders

    candidates: tuple[tuple[str, str | None], ...] = (
        (f"{name}/{formats.SPARSIFY_WEIGHTS}", f"{name}/cfg.json"),
        (f"{name}/{formats.DICTIONARY_LEARNING_WEIGHTS}", f"{name}/config.json"),
        (name, None if name.endswith(paper.SUFFIXES) else str(Path(name).with_name(transcoders.CONFIG))),
    )
    if repository.count("/") != 1:
        return None
    with hub_or_cache():
        for weights, config in candidates:
            if not weights.endswith((".safetensors", *paper.SUFFIXES)):
                continue
            try:
                if config is not None:
                    hf_hub_download(repository, config)
                path = Path(hf_hub_download(repository, weights))
            except loading_errors():
                continue
            return path if weights == name else path.parent
    return None


def _refuse_cross_layer(release: str, sae_id: str) -> None:
    """Refuse a layer of a cross-layer transcoder. SAELens would add up its decoders as if they wrote to one layer."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from tl_capacity.dictionaries.transcoders import cross_layer

    known = get_pretrained_saes_directory().get(release)
    path = known.saes_map[sae_id] if known else sae_id
    words = re.split(r"[^a-z0-9]+", f"{release}/{path}".lower())
    if "clt" in words or (known and known.conversion_func == "mntss_clt_layer_transcoder"):
        raise DictionaryError(cross_layer(f"{release}/{sae_id}"))


def _release_and_id(spec: str) -> tuple[str, str]:
    """The release and SAE id that `spec` names, checked against SAELens' directory."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    release, _, sae_id = spec.partition("/")
    if release in directory:
        ids = directory[release].saes_map
        if sae_id in ids:
            return release, sae_id
        near = get_close_matches(sae_id, ids, n=3, cutoff=0.0)
        raise DictionaryError(
            f"the release {release!r} has no SAE {sae_id!r}: choose one of its {len(ids):,}, of which the nearest are "
            f"{', '.join(near)}"
        )
    if spec.count("/") >= 2 and not spec.startswith((".", "/", "~")):
        owner, repository, sae_id = spec.split("/", 2)
        return f"{owner}/{repository}", sae_id
    near = get_close_matches(release, directory, n=3, cutoff=NEAR)
    if not sae_id or spec.startswith((".", "/", "~")):
        meant = f", or RELEASE/SAE_ID of one of the nearest releases, {', '.join(near)}" if near else ""
        raise DictionaryError(f"there is no folder {spec!r}: pass one that SAELens saved{meant}")
    use = (
        f"use one of the nearest releases, {', '.join(near)}"
        if near
        else "look the name up in SAELens' directory of releases"
    )
    raise DictionaryError(
        f"{spec!r} is neither a folder nor RELEASE/SAE_ID of a release that SAELens knows: pass a folder that SAELens"
        f" saved, or {use}"
    )
