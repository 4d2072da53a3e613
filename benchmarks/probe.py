"""What reading features out of a student costs beside what must run anyway.

python benchmarks/probe.py: GPT-NeoX teacher d=768 and student d=128, 12 layers, vocabulary 50,304, random weights; a
ReLU SAE of 24,576 latents after layer 6 of which 0.8% are active; float32, two threads. *Recovering* is the whole of
it: both passes, the readouts of the student, the teacher and the teacher's principal components, their ridge and their
scores. What must run anyway is the teacher's measurement over the same tokens, and the student's forward pass up to the
hook point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Claim, Sitting, arguments, at_most, spread
from memory import growth_apart, peak_growth_mb
from neox import CPU, Shapes, hugging_face, shapes_of, sparse_autoencoder

from tl_capacity import add_capacity_hooks
from tl_capacity.distillation.students import new_student
from tl_capacity.probing.recover import recover_features
from tl_capacity.text.counting import CountingRule

WIDTH = 128


def batches(tokens: int, shapes: Shapes = CPU) -> list[torch.Tensor]:
    """Rows of so many token ids; each is a document."""
    size = (tokens // shapes.context, shapes.context)
    ids = torch.randint(1, shapes.vocabulary, size, generator=torch.Generator().manual_seed(3))
    return list(torch.split(ids, shapes.rows))


def measuring(teacher: Any, sae: Any, stream: list[torch.Tensor], hook: str = CPU.hook) -> Callable[[], Any]:
    """The measurement of the teacher."""

    def once() -> Any:
        with add_capacity_hooks(teacher, {hook: sae}, mask_token_ids=()) as capacity:
            return capacity.run(stream, progress=False).measurement()[hook]

    return once


def forward(student: Any, stream: list[torch.Tensor], hook: str = CPU.hook) -> Callable[[], object]:
    """The student's forward pass, cut after the hook point."""
    from tl_capacity.probing.passes import Reader
    from tl_capacity.text.streams import as_batches

    reader, rule = Reader.at_hook(student, hook, "the student", "student"), CountingRule()
    return lambda: [reader(rule.apply(batch), batch, 0, number) for number, batch in enumerate(as_batches(stream))]


def recovering(
    teacher: Any, sae: Any, students: dict[str, Any], stream: list[torch.Tensor], measured: Any, random: dict[str, Any]
) -> Callable[[], object]:
    """Recoverability of the students' features."""
    rule = CountingRule()
    return lambda: recover_features(
        teacher, sae, students, stream, measured=measured, random=random, rule=rule, progress=False
    )


def memory() -> float:
    """Peak growth of recovering, in MB. It runs in its own process."""
    teacher, stream = hugging_face(), batches(4 * CPU.rows * CPU.context)
    sae, student = sparse_autoencoder("standard", teacher), new_student(teacher, WIDTH).eval()
    measured = measuring(teacher, sae, stream)()
    return peak_growth_mb(recovering(teacher, sae, {"a": student}, stream, measured, {}))


def benchmark(sitting: Sitting) -> None:
    """Time recovering, without and with random weights, and its memory."""
    asked = sitting.asked
    shapes = shapes_of("cpu", asked.tiny)
    sitting.notes.append(f"{shapes.described()}; {asked.tokens:,} tokens.")
    teacher, stream = hugging_face(shapes), batches(asked.tokens, shapes)
    sae = sparse_autoencoder("standard", teacher, shapes)
    width = 16 if asked.tiny else WIDTH
    student, random = new_student(teacher, width).eval(), new_student(teacher, width, seed=1).eval()
    measured = measuring(teacher, sae, stream, shapes.hook)()
    first = stream if asked.tiny else stream[:4]
    few = measuring(teacher, sae, first, shapes.hook)()
    measurement, passed = "the teacher's measurement", "the student's forward pass"
    both = "recovering, with random weights too"
    sitting.time(
        {
            measurement: measuring(teacher, sae, stream, shapes.hook),
            passed: forward(student, stream, shapes.hook),
            "recovering": recovering(teacher, sae, {"a": student}, stream, measured, {}),
            both: recovering(teacher, sae, {"a": student}, stream, measured, {"a": random}),
        },
        [
            Claim(
                "recovering / measurement and student's forward pass",
                ("recovering",),
                (measurement, passed),
                at_most(1.25),
            ),
            Claim(
                "with random weights too / measurement and two forward passes",
                (both,),
                (measurement, passed, passed),
                at_most(1.35),
            ),
        ],
        warm={
            measurement: measuring(teacher, sae, first, shapes.hook),
            "recovering": recovering(teacher, sae, {"a": student}, first, few, {}),
            both: recovering(teacher, sae, {"a": student}, first, few, {"a": random}),
        },
    )
    if not asked.tiny:
        growth = spread("growth of peak RSS of recovering, MB", growth_apart(__file__, "recovering"), at_most(450))
        sitting.rows.append(growth)


def main() -> None:
    asked = arguments(__doc__, 180, tiny=True, tokens=32_768)
    if asked.memory_of:
        print(memory())
        return
    with Sitting("probe", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
