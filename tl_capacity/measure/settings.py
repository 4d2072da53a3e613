"""The settings of a measurement. They are the options of `tl-capacity measure` and of `tl-capacity doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path

from tl_capacity.errors import CapacityError
from tl_capacity.options import internal, option, required
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP
from tl_capacity.runtime.units import bytes_in
from tl_capacity.text.shares import Share

MAX_FVU = "Stop if an SAE leaves more than this share of the variance unexplained; inf never stops."


def shard_in(text: str) -> tuple[int, int]:
    """The shard that a text `INDEX/OF` names.

    Raises:
        CapacityError: where the text is not that.
    """
    index, _, shards = text.partition("/")
    if not (index.isdigit() and shards.isdigit()):
        raise CapacityError(f"{text!r} is not INDEX/OF: write 0/4 for the first of four")
    return int(index), int(shards)


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure and how. Each field's help text explains it, as `tl-capacity measure --help` shows.

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

    model: str = required("The model: a name that a plugin registered, a save_pretrained folder, or a hub id.")
    out: Path = required("The folder to write the measurement to.")
    saes: tuple[str, ...] = option(
        (),
        "SAE folder or RELEASE/SAE_ID, optionally after HOOK=. Or neurons:HOOK or pca:HOOK for a basis. "
        "May be repeated. Default: all SAEs that come with the model.",
        "--sae",
        repeated=True,
    )
    tokens: int = option(1_000_000, "Tokens to count.")
    source: str | None = option(
        None,
        "Text to read: a file, a `datasets` id, or a name that a plugin knows. Default: the text that comes "
        "with the model.",
    )
    resume: bool = option(False, "Continue from the checkpoint in --out.", "--resume")
    importance: tuple[str, ...] = option(
        (),
        "Importance estimator; `tl-capacity plugins` lists them. May be repeated. Default: the paper's, E[z²].",
        repeated=True,
    )
    context: int | None = option(None, "Positions in a row. Default: as many as the SAE was trained on.")
    batch_rows: int = option(8, "Rows in a forward pass.", least=1)
    prepend_bos: bool | None = option(
        None,
        "Begin each row with the tokenizer's BOS. Default: as the SAE was trained, or with BOS if that is unknown.",
        "--bos/--no-bos",
    )
    special_tokens: bool = option(
        False,
        "If a text spells a special token, such as <|endoftext|>, read it as that token. Default: read it as text.",
        "--special-tokens",
    )
    alive_threshold: float = option(1e-5, "A feature is alive if its firing rate exceeds this.")
    fvu_every: int = option(8, "Check the SAE's reconstruction on one document in this many.", least=1)
    skip_first_positions: int | None = option(
        None,
        "Do not count this many positions at the start of each row. Default: count the positions that the SAE "
        "was trained on.",
        least=0,
    )
    shard: tuple[int, int] = option(
        (0, 1),
        "INDEX/OF: measure only every OF-th document, beginning with number INDEX. For separate machines; "
        "`merge` joins the results.",
        parse=shard_in,
        typed="0/1",
    )
    device: str = option(AUTO, DEVICE_HELP)
    dtype: str = option("float32", "Precision of the model's weights: float32, bfloat16 or float16.")
    revision: str | None = option(None, "Branch, tag or commit of a hub id, such as step3000 for Pythia.")
    device_map: str | None = option(
        None,
        "Spread the model over devices, CPU memory and disk: auto, balanced, sequential, or a JSON file that gives "
        "each module its device.",
    )
    shard_model: bool = option(
        False,
        "Split the model's blocks over the processes of a launch (FSDP), for a model that is too large for one device.",
        "--shard-model",
    )
    max_fvu: float = option(1.0, MAX_FVU)
    checkpoint_seconds: float = option(30.0, "Seconds between two checkpoints.", least=0)
    max_memory: int | None = option(
        None, "Most memory that the process may use, as 4GB. It then works on fewer latents at a time.", parse=bytes_in
    )
    progress: bool = internal(True)
    share: Share = internal(Share())

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other or count nothing.

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
