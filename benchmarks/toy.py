"""What a training step of the whole sweep of directly trained toy models costs, in one batch and in the usual loop.

python benchmarks/toy.py: 48 configurations (n, α, d_T), student widths 1 … d_T, five seeds, 128 samples a step. The
loop goes over (configuration, width), 312 of them, with the seeds batched, plain samples, autograd and
`torch.optim.Adam`; the batch is what `tl_capacity.toy` does. Two threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Claim, Sitting, arguments, at_least, at_most

from tl_capacity.toy.features import zipf_importance
from tl_capacity.toy.sweep import SweepSettings
from tl_capacity.toy.training import BLOCK_STEPS, train

SEEDS, BATCH = 5, 128
GRID = SweepSettings(seeds=SEEDS, batch=BATCH, distilled=False)


def batched(steps: int, distilled: bool = False, seeds: int = SEEDS) -> Callable[[], object]:
    """Train the whole sweep for some steps, from drawing the initial weights to the last step."""
    settings = SweepSettings(seeds=seeds, batch=BATCH, steps=steps, distilled=distilled)
    return lambda: train(settings)


def looped(steps: int) -> Callable[[], object]:
    """Train the same models, one configuration and width at a time."""

    def one(n: int, alpha: float, width: int) -> None:
        weights = torch.nn.Parameter(torch.nn.init.xavier_normal_(torch.empty(SEEDS, width, n)))
        bias = torch.nn.Parameter(torch.zeros(SEEDS, 1, n))
        importance = torch.from_numpy(zipf_importance(n)).float()
        optimizer = torch.optim.Adam([weights, bias], lr=GRID.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            x = torch.rand(SEEDS, BATCH, n) * (torch.rand(SEEDS, BATCH, n) >= alpha)
            output = torch.relu(x @ weights.transpose(1, 2) @ weights + bias)
            loss = ((output - x) ** 2 * importance).sum(-1).mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def once() -> None:
        for n in GRID.features:
            for alpha in GRID.alphas:
                for teacher_width in GRID.teacher_widths:
                    for width in range(1, teacher_width + 1):
                        one(n, alpha, width)

    return once


def benchmark(sitting: Sitting) -> None:
    """Time the sweep in one batch beside the loop, and estimate how long the paper's takes."""
    asked = sitting.asked
    paper = SweepSettings()
    sitting.notes.append(f"Seconds are of {asked.steps} steps of training.")
    together, loop, whole = "one batch", "loop", "paper preset, as many steps of each kind"
    sitting.time(
        {together: batched(asked.steps), loop: looped(asked.steps)},
        [Claim("loop over (configuration, width) / one batch, directly trained", (loop,), (together,), at_least(6))],
        share=0.7,
        warm={loop: looped(1)},
    )
    minutes = paper.steps / asked.steps / 60
    claim = Claim("paper preset: minutes of training, extrapolated", (whole,), (), at_most(90), minutes)
    sitting.time(
        {whole: batched(asked.steps, True, paper.seeds)},
        [claim],
        share=0.3,
        warm={whole: batched(1, True, paper.seeds)},
    )


def main() -> None:
    asked = arguments(__doc__, 50, steps=2 * BLOCK_STEPS)
    with Sitting("toy", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
