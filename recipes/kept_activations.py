"""Activations that the recipe train-sae keeps in a folder, so that the model runs only once for several SAEs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_capacity.errors import CapacityError
from tl_capacity.runtime.hub import loading_errors
from tl_capacity.storage.files import make_folder, read_kept, write_bytes, write_json
from tl_capacity.storage.same_run import earlier_values

RECORD = "activations.json"


class KeptActivations:
    """A model of which SAELens reads one hook point. Activations that were read before come from a folder.

    A file is named by the hash of its tokens. A file that cannot be read is made again.
    """

    def __init__(self, hooked: Any, folder: Path, about: dict[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            hooked: a model that SAELens can read activations from.
            folder: where they are kept.
            about: what decides the activations of a token; a folder of anything else is refused.

        Raises:
            CapacityError: where the folder holds other activations, or cannot be written.
        """
        self._hooked, self._folder = hooked, folder
        make_folder(folder)
        record = folder / RECORD
        if record.exists():
            if changed := earlier_values(read_kept(record), about, all_of_them=True):
                raise CapacityError(f"{folder} holds other activations ({changed}): choose another folder")
        else:
            write_json(record, about)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooked, name)

    def run_with_cache(
        self, tokens: Tensor, *, names_filter: Sequence[str], **how: Any
    ) -> tuple[None, dict[str, Tensor]]:
        """The model's own method, for one hook point and without logits.

        Args:
            tokens: int [row, position].
        """
        from safetensors.torch import load_file, save

        [hook] = names_filter
        rows = tokens.cpu().numpy()
        name = hashlib.sha256(str(rows.shape).encode() + rows.tobytes()).hexdigest()[:32]
        path = self._folder / f"{name}.safetensors"
        try:
            return None, {hook: load_file(path)["activations"].to(tokens.device)}
        except loading_errors():  # not there yet, or damaged
            activations: Tensor = self._hooked.run_with_cache(tokens, names_filter=[hook], **how)[1][hook]
        write_bytes(path, save({"activations": activations.contiguous()}))
        return None, {hook: activations}
