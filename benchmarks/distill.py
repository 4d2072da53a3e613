"""What a distillation step costs beside the plain loop, which holds all logits of teacher and student at once:
`python benchmarks/distill.py [--json]`.

GPT-NeoX teacher d=768, 12 layers, vocabulary 50,304, random weights; a student d=128, or five; batches of 8×256 tokens,
float32, two threads. Both sides run the same forward passes (SDPA), clip, and step AdamW; *four GEMMs* are the head's
own products (logits of both, gradients of the student's hidden states and head), into buffers that are there already.
Features are kept of a dictionary of 24,576 latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Row, arguments, at_most, growth_apart, medians, peak_growth_mb, report
from torch.nn import functional as F

from tl_capacity.dictionaries.chosen import chosen_latents
from tl_capacity.dictionaries.dictionary import Dictionary
from tl_capacity.distillation.ensemble import Students
from tl_capacity.distillation.keeping import Kept
from tl_capacity.distillation.losses import Head, Output, chunked_losses
from tl_capacity.distillation.settings import CHUNK_TOKENS, DistillSettings, KeepFeatures, LogitLoss
from tl_capacity.distillation.students import new_student, output_of
from tl_capacity.models.forward import activation_at
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.runtime.scratch import Scratch

D_TEACHER, LAYERS, VOCABULARY, ROWS, CONTEXT, WIDTH = 768, 12, 50_304, 8, 256, 128
WIDTHS = (64, 128, 256, 384, 512)
HOOK, LATENTS, CHOSEN = "blocks.6.hook_resid_post", 24_576, 200
SETTINGS = DistillSettings(loss=LogitLoss(temperature=2.0))  # the paper's


def teacher() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_TEACHER,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * D_TEACHER,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval().requires_grad_(False)


def token_ids(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(1))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=SETTINGS.lr, betas=SETTINGS.betas, weight_decay=SETTINGS.weight_decay, fused=True
    )


def kept(of: Any, tokens: torch.Tensor) -> Kept:
    """200 features of a dictionary of random weights, each of which fires on about 1% of the tokens."""
    point = find_tap_point(of, HOOK)
    seen = activation_at(of, point, tokens)
    assert seen is not None
    activations = seen.flatten(0, 1)
    random = torch.Generator().manual_seed(3)
    encoder = torch.randn(D_TEACHER, LATENTS, generator=random) / D_TEACHER**0.5
    threshold = (activations @ encoder).topk(len(activations) // 100, dim=0).values[-1].clamp(min=1e-3)
    weights = {"W_enc": encoder, "W_dec": encoder.T, "b_enc": torch.zeros(LATENTS), "b_dec": torch.zeros(D_TEACHER)}
    sae = Dictionary("jumprelu", {**weights, "threshold": threshold}, subtract_bias=False)
    features = tuple(range(CHOSEN))
    return Kept(KeepFeatures(HOOK, features), point, chosen_latents(sae, features, activations))


def ours(of: Any, widths: Sequence[int], tokens: torch.Tensor, keep: Sequence[Kept] = ()) -> Callable[[], object]:
    """A step as `distill` takes it."""
    students = Students([new_student(of, width) for width in widths], D_TEACHER, SETTINGS, keep)
    optimiser = adamw(students)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, -1] = False
    labels = tokens[:, 1:].flatten()

    def step() -> object:
        with torch.no_grad():
            target = output_of(of, tokens, mask, students.hooks, students.points)
        losses = students(tokens, mask, labels, target, len(labels))
        losses.sum().backward()
        for parameters in students.parameters_of_each():
            torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return losses.tolist()

    return step


def plain(of: Any, width: int, tokens: torch.Tensor) -> Callable[[], object]:
    """The loop that tutorials have: the softmax of both over the whole batch, and `kl_div`."""
    student = new_student(of, width)
    optimiser = adamw(student)

    def step() -> object:
        with torch.no_grad():
            teacher_logits = of(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        student_logits = student(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        temperature = SETTINGS.loss.temperature
        p, log_q = F.softmax(teacher_logits / temperature, -1), F.log_softmax(student_logits / temperature, -1)
        loss = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


def outputs(dtype: torch.dtype, tokens: int) -> tuple[Output, Output]:
    """Hidden states and heads of a teacher and a student, whose logits are about as sharp as a trained model's."""
    random = torch.Generator().manual_seed(2)
    found = []
    for width in (D_TEACHER, WIDTH):
        hidden, weight = (
            torch.randn(tokens, width, generator=random),
            torch.randn(VOCABULARY, width, generator=random) * 2 / width**0.5,
        )
        found.append(Output(hidden.to(dtype), Head(weight.to(dtype))))
    for part in (found[1].hidden, found[1].head.weight):
        part.requires_grad_()
    return found[0], found[1]


