"""What to measure and how."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path

from tl_capacity.errors import CapacityError


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure and how.

    Attributes:
        model: a registered name, a `save_pretrained` folder or a hub id.
        saes: SAE folders or `release/sae_id`, each optionally as `HOOK=…`, or bases such as `pca:HOOK`; none for all
            SAEs that come with a registered model.
        tokens: tokens to count.
        source: token source; None for the corpus that comes with a registered model.
        out: folder of the measurement.
        resume: go on from the checkpoint in `out`.
        context, batch_rows: shape of a batch; context None for the SAE's own, or 512, within the model's.
        shard: `(index, of)`.
        max_fvu: refuse SAEs that leave more of the variance unexplained.
        checkpoint_seconds: save a checkpoint once this long has passed since the last one.
        max_memory: bytes that the process may hold; fewer latents are dense at once to stay below.
    """

    model: str
    out: Path
    saes: tuple[str, ...] = ()
    tokens: int = 1_000_000
    source: str | None = None
    resume: bool = False
    importance: tuple[str, ...] = ("second_moment",)
    context: int | None = None
    batch_rows: int = 8
    prepend_bos: bool = True
    alive_threshold: float = 1e-5
    fvu_every: int = 8
    skip_first_positions: int = 0
    shard: tuple[int, int] = (0, 1)
    device: str = "cpu"
    dtype: str = "float32"
    max_fvu: float = 1.0
    checkpoint_seconds: float = 30.0
    max_memory: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            CapacityError: no tokens, or a largest FVU that refuses nothing.
        """
        if self.tokens < 1:
            raise CapacityError(f"--tokens {self.tokens} counts nothing: ask for at least 1")
        if isnan(self.max_fvu):
            raise CapacityError("--max-fvu nan refuses nothing: give a number, or inf to measure whatever the fit")
