"""Names into objects: models, SAEs and data sets, from plugins, local folders or a hub, whichever knows the name; and
into folders what other libraries save.

Whatever fails on the way comes out as one sentence. Nothing heavy is imported before it is needed, and nothing that
runs code from a download is ever loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, DictionaryError, TokenSourceError
from tl_capacity.interfaces import NamedModel, SparseAutoencoder
from tl_capacity.plugins import plugins
from tl_capacity.runtime.checks import checked
from tl_capacity.storage.files import make_folder, read_record

DTYPES = ("float32", "bfloat16", "float16", "float64")
PROBE_SECONDS = 5.0
FULL_BYTES = 2**16
"""A disk with less space than this counts as full."""
NEAR = 0.75
"""How alike two names are, as difflib has it, before one is offered for the other."""
LARGEST_TOKEN_ID = 2**31 - 1
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of SAELens that only its training classes have."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to run.

    Attributes:
        model: the Hugging Face model, in eval mode, with SDPA attention where its architecture has it.
        tokenizer: its tokenizer.
        name: as it was asked for.
        revision: what changes when the weights change: a hub commit, a SHA-256 of a folder's configuration and weights,
            or what its plugin says.
        named: the plugin's record where the name was a plugin's, with the SAEs and the corpus that belong to the model.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    named: NamedModel | None = None

    @property
    def corpus(self) -> str | None:
        """The token source that belongs to the model, if any."""
        return self.named.corpus if self.named else None

    @cached_property
    def bridge(self) -> Any:
        """A TransformerBridge around the model, without asking a hub anything; made once, since it rewrites the model
        in place.

        Raises:
            CapacityError: where TransformerLens cannot bridge the architecture.
        """
        from transformer_lens.model_bridge import TransformerBridge

        device = str(next(self.model.parameters()).device)
        try:
            return TransformerBridge.boot_transformers(
                self.name, hf_model=self.model, tokenizer=self.tokenizer, device=device
            )
        except (ValueError, KeyError, AttributeError, NotImplementedError) as problem:
            kind, reason = (
                self.model.config.model_type,
                reason_of(problem).partition(". ")[0],
            )  # it goes on to list all that it can
            known = plugins().family_of(kind) is not None
            what = (
                "tap a residual-stream hook instead"
                if known
                else "register a model family (docs/families.md), and tap a residual-stream hook"
            )
            raise CapacityError(f"TransformerLens cannot bridge {kind!r} ({reason}): {what}") from problem

    def source(self, given: str) -> str:
        """The token source that was given, or else the one that belongs to the model.

        Raises:
            TokenSourceError: where there is neither.
        """
        source = given or self.corpus
        if not source:
            raise TokenSourceError(
                f"no corpus belongs to {self.name!r}: name one with --source, such as a .txt or .jsonl file"
            )
        return source


@checked
def load_model(spec: str, *, device: str = "cpu", dtype: str = "float32") -> LoadedModel:
    """Load `spec`: a name that a plugin registered, else a folder written by `save_pretrained`, else a hub id.

    Raises:
        CapacityError: where nothing knows the name, or what it names is damaged, incomplete or no causal language
            model.
    """
    import torch

    if dtype not in DTYPES:
        raise CapacityError(f"{dtype!r} is no dtype to run a model in: choose one of {', '.join(DTYPES)}")
    _check_device(device)
    named = next((m for m in plugins().models if m.name == spec), None)
    if named is not None:
        try:
            model, tokenizer = named.load()
        except CapacityError:
            raise
        except Exception as problem:  # a plugin's code may raise anything
            origin, kind = plugins().models.origins[spec], type(problem).__name__
            raise CapacityError(
                f"the plugin {origin!r} fails to load its model {spec!r} ({kind}: {reason_of(problem)}): mend or"
                " uninstall it"
            ) from problem
        revision = named.revision
        # What is measured or distilled in a session names its model by this; the folder that a plugin reads is a place
        # on one machine.
        model.name_or_path = model.config.name_or_path = spec
    elif Path(spec).expanduser().is_dir():
        folder = Path(spec).expanduser()
        model, tokenizer = load_folder(folder, dtype)
        revision = folder_digest(folder)
    else:
        model, tokenizer = _load_from_hub(spec, dtype)
        revision = _cached_commit(spec)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    return LoadedModel(model, tokenizer, spec, revision, named)


@checked
def load_config(spec: str) -> Any:
    """The configuration of the model that `load_model` would load; weights are read only where a plugin cannot but load
    them.

    Raises:
        CapacityError: where nothing knows the name, or its configuration is damaged.
    """
    from transformers import AutoConfig

    if any(m.name == spec for m in plugins().models):
        return load_model(spec).model.config
    folder = Path(spec).expanduser()
    try:
        with _hub(needed=not folder.is_dir()):
            return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else spec, trust_remote_code=False)
    except loading_errors() as problem:
        raise CapacityError(
            f"the configuration of {spec!r} cannot be loaded ({reason_of(problem)}): pass a registered name, a folder"
            " or a hub id"
        ) from problem


def load_folder(folder: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """The causal language model and the tokenizer that `save_pretrained` wrote to `folder`.

    Raises:
        CapacityError: where files are missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise CapacityError(
            f"{folder} holds no config.json: pass a folder written by model.save_pretrained and"
            " tokenizer.save_pretrained"
        )
    if not any(folder.glob("*.safetensors")):
        raise CapacityError(
            f"{folder} holds no .safetensors file: write the model there with save_pretrained, which saves in that"
            " format"
        )
    try:
        return _pretrained(str(folder), dtype)
    except loading_errors() as problem:
        raise CapacityError(
            f"the model in {folder} cannot be loaded ({reason_of(problem)}): save it again with save_pretrained"
        ) from problem


