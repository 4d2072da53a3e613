"""What counting costs beside the forward pass that it is part of, and beside the two usual ways.

python benchmarks/measure.py: GPT-NeoX d=768, 12 layers, vocabulary 50,304, random weights; a ReLU SAE of 24,576 latents
after layer 6 of which 0.8% are active; batches of 8×256 tokens, float32, two threads. The *limit* is the Hugging Face
forward pass (SDPA) cut after that layer, plus one encoder product into a buffer that is there already.

With --device cuda: d=2,304, 65,536 latents, batches of 16×1,024, the model in bfloat16 and the SAE in float32 or
bfloat16, its sums in PyTorch's steps or compiled; six batches a turn, and the clock is read when the device has done
them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Claim, Sitting, absent, arguments, at_least, at_most, fact, row, spread
from memory import device_growth_mb, growth_apart, peak_growth_mb
from neox import (
    CPU,
    Shapes,
    Weights,
    bridge,
    compiled,
    counting,
    cut_forward,
    hook_behind,
    hooked_transformer,
    hugging_face,
    proxy_model,
    shapes_of,
    sharing,
    sparse_autoencoder,
    tiny,
    tokens,
)

MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""With these glibc gives a large block back to the system when it is freed, and asks for each anew."""
BATCHES = 6
"""Batches of one turn on a GPU. The device is waited for once for all of them."""


def limit(model: Any, sae: Any, shapes: Shapes = CPU, batches: int = 1) -> Callable[[], object]:
    """The lower limit: the cut forward pass, and one encoder product into an existing buffer."""
    forward, weight = cut_forward(model, shapes), sae.W_enc.detach()
    buffer = torch.empty(shapes.rows * shapes.context, shapes.d_sae, dtype=weight.dtype, device=weight.device)

    def once() -> object:
        for _ in range(batches):
            torch.mm(forward().reshape(-1, shapes.d_model).to(weight.dtype), weight, out=buffer)
        return buffer

    return once


def limit_of_several(model: Any, sae: Any, shapes: Shapes) -> Callable[[], object]:
    """The lower limit of one pass for several layers: the forward pass cut after the last, and a product for each."""
    last = limit(model, sae, replace(shapes, tapped=shapes.several[-1]))
    weight, buffer = sae.W_enc.detach(), torch.empty(shapes.rows * shapes.context, shapes.d_sae)
    activations = cut_forward(model, shapes)().reshape(-1, shapes.d_model)

    def once() -> object:
        for _ in shapes.several[1:]:
            torch.mm(activations, weight, out=buffer)
        return last()

    return once


def limit_once(model: Any, sae: Any, shapes: Shapes) -> None:
    """The limit, including everything it allocates."""
    limit(model, sae, shapes)()


def dense_loop(model: Any, sae: Any, shapes: Shapes = CPU) -> Callable[[], object]:
    """The kind of script that the paper uses: the whole model with its head, dense latents, three dense reductions,
    dense decoding.
    """
    batch = tokens(shapes)
    counts, squares, l0, error = torch.zeros(shapes.d_sae), torch.zeros(shapes.d_sae), 0.0, 0.0
    seen: list[torch.Tensor] = []
    model.gpt_neox.layers[shapes.tapped - 1].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )

    @torch.no_grad()
    def once() -> object:
        nonlocal counts, squares, l0, error
        seen.clear()
        model(batch, use_cache=False)
        x = seen[0].reshape(-1, shapes.d_model)
        z = sae.encode(x)
        counts += (z > 0).float().sum(0)
        squares += z.square().sum(0)
        l0 += (z > 0).float().sum(-1).mean().item()
        error += (x - sae.decode(z)).square().sum().item()
        return counts

    return once


