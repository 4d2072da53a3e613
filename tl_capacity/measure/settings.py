"""The settings of a measurement, which are the options of `tl-capacity measure` and of `tl-capacity doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path

from tl_capacity.errors import CapacityError
from tl_capacity.options import internal, option, required
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP
from tl_capacity.runtime.units import bytes_in
from tl_capacity.text.shares import Share

MAX_FVU = "Refuse an SAE that leaves more of the variance unexplained; inf never refuses."


def shard_in(text: str) -> tuple[int, int]:
    """The shard that `INDEX/OF` means.

    Raises:
        CapacityError: where the text is not that.
    """
    index, _, shards = text.partition("/")
    if not (index.isdigit() and shards.isdigit()):
        raise CapacityError(f"{text!r} is not INDEX/OF: write 0/4 for the first of four")
    return int(index), int(shards)


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure and how; each field's help text says what it is, as `tl-capacity measure --help` shows.

    Attributes:
        saes: none for all SAEs that come with a registered model.
        source: None for the corpus that comes with a registered model.
        importance: none for the default estimator.
        context: None for the SAE's own, or 512, within the model's.
        prepend_bos, skip_first_positions: None for what the SAEs' own metadata says.
        shard: its index, and how many there are.
        checkpoint_seconds: since the last one was saved.
        max_memory: in bytes.
        progress: show how far it is.
        share: of these documents, what one of several processes counts of what earlier launches have left.
    """

    model: str = required("A registered name, a save_pretrained folder, or a hub id.")
    out: Path = required("Folder of the measurement.")
    saes: tuple[str, ...] = option(
        (),
        "SAE folder or release/sae_id, optionally HOOK=…; or neurons:HOOK, pca:HOOK; may be repeated. Default: all that"
        " come with the model.",
        "--sae",
        repeated=True,
    )
    tokens: int = option(1_000_000, "Tokens to count.")
    source: str | None = option(
        None, "A file, a `datasets` id, or a name that a plugin reads. Default: the text that comes with the model."
    )
    resume: bool = option(False, "Go on from the checkpoint in --out.", "--resume")
    importance: tuple[str, ...] = option(
        (), "Importance estimator; may be repeated. Default: the paper's.", repeated=True
    )
    context: int | None = option(None, "Positions in a row. Default: the SAE's own.")
    batch_rows: int = option(8, "Rows in a forward pass.")
    prepend_bos: bool | None = option(
        None, "Begin each row with the tokenizer's BOS. Default: as the SAE's own rows, or with it.", "--bos/--no-bos"
    )
    special_tokens: bool = option(
        False,
        "Read special tokens that are spelled in a text, such as <|endoftext|>, as these tokens. Default: as text.",
        "--special-tokens",
    )
    alive_threshold: float = option(1e-5, "A feature is alive where its firing rate exceeds this.")
    fvu_every: int = option(8, "Check the reconstruction on one document in this many.")
    skip_first_positions: int | None = option(
        None, "Do not count the first positions of each row. Default: count those that the SAE was trained on."
    )
    shard: tuple[int, int] = option(
        (0, 1), "INDEX/OF: measure only every OF-th document, from INDEX on.", parse=shard_in, typed="0/1"
    )
    device: str = option(AUTO, DEVICE_HELP)
    dtype: str = option("float32", "Precision of the model's weights: float32, bfloat16, float16.")
    revision: str | None = option(None, "Branch, tag or commit of a hub id, such as step3000 of a Pythia.")
    device_map: str | None = option(
        None,
        "Spread the model over devices, CPU memory and disk: auto, balanced, sequential, or a JSON file of a device for"
        " each module.",
    )
    shard_model: bool = option(
        False,
        "Leave each process of a launch only its part of the model's blocks (FSDP), for a model that fits on no device"
        " alone.",
        "--shard-model",
    )
    max_fvu: float = option(1.0, MAX_FVU)
    checkpoint_seconds: float = option(30.0, "Save a checkpoint this often.")
    max_memory: int | None = option(
        None, "Memory that the process may hold, as 4GB; fewer latents are dense at once.", parse=bytes_in
    )
    progress: bool = internal(True)
    share: Share = internal(Share())

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            CapacityError: no tokens, a largest FVU that refuses nothing, or a model that is spread in two ways.
        """
        if self.tokens < 1:
            raise CapacityError(f"--tokens {self.tokens} counts nothing: ask for at least 1")
        if self.shard_model and self.device_map is not None:
            raise CapacityError(
                "--shard-model spreads the model over processes and --device-map over the devices of one: give one of"
                " them"
            )
        if isnan(self.max_fvu):
            raise CapacityError("--max-fvu nan refuses nothing: give a number, or inf to measure whatever the fit")
