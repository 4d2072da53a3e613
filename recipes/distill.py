"""Distils a teacher into students of several widths at once:
`tl-capacity run distill --teacher … --widths … --tokens … --out …`.

Also under `accelerate launch -m tl_capacity run distill …`, where each process takes a part of every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tl_capacity.distillation.run import DistillationRun
from tl_capacity.recipe import option, run_file


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides the students."""

    teacher: str = option("embedded", "A model name, folder or hub id.")
    widths: tuple[int, ...] = option((16, 24, 32, 48, 64, 96, 128), "Student widths.")
    tokens: int = option(1_000_000, "Predicted tokens to train on.")
    out: Path = option(Path("runs/distillation"), "The folder to write.")
    resume: bool = option(False, "Go on from the checkpoint in --out.")
    source: str = option("", "The token source to train on; by default the corpus that belongs to the teacher.")
    heldout: str = option(
        "",
        "The token source to judge the students by; by default some whole documents of --source, which are then not"
        " trained on.",
    )
    heldout_tokens: int = option(16_384, "Predicted tokens to judge the students by.")
    evaluations: int = option(40, "How often to do so, evenly spaced.")
    repeat: bool = option(False, "Read a source that is shorter than --tokens several times.")
    seeds: tuple[int, ...] = option((0,), "Of the initial weights; each width is trained once for each.")
    seeded_widths: tuple[int, ...] = option(
        (), "Widths that are trained with every seed, the others with the first; by default all."
    )
    start: str = option(
        "random",
        "Of the students' weights: random, or truncated, the teacher's in the leading directions of its residual"
        " stream.",
    )
    control: bool = option(False, "Also train a student of the teacher's width that starts with its weights.")
    loss: str = option("forward_kl", "Between next-token distributions: forward_kl, reverse_kl or jsd.")
    temperature: float = option(
        1.0, "Of the training loss, which is multiplied by its square; students are judged at 1."
    )
    beta: float = option(0.5, "Of jsd: 0 is forward KL, 1 is reverse KL.")
    ce_weight: float = option(0.0, "Share of the text's cross-entropy in the loss.")
    hidden: tuple[str, ...] = option((), "Hidden states to match besides, as HOOK=mse or HOOK=cosine*0.5.")
    lr: float = option(3e-3, "Peak learning rate of AdamW.")
    warmup: float = option(0.05, "Share of the steps over which the learning rate rises.")
    schedule: str = option("cosine", "Of the learning rate: cosine or wsd.")
    weight_decay: float = option(0.01, "Of AdamW.")
    batch_rows: int = option(8, "Rows in a step, over all processes.")
    context: int = option(256, "Positions in a row, BOS included.")
    seed: int = option(0, "Of the order of the rows.")
    device: str = option("cpu", "Where teacher and students run.")
    dtype: str = option("float32", "Of the teacher's weights; the students' are float32.")
    shard_teacher: bool = option(False, "Spread a teacher that was loaded on the CPU over the processes (FSDP).")
    mixed_precision: str = option("no", "no, or bf16 for the students' blocks.")
    checkpoint_seconds: float = option(60.0, "Save a checkpoint this often.")
    trackers: tuple[str, ...] = option((), "Also report to these trackers of Accelerate's, such as wandb,tensorboard.")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.")


def main(config: DistillConfig) -> DistillationRun:
    """Distil a teacher into students of several widths and print their observed floors.

    Raises:
        CapacityError: on settings that do not fit, an unknown model or source, text that is too short, or a loss that
            is no longer finite.
    """
    import torch

    from tl_capacity.distillation import DistillSettings, HiddenMatch, LogitLoss, distill
    from tl_capacity.models.loading import load_model
    from tl_capacity.text.streams import TokenStream

    if config.threads:
        torch.set_num_threads(config.threads)
    settings = DistillSettings(
        tokens=config.tokens,
        seeds=config.seeds,
        seeded_widths=config.seeded_widths,
        loss=LogitLoss(config.loss, config.temperature, config.beta, config.ce_weight),
        hidden=tuple(HiddenMatch.parse(text) for text in config.hidden),
        start=config.start,
        control=config.control,
        lr=config.lr,
        warmup=config.warmup,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        batch_rows=config.batch_rows,
        evaluations=config.evaluations,
        heldout_tokens=config.heldout_tokens,
        repeat=config.repeat,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
    )
    teacher = load_model(config.teacher, device=config.device, dtype=config.dtype)
    run = distill(
        teacher,
        config.widths,
        TokenStream(teacher.source(config.source), teacher.tokenizer, context=config.context),
        heldout=TokenStream(config.heldout, teacher.tokenizer, context=config.context) if config.heldout else None,
        settings=settings,
        out=config.out,
        resume=config.resume,
        shard_teacher=config.shard_teacher,
        checkpoint_seconds=config.checkpoint_seconds,
        trackers=config.trackers,
    )
    show(run)
    print(f"written to {config.out}")
    return run


def show(run: DistillationRun) -> None:
    """Print the observed floors."""
    from rich.console import Console

    from tl_capacity.distillation.observed import floor_cells, observed_floors
    from tl_capacity.show.tables import table

    tokens = run.students[0].tokens[-1]
    repeated = f", {tokens / run.distinct_tokens:.1f} times over" if tokens > run.distinct_tokens else ""
    title = (
        f"Observed floors of {run.teacher}, d={run.teacher_width}, after {tokens:,} tokens{repeated}; "
        f"KL in nats per token on {run.heldout_tokens:,} held-out tokens"
    )
    console = Console(width=140)
    console.print(table(title, *floor_cells(observed_floors(run))))


if __name__ == "__main__":
    run_file(main)
