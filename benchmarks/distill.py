"""What a distillation step costs beside the plain loop, which holds all logits of teacher and student at once.

python benchmarks/distill.py: GPT-NeoX teacher d=768, 12 layers, vocabulary 50,304, random weights; a student d=128, or
five; batches of 8×256 tokens, float32, two threads. Both sides run the same forward passes (SDPA), clip, and step
AdamW; *four GEMMs* are the head's own products (logits of both, gradients of the student's hidden states and head),
into buffers that are there already.

With --device cuda: teacher d=2,304 in bfloat16, a student d=384 or five up to d=1,152 in float32 with bfloat16
autocast, batches of 8×1,024; the heads are compared in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Claim, Sitting, absent, arguments, at_most, fact, spread
from heads import HeadShapes, Loss, four_gemms, gradient_error, ours, ours_rounded, peers, with_gradients
from memory import device_growth_mb, growth_apart, peak_growth_mb
from neox import CPU, CUDA, Shapes, compiled, hugging_face, tiny
from torch.nn import functional as F

from tl_capacity.distillation.data import model_inputs
from tl_capacity.distillation.ensemble import Students
from tl_capacity.distillation.keeping import Kept
from tl_capacity.distillation.losses import LOSS_TOKENS
from tl_capacity.distillation.settings import DistillSettings, LogitLoss
from tl_capacity.distillation.students import new_student, output_of
from tl_capacity.models.head import last_hidden, tokens_at_once

SETTINGS = DistillSettings(loss=LogitLoss(temperature=2.0))  # the paper's
NUMBERS = {2: "two", 5: "five"}
STEPS = 4
"""Steps of one turn on a GPU. The device is waited for once for all of them, as `distill` reads losses now and then."""


@dataclass(frozen=True)
class Widths:
    """Widths of students. One of them is timed alone too."""

    one: int
    widths: tuple[int, ...]


WIDTHS = {
    "cpu": Widths(128, (64, 128, 256, 384, 512)),
    "cuda": Widths(384, (192, 384, 576, 768, 1152)),
    "tiny": Widths(16, (16, 32)),
}


def teacher(shapes: Shapes = CPU) -> Any:
    return hugging_face(shapes).requires_grad_(False)


def token_ids(shapes: Shapes = CPU, rows: int | None = None) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, shapes.vocabulary, (rows or shapes.rows, shapes.context), generator=random)
    return ids.to(shapes.device)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=SETTINGS.lr, betas=SETTINGS.betas, weight_decay=SETTINGS.weight_decay, fused=True
    )


def student_of(of: Any, width: int, shapes: Shapes) -> Any:
    """A student with random weights, made on its device."""
    with torch.device(shapes.device):
        return new_student(of, width)


def autocast(shapes: Shapes, rounded: bool = False) -> torch.autocast:
    """Compute the students' products in bfloat16, if their teacher is in it, or if they shall be `rounded`."""
    return torch.autocast(shapes.device, torch.bfloat16, enabled=rounded or shapes.dtype == torch.bfloat16)


def step_of(
    of: Any,
    widths: Sequence[int],
    tokens: torch.Tensor,
    shapes: Shapes = CPU,
    keep: Sequence[Kept] = (),
    rounded: bool = False,
    at_once: bool = False,
) -> Callable[[], object]:
    """A step as `distill` takes it. On a CPU its losses are read, which waits for nothing there.

    Args:
        rounded: with `--mixed-precision bf16`.
        at_once: compiled at once, or not at all.
    """
    students = Students([student_of(of, width, shapes) for width in widths], shapes.d_model, SETTINGS, keep)
    students.to(shapes.device)
    optimiser = adamw(students)
    rows = tokens.cpu().numpy()

    def step() -> object:
        ids, places, labels = model_inputs(rows, torch.device(shapes.device))
        with torch.no_grad():
            target = output_of(of, ids, places, students.hooks, students.points)
        with autocast(shapes, rounded), compiled(at_once):
            losses = students(ids, places, labels, target, len(labels))
        losses.sum().backward()
        norms = [
            torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip) for parameters in students.parameters_of_each()
        ]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return (losses.tolist(), [float(norm) for norm in norms]) if shapes.device == "cpu" else None

    return step