def sae_lens_evals(model: Any, sae: Any, shapes: Shapes = CPU) -> Callable[[], object]:
    """SAELens' own `run_evals` with feature density and sparsity metrics, on the same number of tokens."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    rows = Dataset.from_dict({"tokens": tokens(shapes).cpu().repeat(8, 1).tolist()})
    config = EvalConfig(
        batch_size_prompts=shapes.rows,
        compute_sparsity_metrics=True,
        compute_featurewise_density_statistics=True,
        n_eval_sparsity_variance_batches=1,
    )

    def once() -> object:
        store = ActivationsStore.from_sae(
            model,
            sae,
            context_size=shapes.context,
            dataset=rows,
            streaming=False,
            store_batch_size_prompts=shapes.rows,
            n_batches_in_buffer=1,
            device=shapes.device,
        )
        return run_evals(sae, store, model, ActivationScaler(), eval_config=config)

    return once


def proxy_evals(model: Any, shapes: Shapes = CPU, weights: Weights | None = None) -> Callable[[], object]:
    """`run_evals` on SAELens' own wrapper of the Hugging Face model."""
    hook = f"gpt_neox.layers.{shapes.tapped - 1}"
    sae = sparse_autoencoder("standard", model, shapes, hook, weights)
    return sae_lens_evals(proxy_model(sharing(model), shapes), sae, shapes)


def memory(which: str) -> float:
    """Peak growth of one way of counting, in MB. It runs in its own process, where counting has run on a tiny model
    before, so that the libraries are loaded.
    """
    small = tiny(CPU)
    of_small = hugging_face(small)
    counting_once(of_small, sparse_autoencoder("standard", of_small, small), small)
    model = hugging_face()
    sae = sparse_autoencoder("standard", model)

    def count() -> None:
        with counting(model, {CPU.hook: sae}) as step:
            step()

    candidates: dict[str, Callable[[], Callable[[], object]]] = {
        "counting": lambda: count,
        "the cut forward pass": lambda: cut_forward(model),
        "dense loop": lambda: dense_loop(model, sae),
        "run_evals": lambda: proxy_evals(model),
    }
    return peak_growth_mb(candidates[which](), cut_forward(model))


