"""Checkpoints of a distillation: weights and optimiser in safetensors, and the progress as JSON.

The JSON names the tensors' hash. It is renamed into place last, so a checkpoint is whole or not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tl_capacity.distillation.run import SCHEMA, DistillationRun
from tl_capacity.errors import MeasurementError
from tl_capacity.storage import files as storage
from tl_capacity.storage.digests import digest

JSON_NAME = "checkpoint.json"


@dataclass
class State:
    """How far a run has come.

    Attributes:
        run: its curves so far.
        step: steps taken; with the settings, this is the cursor in the data.
        tokens: predicted tokens seen.
        losses: sum of each student's training losses since the last evaluation.
        since: how many steps these are.
    """

    run: DistillationRun
    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    since: int = 0

    @property
    def evaluated(self) -> bool:
        """Whether the students have been evaluated since their last step."""
        return self.run.students[0].tokens[-1:] == (self.tokens,)

    def advance(self, tokens: int) -> None:
        """Count a step and its tokens."""
        self.step, self.tokens = self.step + 1, self.tokens + tokens

    def learn(self, losses: list[float]) -> None:
        """Add a step's losses."""
        self.since += 1
        self.losses = [before + loss for before, loss in zip(self.losses or [0.0] * len(losses), losses, strict=True)]

    def lasted(self, seconds: float) -> None:
        """Set how long the run has taken so far."""
        self.run = replace(self.run, seconds=seconds)

    def record(self, sums: list[list[float]], tokens: list[int]) -> None:
        """Add an evaluation to every student's curve.

        Args:
            sums: [part, student] KL in nats of each part of the held-out text.
            tokens: [part] predicted tokens.
        """
        students = []
        for i, student in enumerate(self.run.students):
            parts = tuple((count, part[i]) for count, part in zip(tokens, sums, strict=True))
            trained = (self.losses[i] / self.since,) if self.since else ()
            students.append(
                replace(
                    student,
                    tokens=(*student.tokens, self.tokens),
                    heldout_kl=(*student.heldout_kl, sum(part for _, part in parts) / sum(tokens)),
                    train_loss=(*student.train_loss, *trained),
                    heldout_parts=parts,
                )
            )
        self.run, self.losses, self.since = replace(self.run, students=tuple(students)), [], 0


def save(folder: Path, state: State, students: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write a checkpoint. The one before stays beside it; older ones are deleted."""
    from safetensors.torch import save as to_bytes

    tensors = {f"weights/{name}": p.detach() for name, p in students.named_parameters()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{key}": value for key, value in moments.items()}
    data = to_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    sha = digest(data)
    name = f"checkpoint-{sha[:16]}.safetensors"
    storage.make_folder(folder)
    storage.write_bytes(folder / name, data)
    progress = {"step": state.step, "tokens": state.tokens, "losses": state.losses, "since": state.since}
    storage.write_record(
        folder / JSON_NAME, {"file": name, "sha256": sha, **progress, "run": state.run.to_json()}, keep_previous=True
    )
    storage.remove_stale(folder / JSON_NAME, "file", "checkpoint-*.safetensors", keep_previous=True)


def read(folder: Path) -> tuple[State, Mapping[str, Tensor]] | None:
    """The state in a folder with its tensors; None if there is no checkpoint.

    If the last one is damaged, the one before is read.

    Raises:
        MeasurementError: where both are damaged.
    """
    return storage.last_whole(folder / JSON_NAME, _read)


def _read(path: Path) -> tuple[State, Mapping[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = storage.read_record(path, SCHEMA)
        data = (path.parent / content["file"]).read_bytes()
        if digest(data) != content["sha256"]:
            raise ValueError("the SHA-256 of its tensors is not the recorded one")
        run = DistillationRun.from_json(content["run"])
        progress = {name: int(content[name]) for name in ("step", "tokens", "since")}
        return State(run, **progress, losses=[float(loss) for loss in content["losses"]]), load(data)
    except (
        ValueError,
        OSError,
        RecursionError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as problem:
        raise MeasurementError(
            f"the checkpoint {path} is damaged ({problem}): delete the folder to start again"
        ) from problem


def restore(tensors: Mapping[str, Tensor], students: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Load a checkpoint's tensors into students and optimiser."""
    with torch.no_grad():
        for name, parameter in students.named_parameters():
            parameter.copy_(tensors[f"weights/{name}"])
    content = optimiser.state_dict()
    content["state"] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimiser":
            index, _, key = rest.partition("/")
            content["state"].setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict(content)


def remove(folder: Path) -> None:
    """Delete a checkpoint that is no longer needed."""
    for path in (storage.previous(folder / JSON_NAME), folder / JSON_NAME, *folder.glob("checkpoint-*.safetensors")):
        path.unlink(missing_ok=True)
