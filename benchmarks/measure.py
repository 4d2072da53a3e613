"""What counting costs beside the forward pass it rides on, and beside the two ways it is done elsewhere:
`python benchmarks/measure.py [--json]`.

GPT-NeoX d=768, 12 layers, vocabulary 50,304, random weights; a ReLU SAE of 24,576 latents after layer 6 of which 0.8%
are active; batches of 8×256 tokens, float32, two threads. The *limit* is the Hugging Face forward pass (SDPA) cut after
that layer, plus one preallocated encoder product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Prepared, Row, arguments, at_least, at_most, growth_apart, medians, peak_growth_mb, report

D_MODEL, LAYERS, TAPPED, D_SAE, VOCABULARY, ROWS, CONTEXT, ACTIVE = 768, 12, 6, 24_576, 50_304, 8, 256, 0.008
HOOK = f"blocks.{TAPPED - 1}.hook_resid_post"
WARM = 4
"""Batches before the one that is timed, after which the sums of every document group are in memory."""
TIMED = 3
"""Batches that are timed after these."""
PROCESSES = 5
"""Processes whose memory is measured, one after another: how much of it the allocator reuses differs from one to the
next.
"""
SEVERAL = (
    4,
    6,
    8,
)  # after which layers several SAEs sit: a third, a half and two thirds of the depth, as in the published measurement


def hugging_face() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * D_MODEL,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def hooked_transformer() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=LAYERS,
            d_model=D_MODEL,
            n_ctx=CONTEXT,
            d_head=64,
            n_heads=12,
            d_mlp=4 * D_MODEL,
            d_vocab=VOCABULARY,
            act_fn="gelu",
            normalization_type="LN",
            positional_embedding_type="rotary",
            rotary_dim=16,
            parallel_attn_mlp=True,
            seed=0,
        )
    ).eval()


def bridge() -> Any:
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w0", name_or_path="local", add_bos_token=True
    )
    return TransformerBridge.boot_transformers(
        "local/benchmark", hf_model=hugging_face(), tokenizer=tokenizer, device="cpu"
    ).eval()


def sparse_autoencoder(kind: str, model: Any, hook: str = HOOK) -> Any:
    """A random SAE at which 0.8% of the latents are active on the model's own activations."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    activations = cut_forward(model)().reshape(-1, D_MODEL)[:256]
    encoder = torch.randn(D_MODEL, D_SAE, generator=torch.Generator().manual_seed(1)) / activations.norm(dim=1).mean()
    threshold = float((activations @ encoder).flatten().kthvalue(round((1 - ACTIVE) * len(activations) * D_SAE)).values)
    common: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "metadata": SAEMetadata(hook_name=hook, prepend_bos=False, context_size=CONTEXT),
    }
    if kind == "topk":
        sae: Any = TopKSAE(TopKSAEConfig(**common, k=round(ACTIVE * D_SAE)))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        sae.threshold.data.fill_(threshold)
    else:
        sae = StandardSAE(StandardSAEConfig(**common))
        sae.b_enc.data.fill_(-threshold)
    sae.W_enc.data = encoder
    sae.W_dec.data = encoder.T.contiguous()
    return sae


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(2))


def counting(model: Any, saes: Any) -> Prepared:
    """A batch in the middle of a run through the product: counts, moments, L0, incidence, FVU on
    one document in eight.
    """
    from tl_capacity import add_capacity_hooks

    batch = tokens()

    @contextmanager
    def attached() -> Iterator[Callable[[], object]]:
        with add_capacity_hooks(model, saes) as capacity:
            capacity.run([batch] * WARM, progress=False)
            yield lambda: capacity.run([batch], progress=False)

    return Prepared(attached)


def cut_forward(model: Any) -> Callable[[], torch.Tensor]:
    """A forward pass that ends after the tapped layer and returns its output."""
    batch = tokens()
    if hasattr(model, "hook_dict"):
        return torch.no_grad()(lambda: model(batch, stop_at_layer=TAPPED))
    trunk = model.gpt_neox
    short = type(trunk)(type(trunk.config)(**{**trunk.config.to_dict(), "num_hidden_layers": TAPPED})).eval()
    short.load_state_dict({k: v for k, v in trunk.state_dict().items() if k in short.state_dict()}, assign=True)
    outputs: list[torch.Tensor] = []
    short.layers[-1].register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )

    @torch.no_grad()
    def once() -> torch.Tensor:
        outputs.clear()
        short(batch, use_cache=False)
        return outputs[0]

    return once


def limit(model: Any, sae: Any) -> Callable[[], object]:
    """The cut forward pass and one encoder product into a buffer that is there already."""
    forward, buffer, weight = cut_forward(model), torch.empty(ROWS * CONTEXT, D_SAE), sae.W_enc.detach()

    def once() -> object:
        return torch.mm(forward().reshape(-1, D_MODEL), weight, out=buffer)

    return once


def dense_loop(model: Any, sae: Any) -> Callable[[], object]:
    """The paper's kind of script: the whole model with its head, dense latents, three dense
    reductions, dense decoding.
    """
    batch = tokens()
    counts, squares, l0, error = torch.zeros(D_SAE), torch.zeros(D_SAE), 0.0, 0.0
    seen: list[torch.Tensor] = []
    model.gpt_neox.layers[TAPPED - 1].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )

    @torch.no_grad()
    def once() -> object:
        nonlocal counts, squares, l0, error
        seen.clear()
        model(batch, use_cache=False)
        x = seen[0].reshape(-1, D_MODEL)
        z = sae.encode(x)
        counts += (z > 0).float().sum(0)
        squares += z.square().sum(0)
        l0 += (z > 0).float().sum(-1).mean().item()
        error += (x - sae.decode(z)).square().sum().item()
        return counts

    return once


