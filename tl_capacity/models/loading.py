"""Models and tokenizers by name: from plugins, local folders or a hub.

Whatever fails on the way comes out as one sentence. Nothing heavy is imported before it is needed, and nothing that
runs code from a download is ever loaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, TokenSourceError
from tl_capacity.interfaces import NamedModel
from tl_capacity.plugins import plugins
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.devices import AUTO, device_named, exact_device
from tl_capacity.runtime.hub import UNREACHABLE, hub_or_cache, loading_errors, reason_of
from tl_capacity.runtime.out_of_memory import within_device_memory
from tl_capacity.storage.digests import files_digest

DTYPES = ("float32", "bfloat16", "float16", "float64")
FEW_TOKENS = 8
"""Tokens on which a bridge's logits are compared with those of the model that it is made of."""
SAME_LOGITS, SAME_HALF_LOGITS = 0.01, 0.1
"""Largest difference of the two that is rounding, as a share of the largest logit, in float32 and in half precision."""
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Accelerate's ways to spread a model over devices."""
LARGEST_TOKEN_ID = 2**31 - 1


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
        """A TransformerBridge around the model, made without asking a hub. It is made once, because it rewrites the
        model in place. Its tokenizer is a copy, because TransformerLens adds special tokens to it.

        Raises:
            CapacityError: where TransformerLens cannot bridge the architecture, or its bridge computes something else.
        """
        from torch import OutOfMemoryError
        from transformer_lens.model_bridge import TransformerBridge

        from tl_capacity.models.sharding import is_spread

        if is_spread(self.model):
            raise CapacityError(
                f"{self.name!r} is spread over processes, which TransformerLens' bridge does not support: tap "
                "residual-stream hooks, or leave out --shard-model"
            )
        if hasattr(self.model, "hf_device_map"):
            raise CapacityError(
                f"{self.name!r} is spread over devices by a device map, which TransformerLens' bridge does not "
                "support: tap residual-stream hooks, or leave out --device-map"
            )
        kind = self.model.config.model_type
        instead = (
            "tap a residual-stream hook instead"
            if plugins().family_of(kind) is not None
            else "register a model family (docs/families.md), and tap a residual-stream hook"
        )
        few, own = _few_logits(self.model)
        try:
            bridge = TransformerBridge.boot_transformers(
                self.name, hf_model=self.model, tokenizer=deepcopy(self.tokenizer), device=str(few.device)
            )
            off = _difference(bridge, few, own)
        except OutOfMemoryError:
            raise
        except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as problem:
            reason = reason_of(problem).partition(". ")[0]  # it goes on to list all that it can
            raise CapacityError(f"TransformerLens cannot bridge {kind!r} ({reason}): {instead}") from problem
        if not off <= (SAME_HALF_LOGITS if own.dtype.itemsize < 4 else SAME_LOGITS):
            raise CapacityError(
                f"TransformerLens' bridge of {kind!r} is not the same model, as its logits are off by {off:.0%} of the"
                f" largest: {instead}"
            )
        return bridge

    def source(self, given: str) -> str:
        """The token source that was given, or else the model's own.

        Raises:
            TokenSourceError: where there is neither.
        """
        source = given or self.corpus
        if not source:
            raise TokenSourceError(
                f"{self.name!r} comes with no text: name some with --source, such as a .txt or .jsonl file"
            )
        return source


