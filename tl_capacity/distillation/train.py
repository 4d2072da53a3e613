"""The distillation loop: one forward pass of the teacher serves all students, of all widths and seeds, in each step.

Every student has its own gradient clipping and none sees another, so it comes out as if it had been trained alone.
Whatever decides a step is a function of its number, so a run that is killed and resumed, or spread over processes by
`accelerate launch`, follows the same curves.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.distillation import checkpoint, data
from tl_capacity.distillation.losses import (
    CHUNK_TOKENS,
    HELDOUT_LOSS,
    MATCHES,
    HiddenMatch,
    LogitLoss,
    Output,
    chunked_losses,
)
from tl_capacity.distillation.run import JSON_NAME, DistillationRun, StudentCurve
from tl_capacity.distillation.students import check_output, check_teacher, new_student, output_of, parameters_of
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.models.forward import check_token_ids
from tl_capacity.models.loading import LoadedModel
from tl_capacity.plugins import plugins
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.files import make_folder
from tl_capacity.storage.folders import new_folder, written
from tl_capacity.text.streams import PADDING, source_of

SCHEDULES = ("cosine", "wsd")
SHOWN_ROWS = 16
"""Rows of the training text in which the directions of a teacher's stream are taken."""


@dataclass(frozen=True)
class DistillSettings:
    """Everything that decides the students, but for teacher, widths and text.

    Attributes:
        tokens: predicted tokens to train on.
        seeds: of the initial weights; each width is trained once for each.
        seeded_widths: the only widths that are, if any are named; the others are trained with the first seed.
        loss: between the next-token distributions.
        hidden: hidden states to match besides.
        start: of the students' weights: "random", or "truncated", the teacher's in the leading directions of its
            stream.
        control: also train a student of the teacher's width that starts with its weights.
        lr, warmup, schedule, decay: peak learning rate of AdamW; the share of steps over which it rises; "cosine" to
            zero, or "wsd", constant and then linear to zero over the last `decay` of the steps.
        weight_decay, betas, clip: of AdamW; largest norm of a student's gradient.
        batch_rows: rows in a step, over all processes.
        evaluations: how often the held-out loss is taken, evenly spaced, besides before the first step.
        heldout_tokens: predicted tokens that it is taken on.
        repeat: whether text that is shorter than `tokens` may be read several times.
        seed: of the order of the rows.
        mixed_precision: "no", or "bf16" for the students' blocks under autocast; weights, optimiser and losses stay
            float32.
        chunk_tokens: tokens whose logits exist at a time.

    Raises:
        CapacityError: on a value outside its domain.
    """

    tokens: int = 1_000_000
    seeds: tuple[int, ...] = (0,)
    seeded_widths: tuple[int, ...] = ()
    loss: LogitLoss = LogitLoss()
    hidden: tuple[HiddenMatch, ...] = ()
    start: str = "random"
    control: bool = False
    lr: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    decay: float = 0.2
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    batch_rows: int = 8
    evaluations: int = 40
    heldout_tokens: int = 16_384
    repeat: bool = False
    seed: int = 0
    mixed_precision: str = "no"
    chunk_tokens: int = CHUNK_TOKENS

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise CapacityError(
                f"{self.schedule!r} is no schedule of the learning rate: choose one of {', '.join(SCHEDULES)}"
            )
        if self.start not in ("random", "truncated"):
            raise CapacityError(f"{self.start!r} is no way to start all students: choose random or truncated")
        if self.mixed_precision not in ("no", "bf16"):
            raise CapacityError(f"{self.mixed_precision!r} is no precision to train in: choose no or bf16")
        for name in ("tokens", "batch_rows", "evaluations", "heldout_tokens", "chunk_tokens", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise CapacityError(f"{name} = {getattr(self, name)} trains nothing: choose a number above 0")
        if not 0 <= self.warmup < 1 or not 0 < self.decay <= 1 or self.warmup + self.decay > 1:
            raise CapacityError(
                f"warmup = {self.warmup:g} and decay = {self.decay:g} are no shares of one run: choose numbers from 0"
                " to 1 that add up to at most 1"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise CapacityError(f"seeds = {self.seeds} are not one or several different numbers: pass each seed once")

    def rate(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at a step."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        return min(1.0, (steps - step) / (self.decay * steps))


def distill(
    teacher: Any,
    widths: Sequence[int],
    stream: Any,
    *,
    heldout: Any = None,
    settings: DistillSettings | None = None,
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
    settings = settings or DistillSettings()
    name, tokenizer, model = _named(teacher)
    check_teacher(model)
    _check_hidden(model, settings.hidden)
    folder = None if out is None else Path(out)
    _check_folder(folder, resume)
    train, held = data.read(stream, heldout, settings.tokens, settings.heldout_tokens, settings.repeat)
    _check_tokens(model, train, held)
    accelerator = _accelerator(model, settings, shard_teacher, trackers, folder)
    model.eval().requires_grad_(False)
    if not shard_teacher:
        model.to(accelerator.device)

    curves, models = new_students(model, widths, settings, _shown(train))
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
        settings=json.loads(json.dumps(asdict(settings))),
        versions=library_versions(),
        complete=False,
    )
    if folder is not None and (folder / JSON_NAME).exists():
        finished = DistillationRun.load(folder)
        _check_same(finished, run)
        return finished
    if shard_teacher:
        _shard(model, accelerator)
    students = Students(models, model.config.hidden_size, settings)
    students.to(accelerator.device)
    for each in (model, *models):
        check_output(each, torch.from_numpy(held.tokens[:1].clip(min=0).astype(np.int64)).to(accelerator.device))
    optimiser = torch.optim.AdamW(
        students.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    steps = train.steps(settings.tokens, settings.batch_rows)
    evaluations = sorted({round(steps * i / settings.evaluations) for i in range(settings.evaluations + 1)})
    state = checkpoint.State(run)
    with accelerator.main_process_first():  # it puts the checkpoint before the last in its place where that is damaged
        earlier = checkpoint.read(folder) if folder is not None else None
    if earlier is not None:
        _check_same(earlier[0].run, run)
        state, tensors = earlier
        checkpoint.restore(tensors, students, optimiser)
    trained, stepper = accelerator.prepare(students, optimiser)

    started, saved = time.monotonic() - state.run.seconds, time.monotonic()
    first = state.step
    with token_progress(settings.tokens, progress and accelerator.is_main_process, "distilling") as advance:
        while True:
            evaluating = state.step in evaluations and not state.evaluated
            saving = folder is not None and (
                state.step in (first, steps) or time.monotonic() - saved >= checkpoint_seconds
            )
            if evaluating or saving:
                _check_weights(state, students, folder)
            if evaluating:
                state.record(evaluate(model, students, held, settings, accelerator))
                accelerator.log(
                    {f"{s.name}/{name}": curve[-1] for s in state.run.students for name, curve in s.losses() if curve},
                    step=state.tokens,
                )
            if folder is not None and saving:
                state.run, saved = replace(state.run, seconds=time.monotonic() - started), time.monotonic()
                if accelerator.is_main_process:
                    checkpoint.save(folder, state, students, optimiser)
            if state.step >= steps:
                break

            rows = train.batch(state.step, settings.batch_rows, settings.seed)
            counted = int((rows != PADDING).sum()) - len(rows)
            tokens, mask, labels = _tensors(
                rows[accelerator.process_index :: accelerator.num_processes], accelerator.device
            )
            with torch.no_grad():
                target = output_of(model, tokens, mask, students.hooks)
            losses = trained(tokens, mask, labels, target, counted)
            # Each process has a part of the sum, and DDP takes the mean of their gradients.
            accelerator.backward(losses.sum() * accelerator.num_processes)
            norms = [
                float(nn.utils.clip_grad_norm_(parameters, settings.clip))
                for parameters in students.parameters_of_each()
            ]
            values = accelerator.reduce(losses.detach(), "sum").tolist()
            _check_finite(state, values, norms, folder)
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * settings.rate(state.step, steps)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            state.advance(counted, values)
            advance(state.tokens)

    run = replace(state.run, seconds=round(time.monotonic() - started, 1), complete=True)
    if folder is not None and accelerator.is_main_process:
        _save(folder, run, models, tokenizer)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return run


class Students(nn.Module):
    """All students, and the maps of each from its hidden states to the teacher's, as one module: so DDP sums all their
    gradients in one pass.
    """

    def __init__(self, models: Sequence[Any], teacher_width: int, settings: DistillSettings) -> None:
        super().__init__()
        self.models, self.settings, self.scratch = nn.ModuleList(models), settings, Scratch()
        self.hooks = tuple(match.hook for match in settings.hidden)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.maps = nn.ModuleList(
                (
                    nn.ModuleList(nn.Linear(m.config.hidden_size, teacher_width, bias=False) for _ in self.hooks)
                    if self.hooks
                    else nn.ModuleList()
                )
                for m in models
            )

    def forward(
        self,
        tokens: Int[Tensor, "row position"],
        counted: Bool[Tensor, "row position"],
        labels: Int[Tensor, " token"],
        teacher: Output,
        total: int,
    ) -> Float[Tensor, " student"]:
        """The training loss of each student, in float64: its sum over these tokens, divided by `total`."""
        outputs = [output_of(model, tokens, counted, self.hooks) for model in self.models]
        losses = chunked_losses(
            teacher, outputs, labels, self.settings.loss, total, self.settings.chunk_tokens, self.scratch
        )
        if not self.hooks:
            return losses
        matched = []
        for output, maps in zip(outputs, self.maps, strict=True):
            terms = [
                match.weight
                * MATCHES[match.kind](to_teacher(output.states[match.hook]).float(), teacher.states[match.hook].float())
                .double()
                .sum()
                / total
                for match, to_teacher in zip(self.settings.hidden, maps, strict=True)  # type: ignore[call-overload]
            ]
            matched.append(torch.stack(terms).sum())
        return losses + torch.stack(matched)

    def parameters_of_each(self) -> list[list[nn.Parameter]]:
        """The parameters of each student, its maps included."""
        return [[*model.parameters(), *maps.parameters()] for model, maps in zip(self.models, self.maps, strict=True)]


@torch.no_grad()
def evaluate(
    teacher: Any, students: Students, held: data.Rows, settings: DistillSettings, accelerator: Any
) -> list[float]:
    """Forward KL from the teacher at T = 1 on the held-out rows, of each student, in nats per token."""
    students.eval()
    total = torch.zeros(len(students.models), dtype=torch.float64, device=accelerator.device)
    for start in range(
        accelerator.process_index * settings.batch_rows,
        len(held.tokens),
        accelerator.num_processes * settings.batch_rows,
    ):
        tokens, mask, labels = _tensors(held.trimmed(slice(start, start + settings.batch_rows)), accelerator.device)
        outputs = [output_of(model, tokens, mask) for model in (teacher, *students.models)]
        total += chunked_losses(
            outputs[0],
            outputs[1:],
            labels,
            HELDOUT_LOSS,
            total=1,
            chunk=settings.chunk_tokens,
            scratch=students.scratch,
        )
    students.train()
    kl: list[float] = (accelerator.reduce(total, "sum") / int(held.predicted.sum())).tolist()
    return kl


def fingerprint(model: Any) -> str:
    """SHA-256 over a model's parameters."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(
            name.encode() + parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def _accelerator(
    model: Any, settings: DistillSettings, shard_teacher: bool, trackers: Sequence[Any], folder: Path | None
) -> Any:
    """Accelerate's handle of this process: alone, or one of several that `accelerate launch` started."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    if missing := [name for name in trackers if isinstance(name, str) and name not in installed]:
        raise CapacityError(
            f"the tracker {missing[0]!r} is not installed: install it, or choose one of"
            f" {', '.join(installed) or 'none'}"
        )
    waits_for_gpus = shard_teacher and torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=next(model.parameters()).device.type == "cpu" and not waits_for_gpus,
        mixed_precision=settings.mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder or tempfile.gettempdir(),
    )
    if trackers:
        accelerator.init_trackers("tl-capacity", config={name: str(value) for name, value in asdict(settings).items()})
    return accelerator


def _shard(model: Any, accelerator: Any) -> None:
    """Leave each process a part of every block, which are gathered one at a time in a forward pass; embeddings and head
    stay whole.

    Raises:
        CapacityError: where there is one process, or no family says where the blocks are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    family = plugins().family_of(model.config.model_type)
    if accelerator.num_processes == 1:
        raise CapacityError(
            "one process has nobody to share the teacher with: start several with accelerate launch, or leave the"
            " teacher whole"
        )
    if family is None:
        raise CapacityError(
            f"no model family says where {model.config.model_type!r} has its blocks: register one (docs/families.md),"
            " or leave the teacher whole"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in model.get_submodule(family.blocks):
        fully_shard(block, mesh=mesh)
    model.to(accelerator.device)


def _named(teacher: Any) -> tuple[str, Any, Any]:
    """`(name, tokenizer or None, model)` of a teacher."""
    if isinstance(teacher, LoadedModel):
        return teacher.name, teacher.tokenizer, teacher.model
    return getattr(teacher, "name_or_path", "") or type(teacher).__name__, None, teacher


def new_students(
    teacher: Any, widths: Sequence[int], settings: DistillSettings, tokens: Int[Tensor, "row position"]
) -> tuple[tuple[StudentCurve, ...], list[Any]]:
    """The students before training, and what is known of them; those that start truncated see their teacher's stream on
    `tokens`.

    Raises:
        CapacityError: where there are none of these widths, or seeds make no difference.
    """
    if len(set(widths)) < len(widths) or not (widths or settings.control):
        raise CapacityError(
            f"widths = {','.join(map(str, widths))} name no students, or one twice: pass different widths such as 32,64"
        )
    if unknown := set(settings.seeded_widths) - set(widths):
        raise CapacityError(
            f"seeded_widths = {','.join(map(str, sorted(unknown)))} are not among the widths"
            f" {','.join(map(str, widths))}: name some of these"
        )
    seeded = set(settings.seeded_widths or widths)
    wanted = [
        (f"width{width}-seed{seed}", width, seed, settings.start)
        for width in widths
        for seed in (settings.seeds if width in seeded else settings.seeds[:1])
    ]
    if settings.control:
        wanted.append(("control", int(teacher.config.hidden_size), settings.seeds[0], "teacher"))
    curves, models = [], []
    for name, width, seed, start in wanted:
        models.append(new_student(teacher, width, seed, start, tokens))
        curves.append(StudentCurve(name, width, seed, start, *parameters_of(models[-1])))
        if seed != settings.seeds[0] and all(map(torch.equal, models[-1].parameters(), models[-2].parameters())):
            raise CapacityError(
                f"students of width {width} start alike with every seed, as all of their weights are the teacher's:"
                " name others as seeded_widths"
            )
    return tuple(curves), models


def _shown(text: data.Rows) -> Int[Tensor, "row position"]:
    """Whole rows at the beginning of a text, in which the directions of a teacher's stream are taken."""
    whole = text.tokens[(text.tokens != PADDING).all(1)]
    return torch.from_numpy((whole if len(whole) else text.trimmed(slice(0, 1)))[:SHOWN_ROWS].astype(np.int64))


def _tensors(rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [row, position], which positions have a next token to predict, and those next tokens [token]."""
    tokens = torch.from_numpy(rows).to(device)
    real = tokens != PADDING
    mask = torch.zeros_like(real)
    mask[:, :-1] = real[:, 1:]
    return tokens.clamp(min=0), mask, tokens[:, 1:][mask[:, :-1]]


def _check_hidden(model: Any, hidden: Sequence[HiddenMatch]) -> None:
    """Teacher and students run without a bridge around them, which only the residual stream can be read from."""
    family = plugins().family_of(model.config.model_type)
    for match in hidden:
        if family is not None and family.residual(match.hook) is None:
            raise HookPointError(
                f"hidden states cannot be matched at {match.hook!r}, which is no residual-stream hook point: choose one"
                " such as blocks.1.hook_resid_post"
            )


def _check_tokens(model: Any, *texts: data.Rows) -> None:
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
    for rows in texts:
        check_token_ids(model, rows.tokens[rows.tokens != PADDING], "the teacher")
        if rows.tokens.shape[1] > positions:
            raise CapacityError(
                f"rows have {rows.tokens.shape[1]} positions, more than the teacher's {positions}: choose a shorter"
                " context"
            )


def _check_folder(folder: Path | None, resume: bool) -> None:
    if folder is None:
        if resume:
            raise CapacityError("there is nothing to resume without a folder: pass out")
        return
    if not resume and ((folder / JSON_NAME).exists() or (folder / checkpoint.JSON_NAME).exists()):
        raise CapacityError(f"{folder} already holds a distillation: go on with --resume, or choose another --out")
    make_folder(folder)


def _check_same(earlier: DistillationRun, now: DistillationRun) -> None:
    """Whether a run can go on from an earlier one."""

    def decisive(run: DistillationRun) -> dict[str, Any]:
        names = [f"{s.name} ({s.parameters:,} parameters)" for s in run.students]
        of_run = {name: getattr(run, name) for name in ("teacher", "fingerprint", "train_digest", "heldout_digest")}
        return {"students": names, **of_run, **run.settings}

    was, is_ = decisive(earlier), decisive(now)
    changed = [
        f"{name} {was.get(name)!r}, and this one has {value!r}" for name, value in is_.items() if was.get(name) != value
    ]
    if changed:
        raise CapacityError(
            f"the folder holds a distillation with {changed[0]}: resume with the same settings, teacher and text, or"
            " choose another --out"
        )


def _check_finite(
    state: checkpoint.State, losses: Sequence[float], norms: Sequence[float], folder: Path | None
) -> None:
    for student, loss, norm in zip(state.run.students, losses, norms, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = f" (the last good checkpoint stays in {folder})" if folder else ""
            raise CapacityError(
                f"{student.name} diverged at step {state.step}, with loss {loss:g} and gradient norm {norm:g}: choose a"
                f" lower --lr{kept}"
            )


def _check_weights(state: checkpoint.State, students: Students, folder: Path | None) -> None:
    """A step whose loss was finite may still have thrown the weights out of range."""
    finite = [all(bool(torch.isfinite(p).all()) for p in parameters) for parameters in students.parameters_of_each()]
    _check_finite(state, [0.0 if ok else math.nan for ok in finite], [0.0 if ok else math.inf for ok in finite], folder)


def _save(folder: Path, run: DistillationRun, models: Sequence[Any], tokenizer: Any) -> None:
    """The students, each as `save_pretrained` writes it, then the run, and then the checkpoint is
    not needed any more.
    """
    for curve, model in zip(run.students, models, strict=True):
        place = folder / "students" / curve.name
        with new_folder(place) as whole, written(place):
            model.eval().save_pretrained(whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
    run.save(folder)
    checkpoint.remove(folder)
