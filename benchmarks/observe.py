"""What judging students costs beside the bare forward passes of the same models:
`python benchmarks/observe.py [--json]`.

GPT-NeoX teacher d=768, 12 layers, vocabulary 50,304, random weights, and a student d=128 or d=384; batches of 8×256
tokens, float32, two threads. *Bare* is both models' forward pass with all of their logits, and nothing done to these.
Judging gives KL, both cross-entropies and agreement of every token. `--cpu 1` counts the processor's time of one
thread, for a machine that does other things besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import Row, arguments, at_most, growth_apart, interleaved, median_ratio, peak_growth_mb, report
from distill import ROWS, VOCABULARY, teacher, token_ids

from tl_capacity.distillation.comparison import Predictor, compare_models
from tl_capacity.distillation.students import new_student
from tl_capacity.runtime.scratch import Scratch

WIDTHS = (128, 384)


def judging(models: list[Any], tokens: torch.Tensor) -> Callable[[], object]:
    """A batch as `observe` takes it."""
    predictors, scratch = [Predictor.of(model, tokens[:1]) for model in models], Scratch()
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, -1] = False
    labels = tokens[:, 1:].flatten()
    return lambda: compare_models(predictors, tokens, counted, labels, VOCABULARY, scratch).figures()


def bare(models: list[Any], tokens: torch.Tensor) -> Callable[[], object]:
    """The forward passes alone; the logits of one model are gone before those of the next come."""

    @torch.no_grad()
    def once() -> object:
        for model in models:
            model(tokens, use_cache=False)
        return None

    return once


def memory(which: str) -> float:
    """Peak growth of one way, in MB; run in a process of its own."""
    models = pair(WIDTHS[0])
    make: dict[str, Callable[[list[Any], torch.Tensor], Callable[[], object]]] = {"judging": judging, "bare": bare}
    step = make[which](models, token_ids())
    make[which](models, token_ids(1)[:, :8])()  # the libraries' own buffers belong to the loaded state
    return peak_growth_mb(step)


def pair(width: int) -> list[Any]:
    """The teacher and an untrained student."""
    of = teacher()
    return [of, new_student(of, width).eval().requires_grad_(False)]


def main() -> None:
    asked = arguments(__doc__, 5, rows=ROWS, cpu=0)
    if asked.memory_of:
        print(memory(asked.memory_of))
        return

    growth = growth_apart(__file__, ("judging", "bare"))
    if asked.cpu:
        torch.set_num_threads(1)
    tokens, times = token_ids(asked.rows), dict[str, list[float]]()
    for width in WIDTHS:
        models = pair(width)
        ways = {
            f"judging, student of {width}": judging(models, tokens),
            f"bare, student of {width}": bare(models, tokens),
        }
        times |= interleaved(ways, asked.repetitions, clock=time.process_time if asked.cpu else time.perf_counter)
    rows: list[Row] = []
    for width in WIDTHS:
        ratio = median_ratio(times[f"judging, student of {width}"], times[f"bare, student of {width}"])
        rows.append(at_most(f"judging / bare forward passes, student of {width} {ratio.interval}", ratio.value, 1.15))
    rows.append(at_most("growth of peak RSS / bare forward passes", growth["judging"] / growth["bare"], 0.6))
    shown = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    report("observe", rows, {**shown, **{f"peak RSS growth of {k}, MB": v for k, v in growth.items()}}, asked.json)


if __name__ == "__main__":
    main()
