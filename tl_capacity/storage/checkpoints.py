"""The state of a long run, in one file in its result's folder. It is replaced as the run goes on, and deleted when the
result is written or the run is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_capacity.errors import CapacityError, DeviceFullError, NotWrittenError, SourceCutOffError
from tl_capacity.storage.digests import tensors_digest
from tl_capacity.storage.files import last_whole, make_folder, previous, write_bytes
from tl_capacity.storage.same_run import earlier_values

SECONDS = 30.0
"""Time between two checkpoints."""
SHARE = 0.1
"""Most of the time that goes into saving, as a share. A large state is saved less often."""


class Checkpoint:
    """Tensors and a JSON object, with the settings they belong to and a SHA-256 of everything. The previous checkpoint
    is kept as well.

    Attributes:
        tensors, about: the state; empty where there is none to go on from.

    Raises:
        CapacityError: where the file and the one before it are damaged, or they belong to other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """
        Args:
            path: the file; None keeps nothing.
            settings: everything that decides the result.
        """
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.tensors: dict[str, Tensor] = {}
        self.about: dict[str, Any] = {}
        self._next = time.monotonic() + SECONDS
        earlier = None if path is None else last_whole(path, self._read)
        if earlier is not None:
            self.tensors, self.about = earlier

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors named `name/…`, by the rest of their names."""
        return {
            key.rpartition("/")[2]: tensor for key, tensor in self.tensors.items() if key.rpartition("/")[0] == name
        }

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and time.monotonic() >= self._next

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Replace the state on disk.

        Raises:
            CapacityError: where it cannot be written; the state before stays.
        """
        from safetensors.torch import save

        if self.path is None:
            return
        started = time.monotonic()
        make_folder(self.path.parent)
        texts = {"settings": json.dumps(self.settings), "about": json.dumps(about)}
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(
            self.path, save(held, {**texts, "sha256": tensors_digest(held, *texts.values())}), keep_previous=True
        )
        ended = time.monotonic()
        self._next = ended + max(SECONDS, (ended - started) / SHARE)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                texts = file.metadata() or {}
                # A copy is aligned as any other tensor. Products of what is not may differ in the last bit, and so
                # would the result of a run that goes on.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            settings, about = json.loads(texts["settings"]), json.loads(texts["about"])
            if texts["sha256"] != tensors_digest(tensors, texts["settings"], texts["about"]):
                raise ValueError("the SHA-256 of its content is not the recorded one")
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as problem:
            raise CapacityError(
                f"{path} is not a complete checkpoint ({problem}): delete it to begin anew"
            ) from problem
        if changed := earlier_values(settings, self.settings, all_of_them=True):
            raise CapacityError(
                f"{path} belongs to other settings ({changed}): use those to continue from it, or delete it to begin "
                "anew"
            )
        return tensors, about


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint and the previous one, once the result is written.

    The newest goes last: who finds it after a kill knows that there may be another.
    """
    for old in (previous(path), path):
        old.unlink(missing_ok=True)


def remove_checkpoints_in(folder: Path) -> None:
    """Delete all checkpoints in the folder of a result that is written, as of a run that was killed just then."""
    for path in folder.glob("*.checkpoint.safetensors"):
        remove_checkpoint(path)


def checkpoint_in(folder: Path, name: str, beside: Path) -> Path:
    """The file of a checkpoint, in the result's folder.

    Earlier versions kept it beside that folder; one that lies there is moved.

    Args:
        name: of the file, without `.checkpoint.safetensors`.
        beside: where an earlier version kept it.
    """
    path = folder / f"{name}.checkpoint.safetensors"
    for old, new in ((previous(beside), previous(path)), (beside, path)):
        if old.exists() and not path.exists():
            make_folder(folder)
            os.replace(old, new)
    return path


@contextmanager
def gone_if_refused(paths: Sequence[Path]) -> Iterator[None]:
    """Delete checkpoints if what runs inside the block is refused, because the next command will have other settings.
    They stay if the same command can continue: after a kill, a full disk, a full device, or a source that was cut off.
    """
    try:
        yield
    except (NotWrittenError, SourceCutOffError, DeviceFullError):
        raise
    except CapacityError:
        for path in paths:
            remove_checkpoint(path)
        raise
