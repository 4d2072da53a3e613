"""The first step of a process, while others keep the cores busy, is the same as the second."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIRST_AND_SECOND = """
import sys
import torch
from tl_capacity.distillation.losses import Head, Output, chunked_losses
from tl_capacity.distillation.settings import LogitLoss

torch.set_num_threads(2)
teacher, student = (Output(torch.randn(256, 64), Head(torch.randn(50_304, 64) / 4)) for _ in range(2))

def gradient():
    hidden = student.hidden.clone().requires_grad_()
    targets = torch.zeros(256, dtype=torch.long)
    chunked_losses(teacher, [Output(hidden, student.head)], targets, LogitLoss()).sum().backward()
    return hidden.grad

sys.exit(not torch.equal(gradient(), gradient()))
"""
AT_ONCE, WAVES = 3, 15


@pytest.mark.slow
def test_the_first_gradient_of_a_process_is_the_second() -> None:
    """Unless its functions are settled first, MKL gives one process in a dozen another kernel for a part of the first
    exponentials.
    """
    for _ in range(WAVES):
        wave = [subprocess.Popen([sys.executable, "-c", FIRST_AND_SECOND]) for _ in range(AT_ONCE)]
        assert [process.wait() for process in wave] == [0] * AT_ONCE
