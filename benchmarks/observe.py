"""What judging students costs beside the bare forward passes of the same models.

python benchmarks/observe.py: GPT-NeoX teacher d=768, 12 layers, vocabulary 50,304, random weights, and a student d=128
or d=384; batches of 8×256 tokens, float32, two threads. *Bare* is both models' forward pass with all of their logits,
and nothing done to these. Judging gives KL, both cross-entropies and agreement of every token. --cpu 1 counts the
processor's time of one thread, for a machine that does other things besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import Claim, Sitting, arguments, at_most, spread
from distill import teacher, token_ids
from memory import growth_apart, peak_growth_mb
from neox import CPU, Shapes, shapes_of

from tl_capacity.distillation.comparison import Predictor, compare_models
from tl_capacity.distillation.students import new_student
from tl_capacity.runtime.scratch import Scratch

WIDTHS = (128, 384)
TINY_WIDTHS = (16, 32)


def judging(models: list[Any], tokens: torch.Tensor) -> Callable[[], object]:
    """A batch as `observe` takes it."""
    predictors, scratch = [Predictor.of(model, tokens[:1]) for model in models], Scratch()
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, -1] = False
    labels = tokens[:, 1:].flatten()
    vocabulary = int(models[0].config.vocab_size)
    return lambda: compare_models(predictors, tokens, counted, labels, vocabulary, scratch).figures()


def bare(models: list[Any], tokens: torch.Tensor) -> Callable[[], object]:
    """The forward passes alone. The logits of one model are freed before the next one's exist."""

    @torch.no_grad()
    def once() -> object:
        for model in models:
            model(tokens, use_cache=False)
        return None

    return once


def memory(which: str) -> float:
    """Peak growth of one way, in MB. It runs in its own process."""
    models = pair(WIDTHS[0])
    make: dict[str, Callable[[list[Any], torch.Tensor], Callable[[], object]]] = {"judging": judging, "bare": bare}
    return peak_growth_mb(make[which](models, token_ids()), make[which](models, token_ids(rows=1)[:, :8]))


def pair(width: int, shapes: Shapes = CPU) -> list[Any]:
    """The teacher and an untrained student."""
    of = teacher(shapes)
    return [of, new_student(of, width).eval().requires_grad_(False)]


def benchmark(sitting: Sitting) -> None:
    """Time two students being judged, and the memory of it."""
    asked = sitting.asked
    shapes = shapes_of("cpu", asked.tiny)
    sitting.notes.append(shapes.described() + ".")
    if asked.cpu:
        torch.set_num_threads(1)
    tokens, widths = token_ids(shapes, min(asked.rows, shapes.rows)), TINY_WIDTHS if asked.tiny else WIDTHS
    for width in widths:
        models, judged, plain = pair(width, shapes), f"judging, student of {width}", f"bare, student of {width}"
        sitting.time(
            {judged: judging(models, tokens), plain: bare(models, tokens)},
            [Claim(f"judging / bare forward passes, student of {width}", (judged,), (plain,), at_most(1.15))],
            share=1 / len(widths),
            clock=time.process_time if asked.cpu else None,
        )
    if not asked.tiny:
        growth, least = growth_apart(__file__, "judging"), growth_apart(__file__, "bare", 1)[0]
        ratios = [each / least for each in growth]
        sitting.rows.append(spread("growth of peak RSS / bare forward passes", ratios, at_most(0.6)))
        sitting.sizes |= {"peak RSS growth of judging": sorted(growth)[1], "peak RSS growth of bare": least}


def main() -> None:
    asked = arguments(__doc__, 50, tiny=True, rows=CPU.rows, cpu=0)
    if asked.memory_of:
        print(memory(asked.memory_of))
        return
    with Sitting("observe", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
