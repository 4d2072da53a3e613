"""Nothing leaks: a model, the user's random numbers and the process's memory are after measuring
as they were before.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import all_hooks

from tl_capacity import TokenStream, add_capacity_hooks
from tl_capacity.distillation import DistillSettings, distill
from tl_capacity.toy.result import run as run_sweep
from tl_capacity.toy.sweep import SweepSettings

HOOK = "blocks.1.hook_resid_post"
CYCLES = 200


def random_states() -> tuple[Any, ...]:
    """Of Python, numpy and torch."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tolist(), rest, torch.get_rng_state().tolist()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("importance", ["second_moment", "attribution"])
def test_a_model_is_left_as_it_was(
    make_model: Callable[..., Any], make_sae: Callable[..., Any], tokens: torch.Tensor, importance: str
) -> None:
    """Hooks, parameters, gradients, which modules train, and whether gradients are recorded; half of its modules train,
    as in somebody's own loop.
    """
    from tl_capacity.plugins import plugins

    if importance == "attribution":
        importance = next(e.name for e in plugins().importance_estimators if e.gradient_of)
    model, sae = make_model("gpt_neox"), make_sae()
    modules = list(model.modules())
    for module in modules[::2]:
        module.training = True
    next(model.parameters()).requires_grad_(False)

    def state() -> tuple[Any, ...]:
        parameters = [(p.detach().clone(), p.requires_grad, p.grad) for p in (*model.parameters(), *sae.parameters())]
        return (
            parameters,
            [m.training for m in modules],
            all_hooks(model),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            random_states(),
        )

    before = state()
    with add_capacity_hooks(model, {HOOK: sae}, importance=[importance]) as capacity:
        capacity.run(tokens, progress=False)
    capacity.measurement().budget([4], max_fvu=None)
    after = state()
    for (values, wanted, gradient), (values_now, wanted_now, gradient_now) in zip(before[0], after[0], strict=True):
        assert torch.equal(values, values_now)
        assert (wanted, gradient) == (wanted_now, gradient_now)
    assert after[1:] == before[1:]


@pytest.mark.usefixtures("unchecked")
def test_random_numbers_of_the_user(make_model: Callable[..., Any], tokenizer: Any, texts: list[str]) -> None:
    model, stream = make_model("gpt_neox"), TokenStream(texts, tokenizer, context=16)
    before = random_states()
    distill(
        model,
        [16],
        stream,
        settings=DistillSettings(tokens=100, evaluations=1, heldout_tokens=50, repeat=True),
        progress=False,
    )
    run_sweep(SweepSettings(features=(4,), alphas=(0.7,), teacher_widths=(2,), seeds=1, steps=2, evaluation_rows=16))
    assert random_states() == before


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_memory_over_many_cycles(
    make_model: Callable[..., Any],
    make_sae: Callable[..., Any],
    tokens: torch.Tensor,
    record_property: Callable[[str, object], None],
) -> None:
    """Attach, count, detach: in 200 cycles a leak of one batch's latents would be 24·20·2,048·8 bytes each, and 1.5 GB
    in all.
    """
    model, sae = make_model("gpt_neox"), make_sae(d_sae=2048)
    process, memory = psutil.Process(), []
    for cycle in range(CYCLES):
        with add_capacity_hooks(model, {HOOK: sae}) as capacity:
            capacity.run(tokens, progress=False)
        if cycle >= CYCLES // 4 and cycle % 10 == 0:
            gc.collect()  # else what the collector has not come to yet counts as leaked
            memory.append((cycle, process.memory_info().rss))
    slope = np.polyfit(*zip(*memory, strict=True), 1)[0]
    record_property("growth for each time of attaching, counting and detaching, KB", f"{slope / 1e3:.1f}")
    one_batch = 24 * 20 * 2048 * 8
    assert slope < one_batch / 50, f"{slope:,.0f} bytes per cycle"
