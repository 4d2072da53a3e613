"""The models and SAEs that benchmarks run: GPT-NeoX with random weights, and SAEs with 0.8% of their latents active on
it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tl_capacity.runtime.compiling import COMPILE


@dataclass(frozen=True)
class Shapes:
    """The sizes that a benchmark runs, with the device and the precision.

    Attributes:
        tapped: the layer behind which the SAE sits.
        several: the layers behind which several sit: a third, a half and two thirds of the depth, as in the published
            measurement.
        active: share of the latents that are active.
        dtype: of the model.
    """

    d_model: int = 768
    heads: int = 12
    layers: int = 12
    tapped: int = 6
    several: tuple[int, ...] = (4, 6, 8)
    d_sae: int = 24_576
    vocabulary: int = 50_304
    rows: int = 8
    context: int = 256
    active: float = 0.008
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def hook(self) -> str:
        return hook_behind(self.tapped)

    def described(self) -> str:
        return (
            f"GPT-NeoX d = {self.d_model:,}, {self.layers} layers, vocabulary {self.vocabulary:,}, random weights in"
            f" {str(self.dtype).removeprefix('torch.')}; SAEs of {self.d_sae:,} latents behind layer {self.tapped},"
            f" {self.active:.1%} of them active; batches of {self.rows}×{self.context:,} tokens"
        )


CPU = Shapes()
CUDA = Shapes(2304, 18, d_sae=65_536, rows=16, context=1024, device="cuda", dtype=torch.bfloat16)


def tiny(shapes: Shapes) -> Shapes:
    """Tiny shapes of the same precision, on a GPU only if there is one. They show that a benchmark runs."""
    device = shapes.device if torch.cuda.is_available() else "cpu"
    return Shapes(64, 4, 3, 2, (1, 2), 512, 1024, 4, 32, 0.02, device, shapes.dtype)


def shapes_of(device: str, small: bool) -> Shapes:
    shapes = {"cpu": CPU, "cuda": CUDA}[device]
    return tiny(shapes) if small else shapes


def hook_behind(layer: int) -> str:
    return f"blocks.{layer - 1}.hook_resid_post"


def neox_config(shapes: Shapes) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.d_model,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        intermediate_size=4 * shapes.d_model,
        max_position_embeddings=shapes.context,
        bos_token_id=0,
        eos_token_id=0,
    )


def hugging_face(shapes: Shapes = CPU) -> Any:
    from transformers import GPTNeoXForCausalLM

    torch.manual_seed(0)
    with torch.device(shapes.device):  # the weights are drawn where they are needed
        model: Any = GPTNeoXForCausalLM(neox_config(shapes))
    return model.to(device=shapes.device, dtype=shapes.dtype).eval()


def hooked_transformer(shapes: Shapes = CPU) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=shapes.layers,
            d_model=shapes.d_model,
            n_ctx=shapes.context,
            d_head=shapes.d_model // shapes.heads,
            n_heads=shapes.heads,
            d_mlp=4 * shapes.d_model,
            d_vocab=shapes.vocabulary,
            act_fn="gelu",
            normalization_type="LN",
            positional_embedding_type="rotary",
            rotary_dim=shapes.d_model // shapes.heads // 4,
            parallel_attn_mlp=True,
            seed=0,
        )
    ).eval()


def tokenizer(shapes: Shapes, **settings: Any) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shapes.vocabulary)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", **settings)


def bridge(shapes: Shapes = CPU) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "local/benchmark",
        hf_model=hugging_face(shapes),
        tokenizer=tokenizer(shapes, name_or_path="local", add_bos_token=True),
        device="cpu",
    ).eval()


def proxy_model(hf: Any, shapes: Shapes = CPU) -> Any:
    """SAELens' fastest way to run a Hugging Face model: its own layers and SDPA behind hook names."""
    from sae_lens.load_model import HookedProxyLM

    return HookedProxyLM(hf, tokenizer(shapes))


def sharing(model: Any) -> Any:
    """A copy of a model that shares its weights. What is later attached to one does not see the other's calls."""
    weights = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def tokens(shapes: Shapes = CPU) -> torch.Tensor:
    ids = torch.randint(1, shapes.vocabulary, (shapes.rows, shapes.context), generator=torch.Generator().manual_seed(2))
    return ids.to(shapes.device)


