"""What decides a sparse autoencoder that the recipe train-sae trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.defaults import USUAL_CONTEXT, middle_hook, row_length
from tl_capacity.recipe import option, option_of
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP

ARCHITECTURES = ("topk", "batchtopk", "standard", "gated", "jumprelu")
SAVE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TrainSAEConfig:
    """Everything that decides the SAE."""

    model: str = option("embedded", "A model name, folder or hub id.")
    hook: str = option(
        "", "The hook point, in TransformerLens' names; by default the residual stream after the middle layer."
    )
    source: str = option("", "The token source; by default the corpus that belongs to the model.")
    out: Path = option(Path("sae"), "The folder to write; checkpoints stand beside it until it is complete.")
    tokens: int = option(1_000_000, "Tokens to train on, special ones not counted; a shorter source is repeated.")
    heldout_tokens: int = option(20_000, "Tokens kept apart, by whole documents, to measure the SAE on.")
    architecture: str = option("topk", f"One of {', '.join(ARCHITECTURES)}.")
    d_sae: int = option(4096, "Number of latents.")
    k: int = option(32, "Active latents per token, of topk and batchtopk.")
    l1_coefficient: float = option(1.0, "Sparsity penalty of standard and gated.")
    l0_coefficient: float = option(1.0, "Sparsity penalty of jumprelu.")
    lr: float = option(
        1e-3, "Peak learning rate of Adam; it rises over the first 5% of the steps and falls to zero over the last 20%."
    )
    batch_tokens: int = option(1024, "Activations per training step.")
    context: int | None = option(
        None, "Positions in a row, BOS included; by default what the model takes, at most 256."
    )
    batch_rows: int = option(8, "Rows in one forward pass of the model.")
    dead_after_tokens: int = option(
        200_000, "A latent that was silent for so long counts as dead, and topk revives it."
    )
    checkpoints: int = option(4, "How many to write on the way; run the same command again to go on from the newest.")
    save_dtype: str = option(
        "float32",
        f"How the weights are stored, one of {', '.join(SAVE_DTYPES)}; they are computed with in float32 all the same.",
    )
    activations: Path | None = option(
        None,
        "Keep the model's activations in this folder and take them from there, so that several SAEs of one hook point"
        " and text run the model once; 4 bytes a token and dimension.",
    )
    device: str = option(AUTO, f"Where the model and the SAE run: {DEVICE_HELP}")
    revision: str | None = option_of(MeasureSettings, "revision")
    seed: int = option(0, "Seed of the split, the order of the rows and the initial weights.")

    @property
    def steps(self) -> int:
        """Training steps."""
        return max(1, self.tokens // self.batch_tokens)

    def fitted(self, model: Any) -> TrainSAEConfig:
        """With what fits the model, by its configuration, where nothing was given.

        Raises:
            CapacityError: on a longer context than the model takes.
        """
        return replace(self, hook=self.hook or middle_hook(model), context=row_length(model, self.context))

    @property
    def positions(self) -> int:
        """Positions in a row."""
        return USUAL_CONTEXT if self.context is None else self.context

    @property
    def buffer_rows(self) -> int:
        """Rows whose activations are mixed with one another before they are trained on."""
        return max(64, -(-4 * self.batch_tokens // self.positions))

    @property
    def checkpoints_folder(self) -> Path:
        """Where the state is kept until the SAE is complete."""
        return self.out.with_name(f"{self.out.name}.checkpoints")

    def decisive(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one before."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("out", "device", "save_dtype", "checkpoints", "activations")
        }