@contextmanager
def synchronisations_warned_of() -> Iterator[None]:
    """Let PyTorch warn of each call that waits for the device, if there is one."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisations(step: Callable[[int], object]) -> Counter[str]:
    """How often the host waits for the device in one batch, by place in the code. It is what two batches have more than
    one.

    Args:
        step: runs so many batches.
    """

    def within(batches: int) -> Counter[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with synchronisations_warned_of():
                step(batches)
        found = (w for w in caught if "synchronizing" in str(w.message))
        return Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)

    _, once, twice = within(1), within(1), within(2)
    return twice - once


@contextmanager
def runs_of(model: Any, saes: Any, shapes: Shapes) -> Iterator[Callable[[int], object]]:
    """A session that runs so many batches."""
    from tl_capacity import add_capacity_hooks

    batch = tokens(shapes).cpu()
    with add_capacity_hooks(model, saes) as capacity:
        yield lambda batches: capacity.run([batch] * batches, progress=False)


def time_several(sitting: Sitting, hf: Any, fitted: Weights, shapes: Shapes) -> None:
    """Time three layers in one pass beside three passes, and the limits of both."""
    hooks = [hook_behind(layer) for layer in shapes.several]
    saes = {hook: sparse_autoencoder("standard", hf, shapes, hook, fitted) for hook in hooks}
    one, together = "three layers, one pass", "limit, three layers"
    passes, limits = (tuple(f"{kind}, {hook}" for hook in hooks) for kind in ("one layer", "limit"))
    with sitting.group() as attach:
        ways: dict[str, Callable[[], object]] = {one: attach(counting(sharing(hf), saes, shapes))}
        for name, (hook, sae) in zip(passes, saes.items(), strict=True):
            ways[name] = attach(counting(sharing(hf), {hook: sae}, shapes))
        ways[together] = limit_of_several(hf, saes[hooks[-1]], shapes)
        for name, sae, layer in zip(limits, saes.values(), shapes.several, strict=True):
            ways[name] = limit(hf, sae, replace(shapes, tapped=layer))
        sitting.time(
            ways,
            [
                Claim("three layers in one pass / three passes", (one,), passes, at_most(0.60)),
                Claim("the same of their limits alone", (together,), limits),
                Claim("three layers in one pass / limit", (one,), (together,)),
            ],
            share=0.2,
        )


def on_cpu(sitting: Sitting, shapes: Shapes) -> None:
    """Time counting on Hugging Face, TransformerLens and its bridge, with several layers, other SAEs, the peers and
    memory.
    """
    hf, bound = hugging_face(shapes), at_most(1.03, end=1.05)
    fitted = Weights.fitting(hf, shapes)
    relu, topk, jumprelu = (
        sparse_autoencoder(kind, hf, shapes, weights=fitted) for kind in ("standard", "topk", "jumprelu")
    )
    with sitting.group() as attach:
        sitting.time(
            {
                "limit": limit(hf, relu, shapes),
                "counting": attach(counting(sharing(hf), {shapes.hook: relu}, shapes)),
                "counting, topk": attach(counting(sharing(hf), {shapes.hook: topk}, shapes)),
                "counting, jumprelu": attach(counting(sharing(hf), {shapes.hook: jumprelu}, shapes)),
            },
            [
                Claim("everything / limit, HF forward", ("counting",), ("limit",), bound),
                Claim("TopK / ReLU", ("counting, topk",), ("counting",), at_most(1.1)),
                Claim("JumpReLU / ReLU", ("counting, jumprelu",), ("counting",), at_most(1.1)),
            ],
            share=0.25,
        )
    time_several(sitting, hf, fitted, shapes)
    hooked = hooked_transformer(shapes)
    peers = {
        "dense loop": dense_loop(sharing(hf), relu, shapes),
        "run_evals, HookedTransformer": sae_lens_evals(hooked, sparse_autoencoder("standard", hooked, shapes), shapes),
        "run_evals, HookedProxyLM": proxy_evals(hf, shapes, fitted),
    }
    beside = "counting, beside the peers"
    with sitting.group() as attach:
        sitting.time(
            {beside: attach(counting(sharing(hf), {shapes.hook: relu}, shapes)), **peers},
            [
                Claim(f"{peer} / everything", (peer,), (beside,), at_least(2.5 if peer == "dense loop" else 1.6))
                for peer in peers
            ],
            share=0.25,
        )
    # A bridge cannot be copied, so each side has its own, of the same weights.
    bridged = bridge(shapes)
    pairs = {"HookedTransformer": (hooked, sharing(hooked)), "TransformerBridge": (bridged, bridge(shapes))}
    for name, (bare, watched) in pairs.items():
        sae, ours, least = sparse_autoencoder("standard", bare, shapes), f"counting, {name}", f"limit, {name}"
        with sitting.group() as attach:
            sitting.time(
                {
                    least: limit(bare, sae, shapes),
                    ours: attach(counting(watched, {shapes.hook: sae}, shapes)),
                },
                [Claim(f"everything / limit, {name}", (ours,), (least,), bound)],
                share=0.15,
            )
    if not sitting.asked.tiny:
        growth = growth_apart(__file__, "counting", 5)
        sitting.rows.append(spread("growth of peak RSS over the loaded state, MB", growth, at_most(120)))
        for way, environment in (("the cut forward pass", {}), ("the cut forward pass", MAPPED), ("counting", MAPPED)):
            name = f"{way}, large blocks given back" if environment else way
            sitting.sizes[f"peak RSS growth of {name}"] = median(growth_apart(__file__, way, 3, environment))
        for peer in ("dense loop", "run_evals"):
            sitting.sizes[f"peak RSS growth of {peer}"] = growth_apart(__file__, peer, 1)[0]


def counting_once(model: Any, sae: Any, shapes: Shapes) -> None:
    """A session of one batch, including everything it allocates."""
    with counting(sharing(model), {shapes.hook: sae}, shapes, warm=1):
        pass


def waits(sitting: Sitting, name: str, model: Any, sae: Any, shapes: Shapes) -> None:
    """Add a row on how often a batch synchronises where the forward pass alone does not, and a note on where."""
    forward = cut_forward(model, shapes)
    with runs_of(sharing(model), {shapes.hook: sae}, shapes) as runs:
        places = synchronisations(runs) - synchronisations(lambda batches: [forward() for _ in range(batches)])
    title, none = f"synchronisations a batch beyond the forward pass's, {name}", at_most(0)
    gpu = torch.cuda.is_available()
    sitting.rows.append(fact(title, places.total(), none) if gpu else absent(title, "no GPU", none))
    if places:
        shown = ", ".join(f"{place} ({number})" for place, number in places.most_common(12))
        sitting.notes.append(f"Where {name} synchronises in a batch: {shown}.")


def beside_limit(sitting: Sitting, model: Any, saes: Mapping[str, Any], shapes: Shapes, share: float) -> None:
    """Add rows on SAEs of one precision beside the limit, and on tokens per second."""
    one = next(iter(saes.values()))
    bare = f"limit, {str(one.W_enc.dtype).removeprefix('torch.')} SAE"
    sitting.sizes[f"peak device memory of the {bare}"] = device_growth_mb(partial(limit_once, model, one, shapes))
    for name, sae in saes.items():
        growth = device_growth_mb(partial(counting_once, model, sae, shapes))
        sitting.sizes[f"peak device memory of counting, {name}"] = growth
    with sitting.group() as attach:
        ways: dict[str, Callable[[], object]] = {}
        for name, sae in saes.items():
            for kind, at_once in ((name, False), (f"{name}, compiled", True)):
                with compiled(at_once):
                    step = counting(sharing(model), {shapes.hook: sae}, shapes, BATCHES, warm=1)
                    ways[f"counting, {kind}"] = attach(step)
        turns = sitting.time(
            {bare: limit(model, one, shapes, BATCHES), **ways},
            [Claim(way.replace("counting", "everything / limit"), (way,), (bare,), at_most(1.15)) for way in ways],
            share,
            BATCHES,
        )
    tokens_a_turn = shapes.rows * shapes.context * BATCHES
    sitting.rows += [
        row(way.replace("counting", "tokens a second"), [tokens_a_turn / seconds for seconds in turns[way]])
        for way in ways
        if turns[way]
    ]


def beside_evals(sitting: Sitting, model: Any, sae: Any, shapes: Shapes, share: float) -> None:
    """Add rows on SAELens' `run_evals`, which holds all latents of the batch."""
    kind = f"{str(sae.W_enc.dtype).removeprefix('torch.')} SAE"
    peer, ours = f"run_evals, HookedProxyLM, {kind}", f"counting, beside run_evals, {kind}"
    ways = {ours: False, f"{ours}, compiled": True}
    claims = [
        Claim(way.replace("counting, beside run_evals", "run_evals / everything"), (peer,), (way,), at_least(3))
        for way in ways
    ]
    try:
        with sitting.group() as attach:
            steps: dict[str, Callable[[], object]] = {}
            for way, at_once in ways.items():
                with compiled(at_once):
                    steps[way] = attach(counting(sharing(model), {shapes.hook: sae}, shapes, warm=1))
            steps[peer] = sae_lens_evals(proxy_model(sharing(model), shapes), sae, shapes)
            sitting.sizes[f"peak device memory of {peer}"] = device_growth_mb(steps[peer])
            sitting.time(steps, claims, share)
    except torch.OutOfMemoryError:
        why = "run_evals runs out of the device's memory"
        sitting.rows += [absent(claim.name, why, claim.goal) for claim in claims]


