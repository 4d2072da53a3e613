"""What splicing costs beside what must run anyway.

python benchmarks/splice.py: the shapes of benchmarks/measure.py: GPT-NeoX d=768, 12 layers, vocabulary 50,304, random
weights; a ReLU SAE of 24,576 latents after layer 6 of which 0.8% are active; 8×256 tokens, float32, two threads. Five
numbers of features are kept, in two batches. The *limit* is for each batch the forward pass up to the hook point and
the encoder's product, once; the upper layers of the teacher and of five variants; and their divergences, in chunks.
Apart from that, a curve of ten numbers of features on the embedded teacher's held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Claim, Sitting, arguments, at_most, spread
from memory import growth_apart, peak_growth_mb
from neox import CPU, Shapes, cut_forward, hugging_face, shapes_of, sparse_autoencoder, tokens

from tl_capacity import Measurement, TokenStream, add_capacity_hooks, load_model, load_sae, splice
from tl_capacity.models.head import divergences, head_of

VARIANTS, BATCHES = 5, 2
CURVE, HELDOUT = 10, 17_500
"""Points of a curve, and tokens that it is drawn from."""


def measured(model: Any, sae: Any, shapes: Shapes = CPU) -> Measurement:
    """The measurement that is spliced."""
    with add_capacity_hooks(model, {shapes.hook: sae}, mask_token_ids=(), fvu_every=10**6) as capacity:
        return capacity.run([tokens(shapes)], progress=False).measurement()


def kept(measurement: Measurement, shapes: Shapes = CPU) -> list[int]:
    """Five numbers of features, including none and all."""
    alive = int(measurement[shapes.hook].summary.n_alive.value)
    return [0, alive // 8, alive // 4, alive // 2, alive]


def splicing(
    model: Any, sae: Any, measurement: Measurement, numbers: list[int], shapes: Shapes = CPU
) -> Callable[[], object]:
    """All of splicing."""
    text = [tokens(shapes)] * BATCHES
    return lambda: splice(model, measurement, text, saes={shapes.hook: sae}, kept=numbers, progress=False)


def upper_layers(model: Any, shapes: Shapes = CPU) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layers above the hook point and the last norm, with the same weights."""
    from transformers import GPTNeoXModel

    upper = GPTNeoXModel(model.config)
    upper.layers, upper.final_layer_norm = model.gpt_neox.layers[shapes.tapped :], model.gpt_neox.final_layer_norm
    upper.eval()
    return lambda stream: upper(inputs_embeds=stream, use_cache=False)[0]


def limit(model: Any, sae: Any, variants: int, shapes: Shapes = CPU) -> Callable[[], object]:
    """What must run for each batch, however splicing is done."""
    lower, upper, head = cut_forward(model, shapes), upper_layers(model, shapes), head_of(model)
    block = torch.empty(tokens(shapes).numel(), shapes.d_sae // 24)

    @torch.no_grad()
    def batch() -> torch.Tensor:
        stream = lower()
        inputs = stream.flatten(0, 1)
        for features in torch.split(sae.W_enc, block.shape[1], dim=1):
            torch.mm(inputs, features, out=block)
        hidden = [upper(stream)[:, :-1].flatten(0, 1) for _ in range(variants + 1)]
        return divergences(head, hidden[0], torch.stack(hidden[1:]))

    return lambda: [batch() for _ in range(BATCHES)]


def curve(tokens: int) -> Callable[[], object]:
    """A curve of ten numbers of features on the embedded teacher's held-out text, at its middle hook point."""
    embedded = load_model("embedded")
    assert embedded.named is not None
    hook, name = list(embedded.named.saes.items())[1]
    _, sae = load_sae(str(name))
    text = TokenStream("embedded:heldout", embedded.tokenizer, context=256)
    with add_capacity_hooks(embedded.model, {hook: sae}) as capacity:
        measurement = capacity.run(text, max_tokens=tokens, progress=False).measurement()
    alive = int(measurement[hook].summary.n_alive.value)
    numbers = [alive * place // CURVE for place in range(1, CURVE + 1)]
    return lambda: splice(
        embedded.model, measurement, text, saes={hook: sae}, kept=numbers, max_tokens=tokens, progress=False
    )


def memory() -> float:
    """Peak growth of splicing, in MB. It runs in its own process."""
    model = hugging_face()
    sae = sparse_autoencoder("standard", model)
    measurement = measured(model, sae)
    return peak_growth_mb(splicing(model, sae, measurement, kept(measurement)))


def benchmark(sitting: Sitting) -> None:
    """Time splicing beside its limit, and its memory."""
    asked = sitting.asked
    shapes = shapes_of("cpu", asked.tiny)
    sitting.notes.append(shapes.described() + ".")
    model = hugging_face(shapes)
    sae = sparse_autoencoder("standard", model, shapes)
    measurement = measured(model, sae, shapes)
    sitting.time(
        {
            "limit": limit(model, sae, VARIANTS, shapes),
            "splicing": splicing(model, sae, measurement, kept(measurement, shapes), shapes),
        },
        [Claim("five numbers of features / limit", ("splicing",), ("limit",), at_most(1.1))],
    )
    drawn = "a curve of ten numbers, embedded teacher"
    sitting.time(
        {drawn: curve(300 if asked.tiny else HELDOUT)}, [Claim(f"{drawn}, seconds", (drawn,), (), at_most(25))]
    )
    if not asked.tiny:
        sitting.rows.append(spread("growth of peak RSS, MB", growth_apart(__file__, "splicing"), at_most(250)))


def main() -> None:
    asked = arguments(__doc__, 60, tiny=True)
    if asked.memory_of:
        print(memory())
        return
    with Sitting("splice", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
