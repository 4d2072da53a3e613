"""A local hub cache: tiny models, SAEs and a data set under the ids that readers of the documentation type."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
"""What tokenizers are trained on, and the data set is made of."""
END = "<|endoftext|>"
WIDTH, CONTEXT = 64, 1024
DOCUMENTS = 24
"""Few enough for pages that ask for 100,000 tokens."""


def put_in_cache(cache: Path, repository: str, files: Path, inside: str = "") -> Path:
    """Lay `files` out as huggingface_hub does: refs/main names a commit, whose files are under snapshots."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(files, snapshot / inside, dirs_exist_ok=True)
    return snapshot


def fill(folder: Path) -> None:
    """Puts all of it under `folder`: the hub's cache in `hub`, that of the datasets library in `datasets`."""
    for name, add in (("gpt2", add_gpt2), ("pythia", add_pythia), ("gemma", add_gemma)):
        add(folder / "hub", folder / name)
    add_pile(folder / "datasets")


def environment(folder: Path) -> dict[str, str]:
    """What makes a process find all of it, and ask no network."""
    return {"HF_HUB_CACHE": f"{folder / 'hub'}", "HF_DATASETS_CACHE": f"{folder / 'datasets'}", "HF_HUB_OFFLINE": "1"}


@cache
def texts() -> tuple[str, ...]:
    """Paragraphs of the documentation."""
    paragraphs = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES).split("\n\n")
    return tuple([paragraph for paragraph in paragraphs if len(paragraph) > 300][:DOCUMENTS])


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, with 600 tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, unk_token=END)


def add_model(cache: Path, folder: Path, repository: str, kind: Any, config: Any) -> Any:
    """A random model and its tokenizer."""
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    put_in_cache(cache, repository, folder)
    return model


def streams(model: Any) -> list[torch.Tensor]:
    """The residual stream before each block, and after the last norm: [token, dimension]."""
    ids = byte_tokenizer()("\n".join(texts()))["input_ids"][:2048]
    with torch.no_grad():
        hidden = model(torch.tensor(ids).view(-1, 128), output_hidden_states=True).hidden_states
    return [stream.flatten(0, 1) for stream in hidden]


def principal_sae(activations: torch.Tensor) -> dict[str, torch.Tensor]:
    """A ReLU SAE whose features are both directions of each principal component, beyond a threshold."""
    mean = activations.mean(0)
    directions = torch.linalg.svd(activations - mean, full_matrices=False).Vh
    both = torch.cat([directions, -directions])
    along = (activations - mean) @ both.T
    return {
        "W_enc": both.T.contiguous(),
        "b_enc": -mean @ both.T - 0.5 * along.std(0),
        "W_dec": both,
        "b_dec": mean,
    }