def plain(of: Any, width: int, tokens: torch.Tensor, shapes: Shapes = CPU) -> Callable[[], object]:
    """The loop that tutorials have: the softmax of both models over the whole batch, and `kl_div`."""
    student = student_of(of, width, shapes)
    optimiser = adamw(student)

    def step() -> object:
        with torch.no_grad():
            teacher_logits = of(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        temperature = SETTINGS.loss.temperature
        with autocast(shapes):
            student_logits = student(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            p, log_q = F.softmax(teacher_logits / temperature, -1), F.log_softmax(student_logits / temperature, -1)
            loss = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


def bare_step(of: Any, widths: Sequence[int], tokens: torch.Tensor, shapes: Shapes) -> Callable[[], object]:
    """What no step can do without: the teacher's forward pass, the students' both ways, AdamW, and the heads' products,
    into buffers that are there already. The gradient is of numbers that mean nothing.
    """
    students = [student_of(of, width, shapes) for width in widths]
    optimisers = [adamw(student) for student in students]
    place: dict[str, Any] = {"device": shapes.device, "dtype": of.get_output_embeddings().weight.dtype}
    chunk = tokens_at_once(tokens[:, 1:].numel(), shapes.vocabulary, tokens.device, LOSS_TOKENS)
    buffer = torch.empty(chunk, shapes.vocabulary, **place)
    of_weights = [torch.zeros(width, shapes.vocabulary, **place) for width in widths]

    def step() -> object:
        with torch.no_grad():
            target = last_hidden(of, tokens)[:, :-1].flatten(0, 1)
        chunks = range(0, len(target), chunk)
        with torch.no_grad():
            for start in chunks:
                rows = target[start : start + chunk]
                torch.mm(rows, of.get_output_embeddings().weight.T, out=buffer[: len(rows)])
        for student, optimiser, of_weight in zip(students, optimisers, of_weights, strict=True):
            with autocast(shapes):
                hidden = last_hidden(student, tokens)[:, :-1].flatten(0, 1).to(buffer)
            head, of_hidden = student.get_output_embeddings().weight, torch.empty_like(hidden)
            with torch.no_grad():
                for start in chunks:
                    rows = hidden[start : start + chunk]
                    logits = torch.mm(rows, head.to(buffer).T, out=buffer[: len(rows)])
                    torch.mm(logits, head.to(buffer), out=of_hidden[start : start + chunk])
                    of_weight.addmm_(rows.T, logits)
            hidden.backward(of_hidden)
            head.grad = torch.empty_like(head).copy_(of_weight.T)
            torch.nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return of_weights

    return step


def memory(which: str) -> float:
    """Peak growth of one kind of step, in MB. It runs in its own process."""
    of, one = teacher(), WIDTHS["cpu"].one
    make: dict[str, Callable[[torch.Tensor], Callable[[], object]]] = {
        "chunks": lambda tokens: step_of(of, (one,), tokens),
        "plain loop": lambda tokens: plain(of, one, tokens),
    }
    return peak_growth_mb(make[which](token_ids()), make[which](token_ids(rows=1)[:, :8]))


def own_heads(gpu: bool) -> dict[str, Loss]:
    """Our loss as it is timed, on a GPU compiled too."""
    return {"head": ours()} | ({"head, compiled": ours(at_once=True)} if gpu else {})


def time_heads(sitting: Sitting, shapes: HeadShapes, share: float) -> None:
    """Time the head beside its matrix products."""
    gpu, products = sitting.asked.device == "cuda", "its four GEMMs"
    best, goal = own_heads(gpu), None if gpu else at_most(1.10)
    ways = {name: with_gradients(loss, shapes) for name, loss in best.items()} | {products: four_gemms(shapes)}
    claims = [Claim(f"{way} / its four bare GEMMs", (way,), (products,), goal) for way in best]
    if not gpu:
        ways["head, rounded"] = with_gradients(ours_rounded(), shapes)
        claims.append(Claim("head, rounded / its four bare GEMMs", ("head, rounded",), (products,)))
    if gpu:
        sitting.sizes |= {f"peak device memory of {name}": device_growth_mb(way) for name, way in ways.items()}
    sitting.time(ways, claims, share)


def time_peers(sitting: Sitting, shapes: HeadShapes, share: float) -> None:
    """Time the head beside other libraries' losses, and record the errors of all gradients. It is apart from its
    products, as some of these losses ask for GBs, which slows down whatever comes next.
    """
    gpu = sitting.asked.device == "cuda"
    small = shapes if gpu else replace(shapes, tokens=min(256, shapes.tokens))
    scale, unit = (1e6, "1e-6") if shapes.dtype == torch.float32 else (1e3, "1e-3")
    bound = at_most(10) if shapes.dtype == torch.float32 else None
    sitting.rows.append(fact(f"gradient against float64, in {unit}", scale * gradient_error(ours(), small), bound))
    if not gpu:
        sitting.rows.append(
            fact("gradient, rounded, against float64, in 1e-3", 1e3 * gradient_error(ours_rounded(), small))
        )
    best = own_heads(gpu)
    ways: dict[str, Callable[[], object]] = {}
    claims: list[Claim] = []
    for name, loss, why in peers():
        titles = {f"{way}, beside other libraries": f"{way} / {name}'s loss" for way in best}
        try:
            error = None if loss is None else scale * gradient_error(loss, small)
        except RuntimeError as problem:  # such as a compiler that is missing
            loss, why = None, f"fails: {str(problem).splitlines()[0]}"
        if loss is None or error is None:
            sitting.rows += [absent(title, why, at_most(1)) for title in titles.values()]
            continue
        ways[f"{name}'s loss"] = with_gradients(loss, shapes)
        claims += [Claim(title, (way,), (f"{name}'s loss",), at_most(1)) for way, title in titles.items()]
        sitting.rows.append(fact(f"{name}'s gradient against float64, in {unit}", error))
    if not ways:
        return
    if gpu:
        sitting.sizes |= {f"peak device memory of {name}": device_growth_mb(way) for name, way in ways.items()}
    ways |= {f"{name}, beside other libraries": with_gradients(loss, shapes) for name, loss in best.items()}
    sitting.time(ways, claims, share)


def turns_of(step: Callable[[], object], shapes: Shapes) -> Callable[[], object]:
    """A turn: one step on a CPU, some on a GPU."""
    if shapes.device == "cpu":
        return step

    def several() -> None:
        for _ in range(STEPS):
            step()

    return several


def time_step(sitting: Sitting, of: Any, shapes: Shapes, one: int, share: float) -> None:
    """Time a step of one student beside the plain loop, and its bare parts."""
    tokens, gpu = token_ids(shapes), sitting.asked.device == "cuda"
    step, low, at_once, loop, bare = (
        f"{kind}, student of {one}" for kind in ("step", "step, rounded", "step, compiled", "plain loop", "bare parts")
    )
    steps = {
        step: step_of(of, (one,), tokens, shapes),
        loop: plain(of, one, tokens, shapes),
        bare: bare_step(of, (one,), tokens, shapes),
    }
    claims = [
        Claim("step / plain loop", (step,), (loop,), None if gpu else at_most(0.45)),
        Claim("bare parts of the step / plain loop", (bare,), (loop,)),
    ]
    if gpu:
        steps[at_once] = step_of(of, (one,), tokens, shapes, at_once=True)
        claims.append(Claim("step, compiled / plain loop", (at_once,), (loop,)))
        for name in (step, at_once, loop):
            sitting.sizes[f"peak device memory of {name}"] = device_growth_mb(steps[name])
    else:
        steps[low] = step_of(of, (one,), tokens, shapes, rounded=True)
        claims.append(Claim("step, rounded / plain loop", (low,), (loop,)))
    ways = {name: turns_of(each, shapes) for name, each in steps.items()}
    sitting.time(ways, claims, share, STEPS if gpu else 1)


def time_several(sitting: Sitting, of: Any, shapes: Shapes, widths: Sequence[int], share: float) -> None:
    """Time several students at once beside one after the other, and the bare parts of all. On a GPU they are compiled,
    as they are in a run of some hundred steps.
    """
    tokens, number, gpu = token_ids(shapes), NUMBERS[len(widths)], sitting.asked.device == "cuda"
    apart, loops = (
        {f"{kind}, one of {number}, of {width}": width for width in widths} for kind in ("step", "plain loop")
    )
    together, low, bare = (f"{kind}, {number} students at once" for kind in ("step", "step, rounded", "bare parts"))
    steps = {
        together: step_of(of, widths, tokens, shapes, at_once=gpu),
        bare: bare_step(of, widths, tokens, shapes),
    }
    steps |= {name: step_of(of, (width,), tokens, shapes, at_once=gpu) for name, width in apart.items()}
    steps |= {name: plain(of, width, tokens, shapes) for name, width in loops.items()}
    goals = (None, None) if gpu else (at_most(0.55), at_most(0.33))
    claims = [
        Claim(f"{number} students in one run / {number} runs", (together,), tuple(apart), goals[0]),
        Claim(f"bare parts of {number} in one run / {number} runs", (bare,), tuple(apart)),
        Claim(f"{number} students in one run / {number} plain loops", (together,), tuple(loops), goals[1]),
        Claim(f"bare parts of {number} in one run / {number} plain loops", (bare,), tuple(loops)),
    ]
    if gpu:
        sitting.sizes[f"peak device memory of {together}"] = device_growth_mb(steps[together])
    else:
        steps[low] = step_of(of, widths, tokens, shapes, rounded=True)
        claims.append(Claim(f"{number} students in one run, rounded / {number} plain loops", (low,), tuple(loops)))
    ways = {name: turns_of(each, shapes) for name, each in steps.items()}
    sitting.time(ways, claims, share, STEPS if gpu else 1)


def benchmark(sitting: Sitting) -> None:
    """Measure the heads, the steps, and their memory."""
    asked = sitting.asked
    shapes = {"cpu": CPU, "cuda": replace(CUDA, rows=8)}[asked.device]
    shapes = tiny(shapes) if asked.tiny else shapes
    students = WIDTHS["tiny" if asked.tiny else asked.device]
    sitting.notes.append(f"{shapes.described()}; students of d = {', '.join(map(str, students.widths))}.")
    heads = HeadShapes(
        shapes.rows * shapes.context, shapes.d_model, students.one, shapes.vocabulary, shapes.device, shapes.dtype
    )
    time_heads(sitting, heads, 0.15)
    time_peers(sitting, heads, 0.3)
    of = teacher(shapes)
    time_step(sitting, of, shapes, students.one, 0.15)
    time_several(sitting, of, shapes, students.widths, 0.4)
    if asked.device == "cpu" and not asked.tiny:
        growth, loop = growth_apart(__file__, "chunks"), growth_apart(__file__, "plain loop", 1)[0]
        sitting.rows.append(spread("growth of peak RSS / plain loop", [each / loop for each in growth], at_most(0.25)))
        sitting.sizes |= {"peak RSS growth of chunks": sorted(growth)[1], "peak RSS growth of the plain loop": loop}


def main() -> None:
    asked = arguments(__doc__, 240, {"cuda": 180}, tiny=True)
    if asked.memory_of:
        print(memory(asked.memory_of))
        return
    with Sitting("distill", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
