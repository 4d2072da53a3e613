"""CapacityCallback: logs how far a student is from its teacher while transformers' `Trainer` or one of TRL's trains it.

What it finds goes to the trainer's own log, and with it to whatever that reports to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from tl_capacity.distillation.observation import Party, judge_students, rows_to_judge
from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.recovery import TAU
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked

PREFIX = "capacity/"
"""Prefix of every name in the log."""


@dataclass(frozen=True)
class KeptFeatures:
    """What it takes to count the features that a student keeps. Counting costs two passes of both models over some
    text.

    Attributes:
        sae: an SAE of the teacher.
        measured: what was measured of it.
        stream: text that can be gone over twice, in which no student was trained.
        max_tokens: of it to read.
        student_hook: where the student is read; None for the teacher's hook point, or the best of its layers where it
            has more or fewer of them.
        tau: AUROC from which a feature counts as kept.
    """

    sae: SparseAutoencoder
    measured: HookMeasurement
    stream: Any
    max_tokens: int = 20_000
    student_hook: str | None = None
    tau: float = TAU


class CapacityCallback(TrainerCallback):
    """Logs the student's KL from its teacher on held-out text every so many steps, beside the predicted floor.

    `trainer.add_callback(CapacityCallback(trainer, teacher, stream, every=500, floor=0.52))` adds these to the
    trainer's log: `capacity/heldout_kl` with `_low` and `_high`, in nats per token; `capacity/agreement`;
    `capacity/above_teacher`, the cross-entropy above the teacher's. With a floor there are `capacity/predicted_floor`
    and `capacity/still_to_go`, the share of the way from the first KL to the floor that is left; with `kept`,
    `capacity/kept_features`.

    The student is run in evaluation mode without gradients, and its mode, all random states and the memory of gradients
    are as they were. Every process of a launch evaluates for itself, so all stay in step.
    """

    @checked
    def __init__(
        self,
        trainer: Any,
        teacher: Any,
        stream: Any,
        *,
        every: int = 500,
        tokens: int = 8_192,
        batch_rows: int = 8,
        floor: float | Estimate | None = None,
        kept: KeptFeatures | None = None,
    ) -> None:
        """Read the text, and check before any step that the student can be judged on it.

        Args:
            trainer: the trainer whose model is the student.
            teacher: a language model on the student's device, or what `load_model` returned.
            stream: text that the student is not trained on: a `TokenStream`, or rows of token ids [row, position].
            every: steps between two evaluations; there is one before the first step and one after the last.
            tokens: predicted tokens to judge on.
            batch_rows: rows in a forward pass.
            floor: predicted for the student's width, in nats per token.
            kept: also count the features that the student keeps.

        Raises:
            CapacityError: where the student needs other tokens than the teacher, or a number is none to evaluate with.
        """
        if every < 1 or tokens < 1 or batch_rows < 1:
            raise CapacityError(
                f"every = {every}, tokens = {tokens} and batch_rows = {batch_rows} evaluate nothing: choose numbers of"
                " at least 1"
            )
        self.trainer, self.every, self.batch_rows, self.kept = trainer, every, batch_rows, kept
        self.floor = Estimate(floor) if isinstance(floor, int | float) else floor
        self.teacher = Party.of("the teacher", teacher)
        self.rows = rows_to_judge(self.teacher, [self._student(trainer.model)], stream, tokens)

    def evaluate(self, model: Any) -> dict[str, float]:
        """The figures that are logged for the student as it is now, without the prefix."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            [judged], _, _ = judge_students(self.teacher, [self._student(model)], self.rows, self.batch_rows)
            found = _with_ends("heldout_kl", judged.figures["kl"])
            found |= {name: judged.figures[name].value for name in ("agreement", "above_teacher")}
            return found | self._kept(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Evaluate the student before its first step."""
        self._log(state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Evaluate every so many steps."""
        if state.global_step % self.every == 0:
            self._log(state, control, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Evaluate the final student, unless its last step was evaluated."""
        if state.global_step % self.every:
            self._log(state, control, model)

    def _student(self, model: Any) -> Party:
        """The trainer's model, with the trainer's tokenizer."""
        party = Party.of("the student", model)
        processor = getattr(self.trainer, "processing_class", None)
        tokenizer = processor if hasattr(processor, "get_vocab") else None
        return Party(party.who, party.name, party.model, tokenizer)

    def _log(self, state: Any, control: Any, model: Any) -> None:
        """Pass an evaluation to the trainer's own log."""
        found = self.evaluate(model)
        if self.floor is not None:
            found |= _with_ends("predicted_floor", self.floor)
            first = _first_kl(state.log_history, found["heldout_kl"])
            if first > self.floor.value:
                found["still_to_go"] = (found["heldout_kl"] - self.floor.value) / (first - self.floor.value)
        wanted = control.should_log
        self.trainer.log({PREFIX + name: value for name, value in found.items()})
        control.should_log = wanted  # `log` takes it for done, and the trainer's own loss would go unsaid

    def _kept(self, model: Any) -> dict[str, float]:
        """How many features a readout finds in the student, and in its teacher."""
        if self.kept is None:
            return {}
        kept = self.kept
        recovery = recover_features(
            self.teacher.model,
            kept.sae,
            {"student": model},
            kept.stream,
            measured=kept.measured,
            tau=kept.tau,
            max_tokens=kept.max_tokens,
            progress=False,
            student_hooks=None if kept.student_hook is None else {"student": kept.student_hook},
        )
        counts = {"kept_features": recovery.students[0].student, "kept_features_of_teacher": recovery.teacher}
        return {name: recovery.count(scores).value for name, scores in counts.items()}


def _first_kl(history: list[Mapping[str, Any]], now: float) -> float:
    """The first held-out KL that a trainer has logged, even before it was resumed; else the current one."""
    name = f"{PREFIX}heldout_kl"
    return next((float(entry[name]) for entry in history if name in entry), now)


def _with_ends(name: str, figure: Estimate) -> dict[str, float]:
    """A figure, and the ends of its interval if it has one."""
    ends = {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return {key: end for key, end in ends.items() if end is not None}
