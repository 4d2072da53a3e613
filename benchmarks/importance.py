"""What importances in nats cost beside the plain forward pass of the same batch:
`python benchmarks/importance.py [--json]`.

The model, the SAE and the batch of `benchmarks/measure.py`: GPT-NeoX d=768, 12 layers, vocabulary 50,304, random
weights; a ReLU SAE of 24,576 latents after layer 6 of which 0.8% are active; 8×256 tokens, float32, two threads. The
*plain forward* is the whole Hugging Face forward pass (SDPA) with its logits, without gradients, and nothing counted;
every candidate counts all that a measurement counts as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Prepared, Row, arguments, at_most, medians, report
from measure import HOOK, hugging_face, sparse_autoencoder, tokens
from tl_capacity.hooks.importance import IntegratedGradients

STEPS = 2
"""Points on the path of integrated gradients; its cost is proportional to them."""


def plain_forward(model: Any) -> Callable[[], object]:
    batch = tokens()

    @torch.no_grad()
    def once() -> object:
        return model(batch, use_cache=False).logits

    return once


def measuring(model: Any, sae: Any, importance: list[Any]) -> Prepared:
    """A batch in the middle of a run with some importance estimators."""
    from tl_capacity import add_capacity_hooks

    batch = tokens()

    @contextmanager
    def attached() -> Iterator[Callable[[], object]]:
        with add_capacity_hooks(model, {HOOK: sae}, importance=importance) as capacity:
            capacity.run([batch[:1]], progress=False)
            yield lambda: capacity.run([batch], progress=False)

    return Prepared(attached)


def main() -> None:
    asked = arguments(__doc__, 5)

    model = hugging_face()
    sae = sparse_autoencoder("standard", model)
    seconds = medians(
        {
            "plain forward": plain_forward(model),
            "gradient": measuring(model, sae, ["gradient"]),
            "gradient and second_moment": measuring(model, sae, ["gradient", "second_moment"]),
            "gradient and fisher": measuring(model, sae, ["gradient", "fisher"]),
            f"integrated_gradients, {STEPS} steps": measuring(model, sae, [IntegratedGradients(STEPS)]),
        },
        asked.repetitions,
    )
    forward, gradient = seconds["plain forward"], seconds["gradient"]
    rows: list[Row] = [
        at_most("gradient / plain forward", gradient / forward, 3.2),
        at_most("gradient and second_moment / gradient", seconds["gradient and second_moment"] / gradient, 1.05),
        # One forward pass serves both losses, and each backward pass costs two.
        at_most("gradient and fisher / plain forward", seconds["gradient and fisher"] / forward, 5.2),
        at_most(
            f"integrated_gradients of {STEPS} steps / plain forward",
            seconds[f"integrated_gradients, {STEPS} steps"] / forward,
            1 + 3.2 * STEPS,
        ),
    ]
    report("importance", rows, seconds, asked.json)


if __name__ == "__main__":
    main()