def add_sae(
    cache: Path, folder: Path, repository: str, inside: str, hook: str, model: str, activations: torch.Tensor
) -> None:
    """An SAE in the format of SAELens before version 6, as old releases are stored."""
    weights = principal_sae(activations)
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(2 * WIDTH)}, folder / "sparsity.safetensors")
    cfg = {
        "model_name": model,
        "hook_point": hook,
        "hook_point_layer": int(hook.split(".")[1]),
        "hook_point_head_index": None,
        "dataset_path": "NeelNanda/pile-10k",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "apply_b_dec_to_input": False,
        "d_in": WIDTH,
        "d_sae": 2 * WIDTH,
        "dtype": "torch.float32",
        "device": "cpu",
        "l1_coefficient": 8e-05,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    put_in_cache(cache, repository, folder, inside)


def add_gpt2(cache: Path, folder: Path) -> None:
    """`gpt2` with 12 layers of width 64, and two SAEs of `gpt2-small-res-jb`, which read centred activations."""
    sizes = {"vocab_size": 600, "n_embd": WIDTH, "n_layer": 12, "n_head": 4, "n_positions": CONTEXT, "n_ctx": CONTEXT}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = add_model(cache, folder / "model", "gpt2", GPT2LMHeadModel, config)
    for layer in (4, 8):
        hook, stream = f"blocks.{layer}.hook_resid_pre", streams(model)[layer]
        centred = stream - stream.mean(-1, keepdim=True)
        add_sae(cache, folder / hook, "jbloom/GPT2-Small-SAEs-Reformatted", hook, hook, "gpt2-small", centred)


def add_pythia(cache: Path, folder: Path) -> None:
    """`EleutherAI/pythia-70m-deduped` with an SAE of `pythia-70m-deduped-res-sm`, and `EleutherAI/pythia-410m` with one
    of the paper's; both of width 64.
    """
    sizes = {"vocab_size": 600, "hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 4}
    for size, layers in (("70m-deduped", 6), ("410m", 24)):
        config = GPTNeoXConfig(
            **sizes, num_hidden_layers=layers, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0
        )
        model = add_model(cache, folder / size, f"EleutherAI/pythia-{size}", GPTNeoXForCausalLM, config)
        if size == "410m":
            add_paper_sae(cache, folder / "paper", streams(model)[13])
        else:
            repository, hook = "ctigges/pythia-70m-deduped__res-sm_processed", "blocks.3.hook_resid_post"
            add_sae(cache, folder / "sae", repository, "3-res-sm", hook, "pythia-70m-deduped", streams(model)[4])


def add_paper_sae(cache: Path, folder: Path, activations: torch.Tensor) -> None:
    """An SAE of layer 12 as the paper's training script writes it."""
    weights = principal_sae(activations)
    state = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"] + weights["b_dec"] @ weights["W_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        "decoder.bias": torch.zeros(WIDTH),
        "b_pre": weights["b_dec"],
    }
    folder.mkdir()
    torch.save({"model_state": state, "config": {"layer": 12, "d_sae": 2 * WIDTH}}, folder / "sae_layer12_final.pt")
    put_in_cache(cache, "nileshsarkar-ai/colm-run-trial-2", folder)


def add_gemma(cache: Path, folder: Path) -> None:
    """`google/gemma-2-2b` with 13 thin layers, and Gemma Scope's SAE of layer 12, whose sizes SAELens knows: of 16,384
    latents all but 512 are silent.
    """
    d_in, d_sae, used = 2304, 16384, 256
    config = Gemma2Config(
        vocab_size=600,
        hidden_size=d_in,
        intermediate_size=32,
        num_hidden_layers=13,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        sliding_window=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = add_model(cache, folder / "model", "google/gemma-2-2b", Gemma2ForCausalLM, config)
    stream = residual_after(model, 12)
    mean = stream.mean(0)
    directions = torch.linalg.svd((stream - mean)[: 2 * used], full_matrices=False).Vh[:used]
    both = torch.cat([directions, -directions])
    weights = {
        "W_enc": np.zeros((d_in, d_sae), np.float32),
        "W_dec": np.zeros((d_sae, d_in), np.float32),
        "b_enc": np.full(d_sae, -1.0, np.float32),
        "b_dec": mean.numpy(),
        "threshold": np.full(d_sae, 1e-3, np.float32),
    }
    weights["W_enc"][:, : 2 * used], weights["W_dec"][: 2 * used] = both.T, both
    weights["b_enc"][: 2 * used] = -mean @ both.T
    weights["threshold"][: 2 * used] = 0.3 * ((stream - mean) @ both.T).std(0)
    (folder / "sae").mkdir()
    np.savez_compressed(folder / "sae" / "params.npz", **weights)
    inside = "layer_12/width_16k/average_l0_82"
    put_in_cache(cache, "google/gemma-scope-2b-pt-res", folder / "sae", inside)


def residual_after(model: Any, layer: int) -> torch.Tensor:
    """What a block of a Hugging Face model gives, before any norm: [token, dimension]."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    streams(model)
    handle.remove()
    return seen[0].detach().flatten(0, 1)


def add_pile(cache: Path) -> None:
    """`NeelNanda/pile-10k` as the datasets library keeps what it has read."""
    import datasets

    data = datasets.Dataset.from_dict({"text": list(texts())})
    home = cache / "NeelNanda___pile-10k" / "default" / "0.0.0" / COMMIT
    home.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(home / "pile-10k-train.arrow"), features=data.features) as writer:
        for row in data:
            writer.write(row)
        rows, size = writer.finalize()
    split = datasets.SplitInfo("train", num_bytes=size, num_examples=rows, dataset_name="pile-10k")
    datasets.DatasetInfo(
        features=data.features,
        builder_name="parquet",
        dataset_name="pile-10k",
        config_name="default",
        version=datasets.Version("0.0.0"),
        splits=datasets.SplitDict({"train": split}),
    ).write_to_directory(str(home))