def on_cuda(sitting: Sitting, shapes: Shapes) -> None:
    """Time counting on the device beside its limit, with SAEs of three kinds and two precisions, `run_evals`, and
    memory.
    """
    hf = hugging_face(shapes)
    fitted = Weights.fitting(hf, shapes)
    kinds = {"ReLU": "standard", "TopK": "topk", "JumpReLU": "jumprelu"}
    single = {name: sparse_autoencoder(kind, hf, shapes, weights=fitted) for name, kind in kinds.items()}
    half = {"ReLU in bfloat16": sparse_autoencoder("standard", hf, shapes, weights=fitted, dtype=torch.bfloat16)}
    beside_limit(sitting, hf, single, shapes, 0.5)
    beside_limit(sitting, hf, half, shapes, 0.2)
    for name, sae in (single | half).items():
        waits(sitting, name, hf, sae, shapes)
    named = f"gpt_neox.layers.{shapes.tapped - 1}"
    for dtype in (torch.float32, torch.bfloat16):
        sae = sparse_autoencoder("standard", hf, shapes, named, fitted, dtype)
        beside_evals(sitting, hf, sae, shapes, 0.15)


def benchmark(sitting: Sitting) -> None:
    """Time counting on the device that was asked for."""
    asked = sitting.asked
    shapes = shapes_of(asked.device, asked.tiny)
    sitting.notes.append(shapes.described() + ".")
    (on_cuda if asked.device == "cuda" else on_cpu)(sitting, shapes)


def main() -> None:
    asked = arguments(__doc__, 150, {"cuda": 36}, tiny=True)
    if asked.memory_of:
        print(memory(asked.memory_of))
        return
    with Sitting("measure", asked) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