def cut_forward(model: Any, shapes: Shapes = CPU) -> Callable[[], torch.Tensor]:
    """A forward pass that ends after the tapped layer and returns its output."""
    batch = tokens(shapes)
    if hasattr(model, "hook_dict"):
        short = sharing_where_possible(model)

        @torch.no_grad()
        def stopped() -> torch.Tensor:
            activation: torch.Tensor = short(batch, stop_at_layer=shapes.tapped)
            return activation

        return stopped
    trunk = sharing(model.gpt_neox)
    trunk.layers = trunk.layers[: shapes.tapped]
    outputs: list[torch.Tensor] = []
    trunk.layers[-1].register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )

    @torch.no_grad()
    def once() -> torch.Tensor:
        outputs.clear()
        trunk(batch, use_cache=False)
        return outputs[0]

    return once


def sharing_where_possible(model: Any) -> Any:
    """A copy that shares weights, for TransformerLens' own models. A bridge keeps references to its parts and is used
    as it is.
    """
    return sharing(model) if type(model).__name__ == "HookedTransformer" else model


@dataclass(frozen=True)
class Weights:
    """An encoder, and the threshold that the wanted share of its products exceeds on a model's activations."""

    encoder: torch.Tensor
    threshold: float

    @classmethod
    def fitting(cls, model: Any, shapes: Shapes = CPU) -> Weights:
        activations = cut_forward(model, shapes)().reshape(-1, shapes.d_model)[:256].float()
        random = torch.Generator(shapes.device).manual_seed(1)
        encoder = torch.randn(shapes.d_model, shapes.d_sae, generator=random, device=shapes.device)
        encoder /= activations.norm(dim=1).mean()
        products = (activations @ encoder).flatten().sort().values
        return cls(encoder, float(products[round((1 - shapes.active) * len(products)) - 1]))


def sparse_autoencoder(
    kind: str,
    model: Any,
    shapes: Shapes = CPU,
    hook: str | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A random SAE with 0.8% of its latents active on the model's own activations."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    weights = weights or Weights.fitting(model, shapes)
    common: dict[str, Any] = {
        "d_in": shapes.d_model,
        "d_sae": shapes.d_sae,
        "device": shapes.device,
        "dtype": str(dtype).removeprefix("torch."),
        "metadata": SAEMetadata(hook_name=hook or shapes.hook, prepend_bos=False, context_size=shapes.context),
    }
    if kind == "topk":
        sae: Any = TopKSAE(TopKSAEConfig(**common, k=round(shapes.active * shapes.d_sae)))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        sae.threshold.data.fill_(weights.threshold)
    else:
        sae = StandardSAE(StandardSAEConfig(**common))
        sae.b_enc.data.fill_(-weights.threshold)
    sae.W_enc.data = weights.encoder.to(dtype)
    sae.W_dec.data = sae.W_enc.data.T.contiguous()
    return sae.requires_grad_(False)


@contextmanager
def compiled(at_once: bool) -> Iterator[None]:
    """Inside the block, sessions that begin and losses are compiled at once, or never."""
    before = os.environ.get(COMPILE)
    os.environ[COMPILE] = str(int(at_once))
    try:
        yield
    finally:
        os.environ.pop(COMPILE)
        os.environ |= {} if before is None else {COMPILE: before}


WARM = 3
"""Batches before those that are timed. After them, the sums of every document group are in memory."""


@contextmanager
def counting(
    model: Any, saes: Any, shapes: Shapes = CPU, batches: int = 1, warm: int = WARM
) -> Iterator[Callable[[], object]]:
    """A step of batches in the middle of a run of the product: counts, moments, L0, incidence, FVU on one document in
    eight.
    """
    from tl_capacity import add_capacity_hooks

    batch = tokens(shapes).cpu()  # as a tokenizer gives them; the session brings them to the model
    with add_capacity_hooks(model, saes) as capacity:
        capacity.run([batch] * warm, progress=False)
        yield lambda: capacity.run([batch] * batches, progress=False)
