"""The settings of a sparse autoencoder that the recipe train-sae trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.defaults import USUAL_CONTEXT, middle_hook, row_length
from tl_capacity.recipe import option, option_of
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP
from tl_capacity.runtime.paths import beside

ARCHITECTURES = ("topk", "batchtopk", "standard", "gated", "jumprelu")
SAVE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TrainSAEConfig:
    """Everything that decides the SAE."""

    model: str = option(
        "embedded", "The model: a name that a plugin registered, a save_pretrained folder, or a hub id."
    )
    hook: str = option("", "Hook point, by TransformerLens' name. Default: the residual stream after the middle layer.")
    source: str = option("", "Text to train on. Default: the text that comes with the model.")
    out: Path = option(Path("sae"), "Folder to write. Checkpoints are beside it until it is complete.")
    tokens: int = option(1_000_000, "Tokens to train on, without special tokens. A shorter source is repeated.")
    heldout_tokens: int = option(20_000, "Tokens of whole documents that are held out to measure the SAE on.")
    architecture: str = option("topk", f"One of {', '.join(ARCHITECTURES)}.")
    d_sae: int = option(4096, "Number of latents.")
    k: int = option(32, "Active latents per token, for topk and batchtopk.")
    l1_coefficient: float = option(1.0, "Sparsity penalty, for standard and gated.", least=0)
    l0_coefficient: float = option(1.0, "Sparsity penalty, for jumprelu.")
    lr: float = option(
        1e-3, "Peak learning rate of Adam. It rises over the first 5% of the steps and falls to zero over the last 20%."
    )
    batch_tokens: int = option(1024, "Activations per training step.")
    context: int | None = option(None, "Positions in a row, BOS included. Default: what the model takes, at most 256.")
    batch_rows: int = option(8, "Rows in one forward pass of the model.")
    dead_after_tokens: int = option(
        200_000, "A latent that was silent for this many tokens counts as dead, and topk revives it.", least=0
    )
    checkpoints: int = option(4, "How many to write during training. The same command resumes from the newest.")
    save_dtype: str = option(
        "float32",
        f"Precision of the stored weights: {', '.join(SAVE_DTYPES)}. Training is in float32 in any case.",
    )
    activations: Path | None = option(
        None,
        "Keep the model's activations in this folder and read them from there, so that several SAEs of one hook point"
        " and text run the model once. It takes 4 bytes per token and dimension.",
    )
    device: str = option(AUTO, f"Where the model and the SAE run: {DEVICE_HELP}")
    revision: str | None = option_of(MeasureSettings, "revision")
    seed: int = option(0, "Seed of the split, the order of the rows and the initial weights.", least=0)

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return max(1, self.tokens // self.batch_tokens)

    def fitted(self, model: Any) -> TrainSAEConfig:
        """The settings with missing values filled in to fit the model's configuration.

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
        """Rows whose activations are mixed before they are trained on."""
        return max(64, -(-4 * self.batch_tokens // self.positions))

    @property
    def checkpoints_folder(self) -> Path:
        """The folder of checkpoints until the SAE is complete."""
        return beside(self.out, "checkpoints")

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("out", "device", "save_dtype", "checkpoints", "activations")
        }
