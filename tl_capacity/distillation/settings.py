"""Settings of a distillation, each with its option's help text; torch is not imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.options import internal, option
from tl_capacity.storage.files import read_json

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
MATCH_KINDS = ("mse", "cosine")
SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True)
class LogitLoss:
    """(1−λ) · T² · D(teacher ‖ student at temperature T) + λ · cross-entropy of the text at T = 1 (Hinton et al. 2015,
    arXiv:1503.02531).

    Attributes:
        divergence: D, one of `DIVERGENCES`.
        temperature: T; the factor T² keeps the size of the gradient.
        beta: of the generalised Jensen–Shannon divergence.
        ce_weight: λ.

    Raises:
        CapacityError: on an unknown divergence or a value outside its domain.
    """

    divergence: str = option(
        "forward_kl", "Divergence between next-token distributions: forward_kl, reverse_kl or jsd."
    )
    temperature: float = option(
        1.0,
        "Temperature of the training loss, which is multiplied by the temperature's square. Students are judged at 1.",
    )
    beta: float = option(0.5, "β of jsd: 0 is forward KL, 1 is reverse KL.")
    ce_weight: float = option(0.0, "Share of the text's cross-entropy in the loss.")

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise CapacityError(
                f"{self.divergence!r} is not a loss to distil with: choose one of {', '.join(DIVERGENCES)}"
            )
        if not 0 < self.temperature < math.inf:
            raise CapacityError(
                f"temperature = {self.temperature:g} does not scale logits: choose a number above 0, such as 1 or 2"
            )
        if not 0 <= self.ce_weight <= 1:
            raise CapacityError(
                f"ce_weight = {self.ce_weight:g} is not a share of the loss: choose a number from 0 to 1"
            )
        if not 0 <= self.beta <= 1:
            raise CapacityError(
                f"beta = {self.beta:g} does not mix teacher and student: choose a number from 0 (forward KL) to 1"
                " (reverse KL)"
            )


@dataclass(frozen=True)
class HiddenMatch:
    """Also match hidden states at one hook point.

    A linear map from the student's width to the teacher's is learned with the student.

    Attributes:
        hook: a residual-stream hook point, by TransformerLens' name, in teacher and student.
        kind: "mse" or "cosine".
        weight: what the loss per token is multiplied by.

    Raises:
        CapacityError: on an unknown kind or a weight that is not positive.
    """

    hook: str
    kind: str = "mse"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in MATCH_KINDS:
            raise CapacityError(
                f"{self.kind!r} is not a loss between hidden states: choose one of {', '.join(MATCH_KINDS)}"
            )
        if not self.weight > 0:
            raise CapacityError(f"weight = {self.weight:g} of {self.hook} has no effect: choose a number above 0")

    @classmethod
    def parse(cls, text: str) -> HiddenMatch:
        """Read `HOOK[=KIND[*WEIGHT]]` from the command line, as in `blocks.3.hook_resid_post=cosine*0.5`."""
        hook, _, rest = text.partition("=")
        kind, _, weight = rest.partition("*")
        try:
            return cls(hook, kind or "mse", float(weight or 1))
        except ValueError as problem:
            if isinstance(problem, CapacityError):
                raise
            raise CapacityError(
                f"{text!r} does not name hidden states to match: write HOOK=mse or HOOK=cosine*0.5"
            ) from problem


@dataclass(frozen=True)
class KeepFeatures:
    """Also keep some features of one of the teacher's dictionaries.

    A linear readout is learned with the student. It must tell from the student's activation at the hook point when each
    feature fires and how strongly.

    Attributes:
        hook: where the teacher's dictionary reads, and where the student is read.
        features: numbers of the features in the dictionary.
        weight: of the loss, in nats per token: what a student pays of which the readout tells nothing.

    Raises:
        CapacityError: where no feature is named, or one twice, or the weight is not positive.
    """

    hook: str
    features: tuple[int, ...]
    weight: float = option(
        1.0,
        "Weight of the loss of kept features: what a student pays, in nats per token, if they cannot be read from it"
        " at all.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(int(feature) for feature in self.features))  # numpy's are no JSON
        if not self.features:
            raise CapacityError(f"no feature to keep at {self.hook} is named: name at least one")
        if twice := sorted({feature for feature in self.features if self.features.count(feature) > 1}):
            raise CapacityError(f"feature {twice[0]} is named twice at {self.hook}: name each feature once")
        if min(self.features) < 0:
            raise CapacityError(f"{min(self.features)} is not a feature number at {self.hook}: they start at 0")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise CapacityError(
                f"weight = {self.weight:g} keeps no features at {self.hook}: choose a number above 0, such as 1"
            )

    @classmethod
    def load(cls, path: str | Path, hook: str = "") -> tuple[KeepFeatures, ...]:
        """Read a JSON file: an object with `hook` and `features`, or a list of such objects.

        Args:
            hook: where an object names none, or the file is a bare list of features.

        Raises:
            CapacityError: where it cannot be read, or names no features.
        """
        content = read_json(Path(path))
        whole = content if isinstance(content, list) and content and isinstance(content[0], dict) else [content]
        return tuple(cls._of_json(path, part, hook) for part in whole)

    @classmethod
    def _of_json(cls, path: str | Path, part: Any, hook: str) -> KeepFeatures:
        features = part.get("features") if isinstance(part, dict) else part
        hook = part.get("hook", hook) if isinstance(part, dict) else hook
        if not isinstance(features, list) or not all(type(feature) is int for feature in features):
            raise CapacityError(
                f'{path} names no features: write {{"hook": "blocks.3.hook_resid_post", "features": [17, 40]}}'
            )
        if not (isinstance(hook, str) and hook):
            raise CapacityError(f'{path} does not say where its features are: add "hook": "blocks.3.hook_resid_post"')
        return cls(hook, tuple(features))

    def weighing(self, weight: float) -> KeepFeatures:
        """The same features with another weight."""
        return replace(self, weight=weight)


@dataclass(frozen=True)
class DistillSettings:
    """Everything that decides the students, except teacher, widths and text.

    Attributes:
        tokens: predicted tokens to train on.
        seeds: of the initial weights; each width is trained once for each.
        seeded_widths: the only widths that are, if any are named; the others are trained with the first seed.
        loss: between the next-token distributions.
        hidden: hidden states to match besides.
        keep: features of the teacher's dictionaries to keep besides.
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
        mixed_precision: "no", or "bf16" for the students' blocks under autocast and for the inputs of the heads'
            products (`rounded_products`); weights, optimiser, sums and losses stay float32.

    Raises:
        CapacityError: on a value outside its domain.
    """

    tokens: int = option(1_000_000, "Predicted tokens to train on.")
    seeds: tuple[int, ...] = option((0,), "Seeds of the initial weights. Each width is trained once per seed.", least=0)
    seeded_widths: tuple[int, ...] = option(
        (), "Widths that are trained with every seed. The others get only the first. Default: all widths."
    )
    loss: LogitLoss = internal(LogitLoss())
    hidden: tuple[HiddenMatch, ...] = option((), "Also match hidden states: HOOK=mse or HOOK=cosine*0.5.")
    keep: tuple[KeepFeatures, ...] = option(
        (),
        "Also keep features of the teacher: a JSON file with hook and features, or concept:NAME for the features that"
        " carry a concept.",
    )
    start: str = option(
        "random",
        "The students' first weights: random, or truncated (the teacher's, in the leading directions of its residual"
        " stream).",
    )
    control: bool = option(
        False, "Also train a control: a student of the teacher's width that starts with the teacher's weights."
    )
    lr: float = option(3e-3, "Peak learning rate of AdamW.")
    warmup: float = option(0.05, "Share of the steps over which the learning rate rises.")
    schedule: str = option("cosine", "How the learning rate falls: cosine or wsd.")
    decay: float = internal(0.2)
    weight_decay: float = option(0.01, "Weight decay of AdamW.", least=0)
    betas: tuple[float, float] = internal((0.9, 0.95))
    clip: float = internal(1.0)
    batch_rows: int = option(8, "Rows in a step, over all processes.")
    evaluations: int = option(40, "How often to judge the students during training, evenly spaced.")
    heldout_tokens: int = option(16_384, "Predicted tokens to judge the students on.")
    repeat: bool = option(False, "Repeat the source if it is shorter than --tokens.")
    seed: int = option(0, "Seed of the order of the rows.", least=0)
    mixed_precision: str = option(
        "no", "Mixed precision: no, or bf16 for the products of the students' blocks and heads."
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise CapacityError(
                f"{self.schedule!r} is not a learning-rate schedule: choose one of {', '.join(SCHEDULES)}"
            )
        if self.start not in ("random", "truncated"):
            raise CapacityError(f"{self.start!r} is not a way to start all students: choose random or truncated")
        if self.mixed_precision not in ("no", "bf16"):
            raise CapacityError(f"{self.mixed_precision!r} is not a precision to train in: choose no or bf16")
        for name in ("tokens", "batch_rows", "evaluations", "heldout_tokens", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise CapacityError(f"{name} = {getattr(self, name)} trains nothing: choose a finite number above 0")
        if not 0 <= self.warmup < 1 or not 0 < self.decay <= 1 or self.warmup + self.decay > 1:
            raise CapacityError(
                f"warmup = {self.warmup:g} and decay = {self.decay:g} are not shares of one run: choose numbers from 0"
                " to 1 that add up to at most 1"
            )
        if len({keep.hook for keep in self.keep}) < len(self.keep):
            hooks = [keep.hook for keep in self.keep]
            twice = next(hook for hook in hooks if hooks.count(hook) > 1)
            raise CapacityError(f"{twice} is named twice among the features to keep: list its features together")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise CapacityError(f"seeds = {self.seeds} are not one or several different numbers: pass each seed once")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step, as a share of the peak."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        return min(1.0, (steps - step) / (self.decay * steps))
