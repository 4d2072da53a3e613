"""What the time beyond the limits is spent on, by PyTorch's own profiler.

python benchmarks/rest.py: a batch of counting beside its limit, the head of distilling beside its four GEMMs, and
recovering beside the teacher's measurement, in the shapes of measure.py, distill.py and probe.py. For each operation of
PyTorch its own time, less what the limit spends on the same operation. The profiler makes all of it slower, so that
shares count and not seconds. All of it runs on one core, as the profiler sees only the thread that calls it. How fast
this machine multiplies matrices and moves memory, on all cores, stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import probe
import torch
from common import Sitting, arguments, fact
from distill import WIDTHS
from heads import HeadShapes, four_gemms, ours, with_gradients
from measure import limit
from neox import Shapes, counting, hugging_face, shapes_of, sharing, sparse_autoencoder
from torch.profiler import ProfilerActivity, profile

from tl_capacity.distillation.students import new_student

Seconds = dict[str, float]
"""Seconds by operation."""
SHOWN = 7
"""Operations that have a row of their own."""
PRODUCT, PRODUCTS = "matrix products", ("mm", "addmm", "bmm", "baddbmm")
BYTES = 4
"""Of a float32."""


def own_seconds(step: Callable[[], object], batches: int) -> Seconds:
    """Own seconds of each operation in one step, and under "Python" what passes between operations."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        for _ in range(batches):
            step()
        whole = time.perf_counter() - started
    found: Seconds = {}
    for each in profiled.key_averages():
        name = each.key.removeprefix("aten::")
        name = PRODUCT if name in PRODUCTS else name
        found[name] = found.get(name, 0.0) + each.self_cpu_time_total / 1e6 / batches
    return found | {"Python": max(0.0, whole / batches - sum(found.values()))}


def together(first: Seconds, second: Seconds, sign: int = 1) -> Seconds:
    """The sum, or the difference, for each operation."""
    return {name: first.get(name, 0.0) + sign * second.get(name, 0.0) for name in first | second}


def compare(sitting: Sitting, name: str, whole: Seconds, bare: Seconds) -> None:
    """Add a row on the whole, and a time for each operation that takes longest beyond the bare parts."""
    more = together(whole, bare, -1)
    over, least = sum(more.values()), sum(bare.values())
    sitting.rows.append(fact(f"{name}: time beyond the limit / limit, in the profiler", over / least))
    largest = sorted(more.items(), key=lambda item: -item[1])[:SHOWN]
    for operation, seconds in largest:
        sitting.seconds[f"{name}, beyond the limit: {operation}"] = seconds
    sitting.seconds[f"{name}, beyond the limit: all else"] = over - sum(seconds for _, seconds in largest)


def rates(sitting: Sitting, shapes: Shapes, repeats: int) -> None:
    """Add rows on how fast the machine multiplies matrices and copies memory."""
    size = shapes.rows * shapes.context
    a, b = torch.randn(size, shapes.d_model), torch.randn(shapes.d_model, shapes.d_sae)
    product = torch.empty(size, shapes.d_sae)
    copy = torch.empty_like(product)

    def seconds(step: Callable[[], object]) -> float:
        step()
        times = []
        for _ in range(repeats):
            before = time.perf_counter()
            step()
            times.append(time.perf_counter() - before)
        return median(times)

    multiplying, copying = seconds(lambda: torch.mm(a, b, out=product)), seconds(lambda: copy.copy_(product))
    exponentials = seconds(lambda: torch.exp(product[:32], out=copy[:32])) / 32 * size
    sitting.rows += [
        fact("matrix products of float32, GFLOP/s", 2 * size * shapes.d_model * shapes.d_sae / multiplying / 1e9),
        fact("memory copied, read and written, GB/s", 2 * BYTES * product.numel() / copying / 1e9),
        fact("exponentials in the cache, billions a second", product.numel() / exponentials / 1e9),
    ]


def of_counting(sitting: Sitting, model: Any, sae: Any, shapes: Shapes, batches: int) -> None:
    """Counting at one layer."""
    bare = own_seconds(limit(model, sae, shapes), batches)
    with counting(sharing(model), {shapes.hook: sae}, shapes) as step:
        compare(sitting, "counting", own_seconds(step, batches), bare)


def of_head(sitting: Sitting, shapes: Shapes, student: int, batches: int) -> None:
    """The head and the divergence of distilling, and what its logits alone would take to cross memory."""
    sizes = HeadShapes(shapes.rows * shapes.context, shapes.d_model, student, shapes.vocabulary)
    bare = own_seconds(four_gemms(sizes), batches)
    compare(sitting, "head", own_seconds(with_gradients(ours(), sizes), batches), bare)
    sitting.notes.append(
        f"The logits of a batch are {BYTES * sizes.tokens * sizes.vocabulary / 1e9:.2f} GB. Between the products they"
        " cross memory seven times: the teacher's are read, its log-probabilities and its probabilities written and"
        " read, and the student's read and written."
    )


def of_recovering(sitting: Sitting, model: Any, sae: Any, shapes: Shapes, student: Any, tokens: int) -> None:
    """Recovering, beside the measurement and the student's forward pass."""
    stream = probe.batches(tokens, shapes)
    measure = probe.measuring(model, sae, stream, shapes.hook)
    measured, passed = measure(), probe.forward(student, stream, shapes.hook)
    bare = together(own_seconds(measure, 1), own_seconds(passed, 1))
    whole = own_seconds(probe.recovering(model, sae, {"a": student}, stream, measured, {}), 1)
    compare(sitting, "recovering", whole, bare)


def benchmark(sitting: Sitting) -> None:
    """Profile counting, the head, and recovering."""
    asked = sitting.asked
    shapes = shapes_of("cpu", asked.tiny)
    width = WIDTHS["tiny" if asked.tiny else "cpu"].one
    tokens = 4 * shapes.rows * shapes.context
    sitting.notes.append(f"{shapes.described()}; a student of d = {width}; recovering reads {tokens:,} tokens.")
    rates(sitting, shapes, asked.batches)
    torch.set_num_threads(1)
    model = hugging_face(shapes)
    sae = sparse_autoencoder("standard", model, shapes)
    of_counting(sitting, model, sae, shapes, asked.batches)
    of_head(sitting, shapes, width, asked.batches)
    of_recovering(sitting, model, sae, shapes, new_student(model, width).eval(), tokens)


def main() -> None:
    with Sitting("rest", arguments(__doc__, 60, tiny=True, batches=5)) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
