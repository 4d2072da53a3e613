"""Refusals of a distillation: what cannot be distilled is refused at once, and what goes wrong as soon as it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tl_capacity.distillation import checkpoint
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.data import Rows
from tl_capacity.distillation.ensemble import Students
from tl_capacity.distillation.run import JSON_NAME, DistillationRun
from tl_capacity.distillation.settings import HiddenMatch
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.models.forward import check_row_length, check_token_ids
from tl_capacity.plugins import plugins
from tl_capacity.storage.files import make_folder
from tl_capacity.storage.same_run import changed_fields
from tl_capacity.text.streams import PADDING


def check_hidden(model: Any, hidden: Sequence[HiddenMatch]) -> None:
    """Refuse hook points off the residual stream. Without a bridge around the model, nothing else can be read.

    Raises:
        HookPointError: names the hook point.
    """
    family = plugins().family_of(model.config.model_type)
    for match in hidden:
        if family is not None and family.residual(match.hook) is None:
            raise HookPointError(
                f"hidden states cannot be matched at {match.hook!r}, which is not a residual-stream hook point: choose"
                " one such as blocks.1.hook_resid_post"
            )


def check_tokens(model: Any, *texts: Rows) -> None:
    """Refuse text whose tokens or positions the teacher does not have.

    Raises:
        CapacityError: names the id, or how many positions it has.
    """
    for rows in texts:
        check_token_ids(model, rows.tokens[rows.tokens != PADDING], "the teacher")
        check_row_length(model, rows.tokens, "the teacher")


def check_folder(folder: Path | None, resume: bool) -> None:
    """Make the folder. Refuse one that holds a distillation, unless it is to be resumed.

    Raises:
        CapacityError: also where there is no folder to resume from.
    """
    if folder is None:
        if resume:
            raise CapacityError("there is nothing to resume without a folder: pass out")
        return
    if not resume and ((folder / JSON_NAME).exists() or (folder / checkpoint.JSON_NAME).exists()):
        raise CapacityError(f"{folder} already holds a distillation: resume it with --resume, or choose another --out")
    make_folder(folder)


def check_same(earlier: DistillationRun, now: DistillationRun) -> None:
    """Refuse to resume a run with other students, settings, teacher or text.

    Raises:
        CapacityError: names the first that is another.
    """
    before, wanted = _decisive(earlier), _decisive(now)
    for name in changed_fields(before, wanted):
        raise CapacityError(
            f"the folder holds a distillation with {name} {before.get(name)!r}, but this one has {wanted[name]!r}:"
            " resume with the same settings, teacher and text, or choose another --out"
        )


def check_finite(
    students: Sequence[StudentCurve], losses: Sequence[float], norms: Sequence[float], step: int, folder: Path | None
) -> None:
    """Refuse to continue with a student whose loss or gradient is not finite.

    Raises:
        CapacityError: names the student.
    """
    for student, loss, norm in zip(students, losses, norms, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = f" (the last good checkpoint stays in {folder})" if folder else ""
            raise CapacityError(
                f"{student.name} diverged at step {step:,}, with loss {loss:g} and gradient norm {norm:g}: choose a"
                f" lower --lr{kept}"
            )


def check_weights(curves: Sequence[StudentCurve], students: Students, step: int, folder: Path | None) -> None:
    """Refuse to continue with weights that are not finite, although the step's loss was.

    Raises:
        CapacityError: names the student.
    """
    each = [torch.stack([torch.isfinite(p).all() for p in parameters]) for parameters in students.parameters_of_each()]
    finite = torch.stack([parameters.all() for parameters in each]).tolist()  # one wait for the device
    losses = [0.0 if ok else math.nan for ok in finite]
    check_finite(curves, losses, [0.0 if ok else math.inf for ok in finite], step, folder)


def _decisive(run: DistillationRun) -> dict[str, Any]:
    """The settings that decide the curves of a run."""
    names = [f"{student.name} ({student.parameters:,} parameters)" for student in run.students]
    identity = {name: getattr(run, name) for name in ("teacher", "fingerprint", "train_digest", "heldout_digest")}
    return {"students": names, **identity, **run.settings}
