"""What splicing costs beside what must run anyway: `python benchmarks/splice.py [--json]`.

The shapes of benchmarks/measure.py: GPT-NeoX d=768, 12 layers, vocabulary 50,304, random weights; a ReLU SAE of 24,576
latents after layer 6 of which 0.8% are active; 8×256 tokens, float32, two threads. Five numbers of features are kept.
The *limit* is the forward pass up to the hook point and the encoder's product, once; the upper layers of the teacher
and of five variants; and their divergences, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Row, arguments, at_most, growth_apart, medians, peak_growth_mb, report
from measure import D_SAE, HOOK, TAPPED, cut_forward, hugging_face, sparse_autoencoder, tokens

from tl_capacity import Measurement, add_capacity_hooks, splice
from tl_capacity.models.head import divergences, head_of

VARIANTS = 5
PROCESSES = 3
"""Processes whose memory is measured, one after another."""


def measured(model: Any, sae: Any) -> Measurement:
    """The measurement that is spliced."""
    with add_capacity_hooks(model, {HOOK: sae}, mask_token_ids=(), fvu_every=10**6) as capacity:
        return capacity.run([tokens()], progress=False).measurement()


def kept(measurement: Measurement) -> list[int]:
    """Five numbers of features, none and all among them."""
    alive = int(measurement[HOOK].summary.n_alive.value)
    return [0, alive // 8, alive // 4, alive // 2, alive]


def splicing(model: Any, sae: Any, measurement: Measurement, numbers: list[int]) -> Callable[[], object]:
    """All of it, for one batch."""
    return lambda: splice(model, measurement, tokens(), saes={HOOK: sae}, kept=numbers, progress=False)


def upper_layers(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layers above the hook point and the last norm, of the same weights."""
    from transformers import GPTNeoXModel

    upper = GPTNeoXModel(model.config)
    upper.layers, upper.final_layer_norm = model.gpt_neox.layers[TAPPED:], model.gpt_neox.final_layer_norm
    upper.eval()
    return lambda stream: upper(inputs_embeds=stream, use_cache=False)[0]


def limit(model: Any, sae: Any, variants: int) -> Callable[[], object]:
    """What must run whatever splicing does."""
    lower, upper, head = cut_forward(model), upper_layers(model), head_of(model)
    block = torch.empty(tokens().numel(), D_SAE // 24)

    @torch.no_grad()
    def once() -> torch.Tensor:
        stream = lower()
        inputs = stream.flatten(0, 1)
        for features in torch.split(sae.W_enc, block.shape[1], dim=1):
            torch.mm(inputs, features, out=block)
        hidden = [upper(stream)[:, :-1].flatten(0, 1) for _ in range(variants + 1)]
        return divergences(head, hidden[0], torch.stack(hidden[1:]))

    return once


def candidate(which: str) -> Callable[[], object]:
    """What `--memory-of` names."""
    model = hugging_face()
    sae = sparse_autoencoder("standard", model)
    measurement = measured(model, sae)
    return {
        "splicing": splicing(model, sae, measurement, kept(measurement)),
        "limit": limit(model, sae, VARIANTS),
    }[which]


def main() -> None:
    asked = arguments(__doc__, 5)
    if asked.memory_of:
        print(peak_growth_mb(candidate(asked.memory_of)))
        return
    model = hugging_face()
    sae = sparse_autoencoder("standard", model)
    measurement = measured(model, sae)
    seconds = medians(
        {
            "limit": limit(model, sae, VARIANTS),
            "splicing": splicing(model, sae, measurement, kept(measurement)),
        },
        asked.repetitions,
    )
    growth = growth_apart(__file__, ("splicing", "limit"), PROCESSES)
    rows: list[Row] = [
        at_most("five numbers of features / limit", seconds["splicing"] / seconds["limit"], 1.1),
        at_most("growth of peak RSS, MB", growth["splicing"], 250),
    ]
    report("splice", rows, {**seconds, **{f"peak RSS growth of {k}, MB": v for k, v in growth.items()}}, asked.json)


if __name__ == "__main__":
    main()
