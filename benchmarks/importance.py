"""What importances in nats cost beside the plain forward pass of the same batch.

python benchmarks/importance.py: the model, the SAE and the batch of benchmarks/measure.py: GPT-NeoX d=768, 12 layers,
vocabulary 50,304, random weights; a ReLU SAE of 24,576 latents after layer 6 of which 0.8% are active; 8×256 tokens,
float32, two threads. The *plain forward* is the whole Hugging Face forward pass (SDPA) with its logits, without
gradients, and nothing counted; every candidate counts all that a measurement counts as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Claim, Sitting, arguments, at_most
from neox import CPU, Shapes, hugging_face, shapes_of, sharing, sparse_autoencoder, tokens
from tl_capacity.hooks.importance import IntegratedGradients

STEPS = 2
"""Points on the path of integrated gradients. The cost is proportional to them."""


def plain_forward(model: Any, shapes: Shapes = CPU) -> Callable[[], object]:
    batch = tokens(shapes)

    @torch.no_grad()
    def once() -> object:
        return model(batch, use_cache=False).logits

    return once


@contextmanager
def measuring(model: Any, sae: Any, importance: list[Any], shapes: Shapes = CPU) -> Iterator[Callable[[], object]]:
    """A batch in the middle of a run, with some importance estimators."""
    from tl_capacity import add_capacity_hooks

    batch = tokens(shapes)
    with add_capacity_hooks(model, {shapes.hook: sae}, importance=importance) as capacity:
        capacity.run([batch[:1]], progress=False)
        yield lambda: capacity.run([batch], progress=False)


def benchmark(sitting: Sitting) -> None:
    """Time every kind of estimator beside the plain forward pass."""
    asked = sitting.asked
    shapes = shapes_of("cpu", asked.tiny)
    sitting.notes.append(shapes.described() + ".")
    model = hugging_face(shapes)
    sae, forward, gradient = sparse_autoencoder("standard", model, shapes), ("plain forward",), ("gradient",)
    path = f"integrated_gradients, {STEPS} steps"
    with sitting.group() as attach:
        estimators: dict[str, list[Any]] = {
            "gradient": ["gradient"],
            "gradient and second_moment": ["gradient", "second_moment"],
            "gradient and fisher": ["gradient", "fisher"],
            path: [IntegratedGradients(STEPS)],
        }
        ways = {name: attach(measuring(sharing(model), sae, each, shapes)) for name, each in estimators.items()}
        sitting.time(
            {"plain forward": plain_forward(model, shapes), **ways},
            [
                Claim("gradient / plain forward", gradient, forward, at_most(3.2)),
                Claim(
                    "gradient and second_moment / gradient", ("gradient and second_moment",), gradient, at_most(1.05)
                ),
                # One forward pass serves both losses, and each backward pass through frozen weights costs one.
                Claim("gradient and fisher / plain forward", ("gradient and fisher",), forward, at_most(4.0)),
                Claim(
                    f"integrated_gradients of {STEPS} steps / plain forward", (path,), forward, at_most(1 + 3.2 * STEPS)
                ),
            ],
        )


def main() -> None:
    asked = arguments(__doc__, 100, tiny=True)
    with Sitting("importance", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
