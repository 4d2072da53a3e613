"""What keeping chosen features costs a distillation step.

python benchmarks/keep.py: the teacher, the batch and the step of benchmarks/distill.py, with a student of d=128:
GPT-NeoX d=768, 12 layers, vocabulary 50,304, random weights; 8×256 tokens, float32, two threads. 200 features are kept
of a dictionary of 24,576 latents, each of which fires on about 1% of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Claim, Sitting, arguments, at_most
from distill import WIDTHS, step_of, teacher, token_ids
from neox import CPU, Shapes, shapes_of

from tl_capacity.dictionaries.chosen import chosen_latents
from tl_capacity.dictionaries.dictionary import Dictionary
from tl_capacity.distillation.keeping import Kept
from tl_capacity.distillation.settings import KeepFeatures
from tl_capacity.models.forward import activation_at
from tl_capacity.models.hook_points import find_tap_point

CHOSEN = 200
"""Features that are kept."""


def kept(of: Any, tokens: torch.Tensor, shapes: Shapes = CPU) -> Kept:
    """200 features of a dictionary with random weights, each of which fires on about 1% of the tokens."""
    point = find_tap_point(of, shapes.hook)
    seen = activation_at(of, point, tokens)
    assert seen is not None
    activations = seen.flatten(0, 1)
    random = torch.Generator().manual_seed(3)
    encoder = torch.randn(shapes.d_model, shapes.d_sae, generator=random) / shapes.d_model**0.5
    threshold = (activations @ encoder).topk(1 + len(activations) // 100, dim=0).values[-1].clamp(min=1e-3)
    biases = {"b_enc": torch.zeros(shapes.d_sae), "b_dec": torch.zeros(shapes.d_model)}
    weights = {"W_enc": encoder, "W_dec": encoder.T, **biases}
    sae = Dictionary("jumprelu", {**weights, "threshold": threshold}, subtract_bias=False)
    features = tuple(range(CHOSEN))
    return Kept(KeepFeatures(shapes.hook, features), point, chosen_latents(sae, features, activations))


def benchmark(sitting: Sitting) -> None:
    """A step with features to keep beside one without."""
    asked = sitting.asked
    shapes = shapes_of("cpu", asked.tiny)
    sitting.notes.append(shapes.described() + ".")
    of, tokens, width = teacher(shapes), token_ids(shapes), WIDTHS["tiny" if asked.tiny else "cpu"].one
    plain, keeping = f"step, student of {width}", f"step, student of {width}, {CHOSEN} features kept"
    ways = {
        plain: step_of(of, (width,), tokens, shapes),
        keeping: step_of(of, (width,), tokens, shapes, [kept(of, tokens, shapes)]),
    }
    sitting.time(ways, [Claim(f"step with {CHOSEN} features kept / step", (keeping,), (plain,), at_most(1.10))])


def main() -> None:
    asked = arguments(__doc__, 120, tiny=True)
    with Sitting("keep", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
