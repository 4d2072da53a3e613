"""The distillation loop: in each step, one forward pass of the teacher serves students of all widths and seeds.

Every student has its own gradient clipping and none sees another, so it comes out as if it had been trained alone.
Whatever decides a step is a function of its number, so a run that is killed and resumed, or spread over processes by
`accelerate launch`, follows the same curves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tl_capacity.distillation import checkpoint, data
from tl_capacity.distillation.ensemble import Students, heldout_losses
from tl_capacity.distillation.keeping import (
    dictionaries_of,
    digests_of,
    drowned,
    features_to_keep,
    over_budget,
)
from tl_capacity.distillation.processes import new_accelerator, own_device
from tl_capacity.distillation.refusals import (
    check_finite,
    check_folder,
    check_hidden,
    check_same,
    check_tokens,
    check_weights,
)
from tl_capacity.distillation.run import JSON_NAME, DistillationRun
from tl_capacity.distillation.settings import DistillSettings
from tl_capacity.distillation.students import check_teacher, new_students, output_of
from tl_capacity.distillation.unread import Unread
from tl_capacity.models.head import check_head
from tl_capacity.models.loading import LoadedModel
from tl_capacity.models.sharding import spread_blocks
from tl_capacity.runtime.logs import log
from tl_capacity.runtime.out_of_memory import within_device_memory
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.digests import fingerprint
from tl_capacity.storage.folders import new_folder, written
from tl_capacity.text.counting import special_token_ids
from tl_capacity.text.streams import PADDING, source_of


def distill(
    teacher: Any,
    widths: Sequence[int],
    stream: Any,
    *,
    heldout: Any = None,
    settings: DistillSettings | None = None,
    saes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    shard_teacher: bool = False,
    checkpoint_seconds: float = 60.0,
    trackers: Sequence[Any] = (),
    progress: bool = True,
) -> DistillationRun:
    """Distil a teacher into students of some widths.

    Args:
        teacher: a Hugging Face causal language model, or what `load_model` returned.
        widths: d_S of each student.
        stream: a `TokenStream`, or rows of token ids [row, position]; teacher and students see exactly these tokens.
        heldout: text to judge the students by; None holds out documents of `stream`.
        saes: dictionaries of the teacher by hook point, whose features `settings.keep` names; by default those that
            come with the teacher.
        out: a folder for the result, the students (each as `save_pretrained` writes it) and checkpoints; None keeps the
            result in memory only.
        resume: go on from the checkpoint in `out`.
        shard_teacher: spread the teacher's blocks over the processes (FSDP), so that it need not fit on one device;
            load it on the CPU.
        checkpoint_seconds: write one this often.
        trackers: of Accelerate's, by name or as `accelerate.tracking.GeneralTracker`; each evaluation is reported to
            them.

    Raises:
        CapacityError: on anything that the user can mend: a width that the family cannot build, text that is too short,
            a loss that is no longer finite (the last good checkpoint stays), a checkpoint of other settings.
    """
    settings, folder = settings or DistillSettings(), None if out is None else Path(out)
    name, tokenizer, model = _named(teacher)
    check_teacher(model)
    check_hidden(model, settings.hidden)
    dictionaries = dictionaries_of(teacher, settings.keep, saes)
    check_folder(folder, resume)

    # The text: read once, some whole documents of it held out.
    train, held = data.read(
        stream,
        heldout,
        settings.tokens,
        settings.heldout_tokens,
        settings.repeat,
        special_token_ids(model, tokenizer),
    )
    check_tokens(model, train, held)

    # The teacher, frozen, and its students before training.
    accelerator = new_accelerator(model, settings, shard_teacher, trackers, folder)
    device = own_device(model, accelerator)
    model.eval().requires_grad_(False)
    if not shard_teacher:
        model.to(device)
    curves, models = new_students(model, widths, settings, data.first_whole_rows(train))
    run = DistillationRun(
        students=curves,
        teacher=name,
        teacher_width=int(model.config.hidden_size),
        fingerprint=fingerprint(model),
        source=source_of(stream),
        heldout_source=source_of(stream if heldout is None else heldout),
        heldout_tokens=int(held.predicted.sum()),
        heldout_digest=held.digest,
        train_digest=train.digest,
        distinct_tokens=int(train.predicted.sum()),
        settings=_recorded(settings, dictionaries),
        versions=library_versions(),
        complete=False,
    )
    if folder is not None and (folder / JSON_NAME).exists():
        finished = DistillationRun.load(folder)
        check_same(finished, run)
        return finished
    kept = features_to_keep(model, settings.keep, dictionaries, train, settings.batch_rows)
    for note in over_budget(kept, run.widths, run.teacher_width):
        log.warning(note)
    if shard_teacher:
        spread_blocks(model, accelerator.device, accelerator.num_processes)
    students = Students(models, model.config.hidden_size, settings, kept)
    students.to(device)
    first_row = torch.from_numpy(held.tokens[:1].clip(min=0).astype(np.int64)).to(device)
    for model_or_student in (model, *models):
        check_head(model_or_student, first_row)

    # The optimiser, and the state of an earlier run that goes on.
    optimiser = torch.optim.AdamW(
        students.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    state = checkpoint.State(run)
    with accelerator.main_process_first():  # it puts the checkpoint before the last in its place where that is damaged
        earlier = checkpoint.read(folder) if folder is not None else None
    if earlier is not None:
        check_same(earlier[0].run, run)
        state, tensors = earlier
        checkpoint.restore(tensors, students, optimiser)
    ddp_students, ddp_optimiser = accelerator.prepare(students, optimiser, device_placement=[False, False])

    unread = Unread(device)

    def catch_up() -> None:
        """Read the steps that were not read yet, and stop if one of them went wrong."""
        for step, losses, norms in unread.read():
            check_finite(state.run.students, losses, norms, step, folder)
            state.learn(losses)

    # The loop. Students are evaluated and saved before the step, so the last round takes none.
    first, steps = state.step, train.steps(settings.tokens, settings.batch_rows)
    evaluations = {round(steps * i / settings.evaluations) for i in range(settings.evaluations + 1)}
    started, saved = time.monotonic() - state.run.seconds, time.monotonic()
    kept_on_disk = f"; the last checkpoint stays in {folder}" if folder else ""
    with (
        within_device_memory(
            f"a step of {settings.batch_rows:,} rows for {len(models):,} students",
            f"choose a smaller --batch-rows, fewer --widths, or another --device{kept_on_disk}",
        ),
        token_progress(settings.tokens, progress and accelerator.is_main_process, "distilling") as advance,
    ):
        while True:
            evaluating = state.step in evaluations and not state.evaluated
            saving = folder is not None and (
                state.step in (first, steps) or time.monotonic() - saved >= checkpoint_seconds
            )
            if evaluating or saving:
                catch_up()
                check_weights(state.run.students, students, state.step, folder)
            if evaluating:
                state.record(
                    heldout_losses(model, students, held, settings, accelerator), held.in_parts(settings.batch_rows)
                )
                for note in drowned(state.run.students) if kept and accelerator.is_main_process else ():
                    log.warning(note)
                accelerator.log(
                    {f"{s.name}/{name}": curve[-1] for s in state.run.students for name, curve in s.losses() if curve},
                    step=state.tokens,
                )
            if folder is not None and saving:
                saved = time.monotonic()
                state.lasted(saved - started)
                if accelerator.is_main_process:
                    checkpoint.save(folder, state, students, optimiser)
            if state.step >= steps:
                break

            rows = train.batch(state.step, settings.batch_rows, settings.seed)
            predicted = int((rows != PADDING).sum()) - len(rows)  # over all processes, each of which takes some rows
            rows = rows[accelerator.process_index :: accelerator.num_processes]
            tokens, places, labels = data.model_inputs(rows, device)
            with torch.no_grad():
                target = output_of(model, tokens, places, students.hooks, students.points)
            losses = ddp_students(tokens, places, labels, target, predicted)
            # Each process has a part of the sum, and DDP takes the mean of their gradients.
            accelerator.backward(losses.sum() * accelerator.num_processes)
            each = students.parameters_of_each()
            norms = [nn.utils.clip_grad_norm_(one, settings.clip) for one in each]
            unread.add(state.step, accelerator.reduce(losses.detach(), "sum"), norms)
            if unread.due:
                catch_up()
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * settings.rate(state.step, steps)
            ddp_optimiser.step()
            ddp_optimiser.zero_grad(set_to_none=True)
            state.advance(predicted)
            advance(state.tokens)

    run = replace(state.run, seconds=round(time.monotonic() - started, 1), complete=True)
    if folder is not None and accelerator.is_main_process:
        _save(folder, run, models, tokenizer)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return run


def _named(teacher: Any) -> tuple[str, Any, Any]:
    """`(name, tokenizer or None, model)` of a teacher."""
    if isinstance(teacher, LoadedModel):
        return teacher.name, teacher.tokenizer, teacher.model
    return getattr(teacher, "name_or_path", "") or type(teacher).__name__, None, teacher


def _recorded(settings: DistillSettings, dictionaries: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the students, as JSON. Kept features and their dictionaries are in it only if there are any."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    if not settings.keep:
        del content["keep"]  # so that a run from before there was such a setting goes on
        return content
    return content | {"dictionaries": digests_of(dictionaries)}


def _save(folder: Path, run: DistillationRun, models: Sequence[Any], tokenizer: Any) -> None:
    """Write the students with `save_pretrained`, then the run, then delete the checkpoint."""
    for curve, model in zip(run.students, models, strict=True):
        place = folder / "students" / curve.name
        with new_folder(place) as whole, written(place):
            model.eval().save_pretrained(whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
    run.save(folder)
    checkpoint.remove(folder)