def sae_lens_evals(model: Any, sae: Any) -> Callable[[], object]:
    """SAELens' own `run_evals` with feature density and sparsity metrics, on the same number of tokens."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    rows = Dataset.from_dict({"tokens": tokens().repeat(8, 1).tolist()})
    config = EvalConfig(
        batch_size_prompts=ROWS,
        compute_sparsity_metrics=True,
        compute_featurewise_density_statistics=True,
        n_eval_sparsity_variance_batches=1,
    )

    def once() -> object:
        store = ActivationsStore.from_sae(
            model,
            sae,
            context_size=CONTEXT,
            dataset=rows,
            streaming=False,
            store_batch_size_prompts=ROWS,
            n_batches_in_buffer=1,
        )
        return run_evals(sae, store, model, ActivationScaler(), eval_config=config)

    return once


def proxy_model(hf: Any) -> Any:
    """SAELens' fastest way to run a Hugging Face model: its own layers and SDPA behind hook names."""
    from sae_lens.load_model import HookedProxyLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    return HookedProxyLM(hf, PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0"))


def memory(which: str) -> float:
    """Peak growth of one way of counting, in MB; run in a process of its own."""
    model = hugging_face()
    sae = sparse_autoencoder("standard", model)
    candidates: dict[str, Callable[[], Callable[[], object]]] = {
        "counting": lambda: counting(model, {HOOK: sae}),
        "dense loop": lambda: dense_loop(model, sae),
        "run_evals": lambda: sae_lens_evals(
            proxy_model(model), sparse_autoencoder("standard", model, f"gpt_neox.layers.{TAPPED - 1}")
        ),
    }
    candidate = candidates[which]()
    ctypes.CDLL(None).malloc_trim(0)  # what making the model and the SAE took and left
    cut_forward(model)()  # the allocator's own pools and the libraries' thread buffers belong to the loaded state
    return peak_growth_mb(candidate)


def main() -> None:
    asked = arguments(__doc__, 5)
    if asked.memory_of:
        print(memory(asked.memory_of))
        return

    seconds: dict[str, float] = {}
    hf = hugging_face()
    relu = sparse_autoencoder("standard", hf)
    hooks = [f"blocks.{layer - 1}.hook_resid_post" for layer in SEVERAL]
    seconds |= medians(
        {
            "limit": limit(hf, relu),
            "counting": counting(hf, {HOOK: relu}),
            "counting, topk": counting(hf, {HOOK: sparse_autoencoder("topk", hf)}),
            "counting, jumprelu": counting(hf, {HOOK: sparse_autoencoder("jumprelu", hf)}),
            "three layers, one pass": counting(hf, dict.fromkeys(hooks, relu)),
            **{f"one layer, {hook}": counting(hf, {hook: relu}) for hook in hooks},
        },
        asked.repetitions,
        TIMED,
    )
    hooked = hooked_transformer()
    peers = {
        "dense loop": dense_loop(hugging_face(), relu),
        "run_evals, HookedTransformer": sae_lens_evals(hooked, sparse_autoencoder("standard", hooked)),
        "run_evals, HookedProxyLM": sae_lens_evals(
            proxy_model(hugging_face()), sparse_autoencoder("standard", hf, f"gpt_neox.layers.{TAPPED - 1}")
        ),
    }
    seconds |= medians({"counting, beside the peers": counting(hf, {HOOK: relu}), **peers}, asked.repetitions)
    for name, model in (("HookedTransformer", hooked), ("TransformerBridge", bridge())):
        sae = sparse_autoencoder("standard", model)
        seconds |= medians(
            {f"limit, {name}": limit(model, sae), f"counting, {name}": counting(model, {HOOK: sae})},
            asked.repetitions,
            TIMED,
        )

    growth = growth_apart(__file__, ("counting", "dense loop", "run_evals"), PROCESSES)
    three_passes = sum(seconds[f"one layer, {hook}"] for hook in hooks)
    rows: list[Row] = [
        at_most("everything / limit, HF forward", seconds["counting"] / seconds["limit"], 1.10),
        *(
            at_most(f"everything / limit, {n}", seconds[f"counting, {n}"] / seconds[f"limit, {n}"], 1.10)
            for n in ("HookedTransformer", "TransformerBridge")
        ),
        *(
            at_least(
                f"{peer} / everything",
                seconds[peer] / seconds["counting, beside the peers"],
                2.5 if peer == "dense loop" else 1.6,
            )
            for peer in peers
        ),
        at_most("growth of peak RSS over the loaded state, MB", growth["counting"], 200),
        at_most("three layers in one pass / three passes", seconds["three layers, one pass"] / three_passes, 0.70),
        at_most("TopK / ReLU", seconds["counting, topk"] / seconds["counting"], 1.1),
        at_most("JumpReLU / ReLU", seconds["counting, jumprelu"] / seconds["counting"], 1.1),
    ]
    report("measure", rows, {**seconds, **{f"peak RSS growth of {k}, MB": v for k, v in growth.items()}}, asked.json)


if __name__ == "__main__":
    main()