@checked
def load_model(
    spec: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> LoadedModel:
    """The model that `spec` names: a name that a plugin registered, else a folder written by `save_pretrained`, else a
    hub id.

    Args:
        device: where it runs; `auto` for the first of CUDA, MPS and CPU that there is.
        dtype: of its weights.
        revision: branch, tag or commit of a hub id, such as `step3000` of a Pythia.
        device_map: spreads the model over devices, and over CPU memory and disk where it does not fit, in place of
            `device`: `auto` or another strategy of Accelerate's, a mapping from modules to devices, or a JSON file of
            one.

    Raises:
        CapacityError: where nothing knows the name, or what it names is damaged, incomplete or no causal language
            model.
    """
    import torch

    if dtype not in DTYPES:
        raise CapacityError(f"{dtype!r} is not a dtype for running a model: choose one of {', '.join(DTYPES)}")
    device = device_named(device)
    if dtype == "float64" and exact_device(torch.device(device)) != torch.device(device):
        raise CapacityError(f"the device {device!r} has no float64: choose another --dtype, or --device cpu")
    named = next((m for m in plugins().models if m.name == spec), None)
    in_folder = named is None and Path(spec).expanduser().is_dir()
    if revision is not None and (named is not None or in_folder):
        raise CapacityError(
            f"{spec!r} is {'a plugin' if named else 'a folder'}'s model, not a hub id, so it has no revision "
            f"{revision!r}: leave out --revision"
        )
    if device_map is not None and named is not None:
        raise CapacityError(
            f"the plugin's model {spec!r} is placed on devices by its plugin: leave out --device-map, or save the "
            "model to a folder and pass that"
        )
    placed = _device_map(device_map)
    if named is not None:
        try:
            model, tokenizer = named.load()
            # What is measured or distilled in a session names its model by this; the folder that a plugin reads is a
            # place on one machine.
            model.name_or_path = model.config.name_or_path = spec
        except CapacityError:
            raise
        except Exception as problem:  # a plugin's code may raise anything
            origin, kind = plugins().models.origins[spec], type(problem).__name__
            raise CapacityError(
                f"the plugin {origin!r} fails to load its model {spec!r} ({kind}: {reason_of(problem)}): fix or "
                "uninstall it"
            ) from problem
        revision = named.revision
    elif in_folder:
        folder = Path(spec).expanduser()
        model, tokenizer = load_folder(folder, dtype, placed)
        revision = folder_digest(folder)
    else:
        model, tokenizer = _load_from_hub(spec, dtype, placed, revision)
        revision = _cached_commit(spec, revision)
    with within_device_memory(f"the model {spec!r} in {dtype}", "choose a smaller --dtype or another --device"):
        model = model if placed is not None else model.to(device=device, dtype=getattr(torch, dtype))
    model = model.eval()
    return LoadedModel(model, tokenizer, spec, revision, named)


def load_measured_model(name: str, revision: str | None, *, device: str = AUTO, dtype: str = "float32") -> LoadedModel:
    """The model that a result names. A hub id is loaded at the very commit that was measured.

    Raises:
        CapacityError: as `load_model`.
    """
    return load_model(name, device=device, dtype=dtype, revision=hub_revision(name, revision))


def hub_revision(name: str, revision: str | None) -> str | None:
    """A model's recorded revision, if it can be asked for, which only a hub id's can."""
    of_hub = not any(m.name == name for m in plugins().models) and not Path(name).expanduser().is_dir()
    return revision if of_hub else None


@checked
def load_config(spec: str, revision: str | None = None) -> Any:
    """The configuration of the model that `load_model` would load. Weights are read only if a plugin loads nothing
    without them.

    Raises:
        CapacityError: where nothing knows the name, or its configuration is damaged.
    """
    from transformers import AutoConfig

    if any(m.name == spec for m in plugins().models):
        return load_model(spec).model.config
    folder = Path(spec).expanduser()
    try:
        with hub_or_cache(needed=not folder.is_dir()):
            return AutoConfig.from_pretrained(
                str(folder) if folder.is_dir() else spec,
                trust_remote_code=False,
                **({} if revision is None else {"revision": revision}),
            )
    except loading_errors() as problem:
        raise CapacityError(
            f"the configuration of {spec!r} cannot be loaded ({reason_of(problem)}): pass a registered name, a folder"
            " or a hub id"
        ) from problem


def load_tokenizer(spec: str) -> Any:
    """The tokenizer of the model that `load_model` would load.

    Raises:
        TokenSourceError: where the name leads to none.
    """
    named = next((m for m in plugins().models if m.name == spec), None)
    if named is not None:
        return named.load()[1]
    folder = Path(spec).expanduser()
    try:
        with hub_or_cache(needed=not folder.is_dir()):
            return _tokenizer(str(folder) if folder.is_dir() else spec)
    except loading_errors() as problem:
        raise TokenSourceError(
            f"the model has no tokenizer, and none can be loaded by its name {spec!r} ({reason_of(problem)}): pass"
            " TokenStream(source, tokenizer)"
        ) from problem


def load_folder(
    folder: Path, dtype: str = "float32", device_map: str | dict[str, str | int] | None = None
) -> tuple[Any, Any]:
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
        return _pretrained(str(folder), dtype, device_map)
    except loading_errors() as problem:
        raise CapacityError(
            f"the model in {folder} cannot be loaded ({reason_of(problem)}): save it again with save_pretrained"
        ) from problem


def folder_digest(folder: Path) -> str:
    """SHA-256 of the configuration and the weights in a folder, read in pieces."""
    return files_digest([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _load_from_hub(
    spec: str, dtype: str, device_map: str | dict[str, str | int] | None, revision: str | None
) -> tuple[Any, Any]:
    names = [m.name for m in plugins().models]
    near = get_close_matches(spec, names, n=1)
    meant = f"did you mean {near[0]!r}, " if near else f"use {', '.join(map(repr, names)) or 'a model of a plugin'} "
    local = f"{meant}or a folder written by save_pretrained{'?' if near else ''}"
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or not spec.strip():
        raise CapacityError(f"{spec!r} is neither a folder nor a hub id: {local}")
    try:
        with hub_or_cache():
            return _pretrained(spec, dtype, device_map, revision)
    except loading_errors() as problem:
        at = f" at the revision {revision!r}" if revision else ""
        reason = reason_of(problem)
        fill = "load it once where there is a network and copy the cache, or " if reason == UNREACHABLE else ""
        raise CapacityError(f"the model {spec!r}{at} cannot be loaded ({reason}): {fill}{local}") from problem


def _cached_commit(spec: str, revision: str | None) -> str | None:
    """The commit that the hub's cache has for a revision, by default the main branch. It is the one just loaded."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(spec, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _few_logits(model: Any) -> tuple[Any, Any]:
    """Some tokens from all over the vocabulary, [1, position], and a Hugging Face model's logits for them."""
    import torch

    from tl_capacity.models.forward import device_of

    size = model.get_input_embeddings().weight.shape[0]
    few = (torch.arange(FEW_TOKENS, device=device_of(model)) * (size // FEW_TOKENS))[None]
    with torch.no_grad():
        return few, model(few).logits.cpu()


def _difference(bridge: Any, few: Any, own: Any) -> float:
    """The largest difference of a bridge's logits from the model's own, as a share of the largest of these."""
    import torch

    with torch.no_grad():
        found = bridge(few).cpu()
    return float((found.double() - own.double()).abs().max() / own.double().abs().max())


def _device_map(given: str | Mapping[str, str | int] | None) -> str | dict[str, str | int] | None:
    """The strategy or mapping that was asked for.

    Raises:
        CapacityError: where it is no strategy, mapping or JSON file of one.
    """
    if given is None or (isinstance(given, str) and given in STRATEGIES):
        return given
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).expanduser().read_bytes())
        except (OSError, ValueError) as problem:
            raise CapacityError(
                f"the device map {given!r} cannot be read ({reason_of(problem)}): pass one of"
                f' {", ".join(STRATEGIES)}, or a JSON file such as {{"model.embed_tokens": 0, …}}'
            ) from problem
        if not isinstance(given, dict):
            raise CapacityError("the device map is not a JSON object: give each module a device")
    return dict(given)


def _pretrained(
    source: str, dtype: str, device_map: str | dict[str, str | int] | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its annotation leaves the loading information out
    # What is put on disk is deleted with the model.
    on_disk = None if device_map is None else tempfile.mkdtemp(prefix="offload-")
    try:
        model, report = from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if revision is None else {"revision": revision}),
            **({} if device_map is None else {"device_map": device_map, "offload_folder": on_disk}),
        )
    except BaseException:
        if on_disk is not None:
            shutil.rmtree(on_disk, ignore_errors=True)
        raise
    if on_disk is not None:
        weakref.finalize(model, shutil.rmtree, on_disk, True)
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random weights in their place
        raise ValueError(f"its weights lack {len(missing):,} tensors, such as {missing[0]}")
    tokenizer = _tokenizer(source, revision)
    _check_token_ids(model.config, tokenizer)
    return model, tokenizer


def _tokenizer(source: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, **({} if revision is None else {"revision": revision})
        )
    except Exception as problem:
        if type(problem) is not Exception:  # all that the tokenizers library raises on a damaged file
            raise
        raise ValueError(f"its tokenizer is damaged: {problem}") from problem
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where the files are missing
        raise ValueError("its tokenizer is missing or has no vocabulary")
    return tokenizer


def _check_token_ids(config: Any, tokenizer: Any) -> None:
    """Refuse token ids that transformers loads without complaint and fails on later."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        for token in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
            if isinstance(token, bool) or not isinstance(token, int) or abs(token) > LARGEST_TOKEN_ID:
                raise ValueError(f"its {name} = {token!r} is not a token id")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ValueError(f"its tokenizer's model_max_length = {longest!r} is not a number")
