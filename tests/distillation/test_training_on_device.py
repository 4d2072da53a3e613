"""A distillation on a GPU is the one on the CPU: it goes on from a checkpoint of either on the other, both run in one
process, and what is read of a device later is what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from place import on_cpu
from pretended import OnDevice, pretended_device

from tl_capacity.distillation import DistillationRun, DistillSettings, distill
from tl_capacity.distillation.losses import Head, Output, chunked_losses
from tl_capacity.distillation.settings import LogitLoss
from tl_capacity.distillation.unread import AT_ONCE, Unread

SETTINGS = DistillSettings(tokens=2_000, batch_rows=4, heldout_tokens=200, evaluations=3, lr=3e-3)
ROWS = np.random.default_rng(3).integers(1, 100, size=(260, 12))
MakeModel = Callable[..., Any]


def losses_of(run: DistillationRun) -> list[tuple[float, ...]]:
    return [(*student.heldout_kl, *student.train_loss) for student in run]


@contextmanager
def interrupted(model: Any, calls: int) -> Iterator[None]:
    """Somebody presses Ctrl-C in so many forward passes."""
    seen: list[None] = []

    def count(*_: Any) -> None:
        seen.append(None)
        if len(seen) > calls:
            raise KeyboardInterrupt

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


@pytest.mark.skipif(on_cpu(), reason="needs a second device: pytest --device")
@pytest.mark.parametrize("first", ["cpu", "device"])
def test_a_run_goes_on_on_the_other_device(make_model: MakeModel, device: str, tmp_path: Path, first: str) -> None:
    places = ["cpu", device] if first == "cpu" else [device, "cpu"]
    teachers = [make_model("gpt_neox").to(place) for place in places]
    whole = distill(teachers[1], [8], ROWS, settings=SETTINGS, progress=False)
    with interrupted(teachers[0], 40):
        distill(teachers[0], [8], ROWS, settings=SETTINGS, out=tmp_path, checkpoint_seconds=0.0, progress=False)
    run = distill(teachers[1], [8], ROWS, settings=SETTINGS, out=tmp_path, resume=True, progress=False)
    assert next(teachers[1].parameters()).device.type == torch.device(places[1]).type
    for found, expected in zip(losses_of(run), losses_of(whole), strict=True):
        # Products are rounded otherwise on the other device, and training carries that on.
        assert found == pytest.approx(expected, rel=5e-3)


def test_losses_are_read_later_as_they_were_and_in_order() -> None:
    random, unread = torch.Generator().manual_seed(0), Unread(torch.device("cuda"))
    steps = [(step, torch.rand(2, generator=random, dtype=torch.float64)) for step in range(5, 5 + AT_ONCE)]
    for step, losses in steps:
        assert not unread.due
        unread.add(step, losses, [losses[0].float(), losses[1].float()])
    assert unread.due
    for (step, losses), read in zip(steps, unread.read(), strict=True):
        assert read == (step, losses.tolist(), losses.float().tolist())
    assert not list(unread.read())
    unread.add(0, losses, [losses[0], losses[1]])
    assert len(list(unread.read())) == 1, "also before it is due"


def test_the_cpu_is_read_at_once() -> None:
    unread = Unread(torch.device("cpu"))
    unread.add(1, torch.ones(1, dtype=torch.float64), [torch.ones(())])
    assert unread.due


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradients_of_a_kept_graph_are_the_same_again(unchecked: None, share: float) -> None:
    """On a device the backward pass cannot read what it is multiplied by, and must not multiply what it kept."""
    draw = torch.Generator().manual_seed(0)
    numbers = [torch.randn(size, generator=draw) for size in ((9, 8), (50, 8), (9, 4), (50, 4))]
    labels = torch.randint(50, (9,), generator=draw)

    def gradients(place: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        hidden, weight, *student = (place(each.clone()) for each in numbers)
        for each in student:
            each.requires_grad_()
        of_student = Output(student[0], Head(student[1], None))
        losses = chunked_losses(Output(hidden, Head(weight, None)), [of_student], place(labels), LogitLoss())
        return [torch.autograd.grad(losses.sum() * share, student, retain_graph=True) for _ in range(3)]

    wanted = gradients(lambda tensor: tensor)
    with pretended_device(float64=True):
        there: Any = gradients(OnDevice)
    for found in (*wanted[1:], *([each.held for each in again] for again in there)):
        torch.testing.assert_close(tuple(found), wanted[0], rtol=1e-5, atol=1e-7)
