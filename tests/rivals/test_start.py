"""Truncated students before their first step, against what a distillation says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from place import on_cpu, placed
from tiny_families import teacher
from torch.nn import functional as F

from tl_capacity.distillation import DistillSettings, distill
from tl_capacity.distillation.students import new_student
from tl_capacity.errors import CapacityError
from tl_capacity.rivals import truncated_start

SHOWN = np.random.default_rng(0).integers(2, 50, size=(60, 12))
HELD_OUT = np.random.default_rng(1).integers(2, 50, size=(30, 12))


@pytest.mark.parametrize("family", ["gpt-neox", "gemma2"])
def test_as_a_distillation_has_it(family: str) -> None:
    of = placed(teacher(family))
    settings = DistillSettings(tokens=300, batch_rows=8, evaluations=1, heldout_tokens=300, start="truncated")
    run = distill(of, [8, 16], SHOWN, heldout=HELD_OUT, settings=settings, progress=False)
    forecasts = truncated_start(of, HELD_OUT, [8, 16], shown_on=SHOWN, max_tokens=300, progress=False)
    observed = {student.width: student.heldout_kl[0] for student in run.students}
    for width, floor in forecasts.floors("truncated_start").items():
        assert floor.value == pytest.approx(observed[width], rel=1e-6 if on_cpu() else 1e-5)
        assert floor.low <= floor.value <= floor.high
    assert forecasts.about["tokens"] == run.heldout_tokens


def test_as_the_whole_models_have_it() -> None:
    of = placed(teacher("llama"))
    forecasts = truncated_start(of, HELD_OUT, [16], progress=False)
    rows = placed(torch.from_numpy(HELD_OUT))
    student: Any = new_student(of, 16, start="truncated", tokens=rows[:16]).eval()
    with torch.no_grad():
        p, q = (model(rows).logits[:, :-1].double().log_softmax(-1) for model in (of, student))
    expected = float(F.kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel())
    assert forecasts.floors("truncated_start")[16].value == pytest.approx(expected, rel=1e-4)


def test_refusals() -> None:
    with pytest.raises(CapacityError, match="cannot build a student of width 7: the nearest widths are"):
        truncated_start(teacher("gpt-neox"), HELD_OUT, [7])
    with pytest.raises(CapacityError, match="students cannot start from a truncated teacher"):
        truncated_start(teacher("mamba"), HELD_OUT, [16], progress=False)
    with pytest.raises(CapacityError, match="cannot be distilled: pass a Hugging Face causal language model"):
        truncated_start(torch.nn.Linear(2, 2), HELD_OUT, [16])
