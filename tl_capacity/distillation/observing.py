"""The settings of `tl-capacity observe`, each with its option's help text; torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tl_capacity.errors import CapacityError
from tl_capacity.options import option, required
from tl_capacity.runtime.devices import AUTO, DEVICE_HELP


@dataclass(frozen=True)
class ObserveSettings:
    """Whom to judge, and on which text. Each field has the help text that `tl-capacity observe --help` shows.

    Attributes:
        students: folders or hub ids, a hub id with `@REVISION` where it is not the main one; the folder of a
            distillation stands for its students.
        held_out: read only the documents that `run distill` holds out where it is given no text to hold out.
        context: None for what all of the models take, at most 256.

    Raises:
        CapacityError: where there is no student, or a number that nothing can be judged with.
    """

    teacher: str = required("The teacher: a name that a plugin registered, a save_pretrained folder, or a hub id.")
    students: tuple[str, ...] = option(
        (),
        "A student: a save_pretrained folder, a hub id (optionally with @REVISION), or the folder of a distillation,"
        " for all of its students. May be repeated.",
        "--student",
        repeated=True,
    )
    source: str = option("", "Text that no student was trained on: a file, a `datasets` id, or a name.")
    out: Path = option(Path("runs/observed"), "The folder to write.")
    tokens: int = option(50_000, "Predicted tokens to judge on.")
    held_out: bool = option(
        False,
        "Judge only on the documents of --source that `run distill` holds out when it has no --heldout.",
        "--held-out",
    )
    context: int | None = option(
        None, "Positions in a row, BOS included. Default: what all the models take, at most 256."
    )
    batch_rows: int = option(8, "Rows in a forward pass.", least=1)
    prepend_bos: bool = option(True, "Begin each row with the teacher's BOS.", "--bos/--no-bos")
    special_tokens: bool = option(
        False,
        "If a text spells a special token, such as <|endoftext|>, read it as that token. Default: read it as text.",
        "--special-tokens",
    )
    device: str = option(AUTO, f"Where the models run: {DEVICE_HELP}")
    dtype: str = option("float32", "Precision of all weights.")
    revision: str | None = option(None, "Branch, tag or commit of the teacher's hub id. Default: its main branch.")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", least=0)

    def __post_init__(self) -> None:
        if not self.students:
            raise CapacityError("no student is named: pass --student with a folder or a hub id")
        if not self.source:
            raise CapacityError("no text is named: pass --source with text that no student was trained on")
        for name in ("tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise CapacityError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} judges nothing: choose a number of at least 1"
                )