def head() -> Callable[[], object]:
    """Loss and gradients from hidden states."""
    of, student = outputs(torch.float32, ROWS * CONTEXT)
    labels, scratch = torch.zeros(ROWS * CONTEXT, dtype=torch.long), Scratch()

    def once() -> object:
        student.hidden.grad = student.head.weight.grad = None
        return chunked_losses(of, [student], labels, LogitLoss(), scratch=scratch).sum().backward()

    return once


def four_gemms() -> Callable[[], object]:
    """The products that no head can do without, chunk by chunk."""
    of, student = outputs(torch.float32, ROWS * CONTEXT)
    buffers = torch.empty(2, CHUNK_TOKENS, VOCABULARY)
    of_hidden, of_weight = torch.empty(ROWS * CONTEXT, WIDTH), torch.zeros(WIDTH, VOCABULARY)

    @torch.no_grad()
    def once() -> object:
        for start in range(0, ROWS * CONTEXT, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            torch.mm(of.hidden[rows], of.head.weight.T, out=buffers[0])
            gradient = torch.mm(student.hidden[rows], student.head.weight.T, out=buffers[1])
            torch.mm(gradient, student.head.weight, out=of_hidden[rows])
            of_weight.addmm_(student.hidden[rows].T, gradient)
        return of_weight

    return once


def gradient_error() -> float:
    """Largest error of a gradient over its largest entry, against autograd through the definition in float64; 256
    tokens.
    """
    tokens = CONTEXT
    of, student = outputs(torch.float32, tokens)
    chunked_losses(of, [student], torch.zeros(tokens, dtype=torch.long), LogitLoss()).sum().backward()
    of64, student64 = outputs(torch.float64, tokens)
    log_p, log_q = ((o.hidden @ o.head.weight.T).log_softmax(-1) for o in (of64, student64))
    F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()
    errors = []
    for found, expected in (
        (student.hidden.grad, student64.hidden.grad),
        (student.head.weight.grad, student64.head.weight.grad),
    ):
        assert found is not None
        assert expected is not None
        errors.append(float((found.double() - expected).abs().max() / expected.abs().max()))
    return max(errors)


def memory(which: str) -> float:
    """Peak growth of one kind of step, in MB; run in a process of its own."""
    of = teacher()
    make: dict[str, Callable[[torch.Tensor], Callable[[], object]]] = {
        "chunks": lambda tokens: ours(of, (WIDTH,), tokens),
        "plain loop": lambda tokens: plain(of, WIDTH, tokens),
    }
    step = make[which](token_ids())
    make[which](token_ids(1)[:, :8])()  # the libraries' own buffers belong to the loaded state
    return peak_growth_mb(step)


def main() -> None:
    asked = arguments(__doc__, 3)
    if asked.memory_of:
        print(memory(asked.memory_of))
        return

    growth = growth_apart(__file__, ("chunks", "plain loop"))
    seconds = medians({"head": head(), "its four GEMMs": four_gemms()}, 2 * asked.repetitions)
    of, tokens = teacher(), token_ids()
    seconds |= medians(
        {
            "step, five students at once": ours(of, WIDTHS, tokens),
            **{f"step, student of {width}": ours(of, (width,), tokens) for width in WIDTHS},
            f"step, student of {WIDTH}, {CHOSEN} features kept": ours(of, (WIDTH,), tokens, [kept(of, tokens)]),
            **{f"plain loop, student of {width}": plain(of, width, tokens) for width in WIDTHS},
        },
        asked.repetitions,
    )
    together, alone, loops = (
        seconds["step, five students at once"],
        *(sum(seconds[f"{what}, student of {width}"] for width in WIDTHS) for what in ("step", "plain loop")),
    )
    rows: list[Row] = [
        at_most(
            "step / plain loop", seconds[f"step, student of {WIDTH}"] / seconds[f"plain loop, student of {WIDTH}"], 0.65
        ),
        at_most("growth of peak RSS / plain loop", growth["chunks"] / growth["plain loop"], 0.25),
        at_most("head / its four bare GEMMs", seconds["head"] / seconds["its four GEMMs"], 1.30),
        at_most("gradient against float64, in 1e-6", 1e6 * gradient_error(), 10),
        at_most(
            f"step with {CHOSEN} features kept / step",
            seconds[f"step, student of {WIDTH}, {CHOSEN} features kept"] / seconds[f"step, student of {WIDTH}"],
            1.10,
        ),
        at_most("five students in one run / five runs", together / alone, 0.65),
        at_most("five students in one run / five plain loops", together / loops, 0.42),
    ]
    report("distill", rows, {**seconds, **{f"peak RSS growth of {k}, MB": v for k, v in growth.items()}}, asked.json)


if __name__ == "__main__":
    main()
