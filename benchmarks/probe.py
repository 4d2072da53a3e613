"""What reading features out of a student costs beside what must run anyway: `python benchmarks/probe.py [--json]`.

GPT-NeoX teacher d=768 and student d=128, 12 layers, vocabulary 50,304, random weights; a ReLU SAE of 24,576 latents
after layer 6 of which 0.8% are active; float32, two threads. *Recovering* is the whole of it: both passes, the readouts
of the student, the teacher and the teacher's principal components, their ridge and their scores. What must run anyway
is the teacher's measurement over the same tokens, and the student's forward pass up to the hook point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Row, arguments, at_most, medians, peak_growth_mb, report
from measure import CONTEXT, HOOK, ROWS, VOCABULARY, hugging_face, sparse_autoencoder

from tl_capacity import add_capacity_hooks
from tl_capacity.distillation.students import new_student
from tl_capacity.probing.recover import recover_features

WIDTH = 128


def batches(tokens: int) -> list[torch.Tensor]:
    """Rows of so many token ids; each is a document."""
    ids = torch.randint(1, VOCABULARY, (tokens // CONTEXT, CONTEXT), generator=torch.Generator().manual_seed(3))
    return list(torch.split(ids, ROWS))


def measuring(teacher: Any, sae: Any, stream: list[torch.Tensor]) -> Callable[[], Any]:
    """The measurement of the teacher."""

    def once() -> Any:
        with add_capacity_hooks(teacher, {HOOK: sae}, mask_token_ids=()) as capacity:
            return capacity.run(stream, progress=False).measurement()[HOOK]

    return once


def forward(student: Any, stream: list[torch.Tensor]) -> Callable[[], object]:
    """The student's forward pass, cut after the hook point."""
    from tl_capacity.probing.passes import Reader
    from tl_capacity.text.counting import CountingRule
    from tl_capacity.text.streams import as_batches

    reader, rule = Reader.at_hook(student, HOOK, "the student", "student"), CountingRule()
    return lambda: [reader(rule.apply(batch), batch, 0, number) for number, batch in enumerate(as_batches(stream))]


def recovering(
    teacher: Any, sae: Any, students: dict[str, Any], stream: list[torch.Tensor], measured: Any, random: dict[str, Any]
) -> Callable[[], object]:
    """Recoverability of the students' features."""
    return lambda: recover_features(
        teacher, sae, students, stream, measured=measured, random=random, mask_token_ids=(), progress=False
    )


def main() -> None:
    asked = arguments(__doc__, 3, tokens=32_768)
    teacher, stream = hugging_face(), batches(asked.tokens)
    sae = sparse_autoencoder("standard", teacher)
    student, random = new_student(teacher, WIDTH).eval(), new_student(teacher, WIDTH, seed=1).eval()
    measured = measuring(teacher, sae, stream)()
    seconds = medians(
        {
            "the teacher's measurement": measuring(teacher, sae, stream),
            "the student's forward pass": forward(student, stream),
            "recovering": recovering(teacher, sae, {"a": student}, stream, measured, {}),
            "recovering, with random weights too": recovering(
                teacher, sae, {"a": student}, stream, measured, {"a": random}
            ),
        },
        asked.repetitions,
    )
    measurement, passed = seconds["the teacher's measurement"], seconds["the student's forward pass"]
    growth = peak_growth_mb(recovering(teacher, sae, {"a": student}, stream[:4], measured, {}))
    rows: list[Row] = [
        at_most(
            "recovering / measurement and student's forward pass", seconds["recovering"] / (measurement + passed), 1.6
        ),
        at_most(
            "with random weights too / measurement and two forward passes",
            seconds["recovering, with random weights too"] / (measurement + 2 * passed),
            1.6,
        ),
    ]
    report("probe", rows, {**seconds, "peak RSS growth of recovering, MB": growth}, asked.json)


if __name__ == "__main__":
    main()