def folder_digest(folder: Path) -> str:
    """SHA-256 over the configuration and the weights in a folder, read in pieces."""
    total = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Turn what other libraries raise while they save to `place`, where the disk is full or must not be written to,
    into the sentence of `storage.write_bytes`.

    Raises:
        CapacityError: from an OSError, or from what safetensors and torch make of one.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as problem:
        # Of a disk that is full, torch says only that its file has not the length that it should have.
        full = shutil.disk_usage(place.parent).free < FULL_BYTES
        reason = "No space left on device" if full else getattr(problem, "strerror", None) or reason_of(problem)
        raise CapacityError(
            f"{place} cannot be written ({reason}): free space or choose another folder; what was there before is whole"
        ) from problem


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to write to, which is `place` as soon as the block has ended and its files are on the disk, instead of
    what was there; if it fails, nothing was.

    A process that was killed meanwhile leaves it, and the next that writes to `place` begins it anew.

    Raises:
        CapacityError: where the disk is full or the folder cannot be written.
    """
    unfinished = place.with_name(f".writing-{place.name}")
    make_folder(place.parent)
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished)
    try:
        yield unfinished
        with written(place):
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
            if place.exists():
                shutil.rmtree(place)
            os.rename(unfinished, place)
            _sync(place.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_kept(path: Path) -> dict[str, Any]:
    """The JSON object that a recipe keeps beside its results.

    Raises:
        CapacityError: where it is damaged.
    """
    try:
        return read_record(path, 1)
    except CapacityError:
        raise
    except (ValueError, OSError, RecursionError) as problem:
        raise CapacityError(
            f"{path} is truncated or was altered ({problem}): delete the folder that it is in, or choose another --out"
        ) from problem


@checked
def load_sae(spec: str, device: str = "cpu") -> tuple[str, SparseAutoencoder]:
    """Load `spec` in float32: a folder that SAELens, `sparsify` or `dictionary_learning` saved, else `RELEASE/SAE_ID`
    of SAELens' directory, else `OWNER/REPOSITORY/SAE_ID` on the hub.

    Returns:
        the SAE's name for the record, and the SAE.

    Raises:
        DictionaryError: where there is no such SAE, or its files are damaged.
    """
    _check_device(device)
    if not spec.strip():
        raise DictionaryError("no SAE is named: pass a folder, RELEASE/SAE_ID or OWNER/REPOSITORY/SAE_ID")
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return spec, _load_sae_folder(folder, device)

    if not _sae_lens_works():
        raise DictionaryError(
            f"{spec!r} is no folder, and SAELens, which knows SAEs by name, is not installed for this TransformerLens:"
            " pass a folder"
        )
    from sae_lens import SAE

    release, sae_id = _release_and_id(spec)
    try:
        with _hub():
            return spec, _described(SAE.from_pretrained(release, sae_id, device=device))
    except loading_errors() as problem:
        raise DictionaryError(
            f"the SAE {sae_id!r} of {release!r} cannot be loaded ({reason_of(problem)}): check the name and the"
            " network, or pass a folder that SAELens saved"
        ) from problem


def load_dataset_rows(spec: str) -> Iterator[dict[str, Any]]:
    """Stream the rows of `spec`: a local folder of data files, or a `datasets` id `OWNER/NAME` or `OWNER/NAME/CONFIG`;
    `:SPLIT` chooses a split.

    Raises:
        TokenSourceError: where there is no such data set or split, or a file cannot be read.
    """
    import datasets

    name, split = spec, "train"
    if not Path(spec).is_dir() and ":" in spec:
        name, _, split = spec.rpartition(":")
    local = Path(name).is_dir()
    path, config = name, None
    if not local and name.count("/") == 2:
        path, _, config = name.rpartition("/")
    try:
        with _hub(needed=not local):
            rows = datasets.load_dataset(path, config, split=split or "train", streaming=True)
        yield from rows
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, datasets.exceptions.DatasetsError) as problem:
        raise TokenSourceError(
            f"the data set {spec!r} cannot be read ({reason_of(problem)}): check its name and its files, or pass a"
            " local file (.txt, .jsonl, .parquet), a folder of such files, or an embedded corpus"
        ) from problem


def _load_from_hub(spec: str, dtype: str) -> tuple[Any, Any]:
    names = [m.name for m in plugins().models]
    near = get_close_matches(spec, names, n=1)
    meant = f"did you mean {near[0]!r}, " if near else f"use {', '.join(map(repr, names)) or 'a model of a plugin'} "
    local = f"{meant}or a folder written by save_pretrained{'?' if near else ''}"
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or not spec.strip():
        raise CapacityError(f"there is no folder {spec!r}, and it is no hub id: {local}")
    try:
        with _hub():
            return _pretrained(spec, dtype)
    except loading_errors() as problem:
        raise CapacityError(f"the model {spec!r} cannot be loaded ({reason_of(problem)}): {local}") from problem


def _cached_commit(spec: str) -> str | None:
    """The commit that the hub's cache holds as the main branch: the one just loaded."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(spec, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def _pretrained(source: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its annotation leaves the loading information out
    model, found = from_pretrained(
        source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random weights in their place
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as problem:
        if type(problem) is not Exception:  # all that the tokenizers library raises on a damaged file
            raise
        raise ValueError(f"its tokenizer is damaged: {problem}") from problem
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where the files are missing
        raise ValueError("its tokenizer is missing or has no vocabulary")
    _check_token_ids(model.config, tokenizer)
    return model, tokenizer


def _check_token_ids(config: Any, tokenizer: Any) -> None:
    """Refuse what transformers loads as it stands and stumbles over later."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        for token in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
            if isinstance(token, bool) or not isinstance(token, int) or abs(token) > LARGEST_TOKEN_ID:
                raise ValueError(f"its {name} = {token!r} is no token id")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ValueError(f"its tokenizer's model_max_length = {longest!r} is no number")


def _load_sae_folder(folder: Path, device: str) -> SparseAutoencoder:
    """The dictionary in a folder, by whichever trainer's files lie in it."""
    from tl_capacity.dictionaries import formats as dictionaries

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
            try:
                sae: SparseAutoencoder = read(folder).to(device)
                return sae
            except DictionaryError:
                raise
            except loading_errors() as problem:
                raise DictionaryError(
                    f"the SAE in {folder} cannot be loaded ({reason_of(problem)}): save it again with {trainer}"
                ) from problem
    if not (folder / "cfg.json").is_file():
        raise DictionaryError(
            f"{folder} holds no cfg.json: pass a folder that SAELens saved, with cfg.json and"
            f" {dictionaries.SAE_LENS_WEIGHTS} in it"
        )
    raise DictionaryError(f"{folder} holds no {dictionaries.SAE_LENS_WEIGHTS}: pass a folder that SAELens saved")


def _read_sae_lens(folder: Path) -> Any:
    from tl_capacity.dictionaries import formats as dictionaries

    architecture = dictionaries.read_json(folder / "cfg.json").get("architecture")
    if architecture in TRAINING_ONLY:
        raise DictionaryError(
            f"the SAE in {folder} is a training-time {architecture}, whose latents depend on the whole batch: save it"
            " with save_inference_model, which makes it JumpReLU"
        )
    if not _sae_lens_works():
        return dictionaries.read_sae_lens(folder)
    from sae_lens import SAE

    return _described(SAE.load_from_disk(folder, dtype="float32"))


def _described(sae: Any) -> Any:
    """An SAE of SAELens' as it is, where its configuration can be relied on."""
    from tl_capacity.dictionaries.formats import check_described

    check_described(vars(sae.cfg), vars(sae.cfg.metadata))
    return sae


def _sae_lens_works() -> bool:
    """Whether SAELens can be imported: beside TransformerLens 4 it cannot, whether it is installed or not."""
    try:
        importlib.import_module("sae_lens")
    except ImportError:
        return False
    return True


def _release_and_id(spec: str) -> tuple[str, str]:
    """The release and the SAE id that `spec` names, checked against SAELens' directory of releases."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    release, _, sae_id = spec.partition("/")
    if release in directory:
        ids = directory[release].saes_map
        if sae_id in ids:
            return release, sae_id
        near = get_close_matches(sae_id, ids, n=3, cutoff=0.0)
        raise DictionaryError(
            f"the release {release!r} has no SAE {sae_id!r}: the nearest of its {len(ids)} are {', '.join(near)}"
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


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise CapacityError(
            f"the device {device!r} cannot be used ({reason_of(problem)}): pass cpu, or a device that torch reports"
        ) from problem


@contextmanager
def _hub(needed: bool = True) -> Iterator[None]:
    """Ask the hub once whether it is there; if not, use its cache alone until the block ends.

    Without a network its clients retry five times for each file, half a minute in all, before they look into the cache.
    """
    from huggingface_hub import constants

    if not needed or constants.is_offline_mode() or _hub_answers():
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the HTTP client's own classes; whatever it is, no answer came
        return False
    return True


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers, SAELens and safetensors raise on missing, damaged or unfitting files."""
    from pickle import UnpicklingError
    from struct import error as StructError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        StrictDataclassError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
        ImportError,
        EOFError,
        SafetensorError,
        StructError,  # of a few bytes where a pickle begins
        UnpicklingError,
    )


def reason_of(problem: BaseException) -> str:
    """Why something failed, in a few words to stand inside a sentence."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, ConnectionError)):
            return "no hub can be reached and the local cache does not have it"
        cause = cause.__cause__ or cause.__context__
    if isinstance(problem, KeyError):
        return f"{problem} is missing"
    line = " ".join((str(problem).strip() or type(problem).__name__).splitlines()[0].split()).rstrip(".:")
    return line if len(line) <= 200 else f"{line[:199]}…"
