"""Rebuilds the embedded teacher: a six-layer GPT-NeoX trained on public-domain prose, with its SAEs and its texts.

Each stage continues where an earlier run of it stopped, so that a machine may be lost in between: texts, tokenizer,
train, export, saes.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tl_capacity.hooks.embedded import LAYERS
from tl_capacity.recipes import train_sae
from tl_capacity.recipes.muon import Muon
from tl_capacity.recipes.public_domain_text import SPLITS, Document, documents
from tl_capacity.recipes.sae_config import TrainSAEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from tl_capacity.errors import CapacityError
from tl_capacity.recipe import option, run_file
from tl_capacity.runtime.hub import loading_errors, reason_of
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage import files as storage
from tl_capacity.storage.digests import digest
from tl_capacity.storage.folders import new_folder, written

BOS = 0  # <|endoftext|>, as in Pythia; the id is valid although it is falsy
STAGES = ("texts", "tokenizer", "train", "export", "saes")
SAMPLE_PROMPTS = ("The Lord is my", "Elizabeth had never", "And it came to pass", "In the beginning", "Mr. Knightley")


@dataclass(frozen=True)
class TeacherConfig:
    """Everything that decides the teacher's weights."""

    vocabulary: int = 4096
    context: int = 256
    d_model: int = 128
    layers: int = 6
    heads: int = 4
    batch_rows: int = 16
    cycles: tuple[int, ...] = (9_000_000, 15_000_000)  # tokens at which each cycle of the learning rate ends
    warmup_tokens: int = 400_000
    decay_share: float = 0.4
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.cycles[-1] // (self.batch_rows * self.context)

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of the peak.

        Each cycle has linear warm-up, a constant rate, and linear decay to zero (WSD-S, Wen et al. 2024,
        arXiv:2410.05192).

        A teacher whose loss still falls at the end of a cycle goes on from there with one more, and the steps before
        stay what they were.
        """
        ends = [tokens // (self.batch_rows * self.context) for tokens in self.cycles]
        start, end = next((start, end) for start, end in zip([0, *ends], ends, strict=False) if step < end)
        warmup = max(1, self.warmup_tokens // (self.batch_rows * self.context))
        return min(1.0, (step - start + 1) / warmup, (end - step) / (self.decay_share * (end - start)))


@dataclass(frozen=True)
class EmbeddedTeacherConfig:
    """The options of `tl-capacity run embedded-teacher`."""

    work: Path = option(Path("runs/embedded-teacher"), "Folder for downloads and checkpoints.")
    out: Path = option(Path("hooks/embedded"), "Package folder to write the artefacts to.")
    stages: tuple[str, ...] = option(STAGES, f"Stages to run, out of {','.join(STAGES)}.")
    threads: int = option(2, "CPU threads.")
    sae_tokens: int = option(2_000_000, "Tokens that each SAE is trained on.")


def main(config: EmbeddedTeacherConfig) -> None:
    """Rebuild the embedded teacher, its SAEs and its texts from public-domain sources."""
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise CapacityError(f"--stages {','.join(unknown)} is not a stage: choose from {', '.join(STAGES)}")
    torch.set_num_threads(config.threads)
    storage.make_folder(config.work)
    texts = documents(config.work / "sources")
    if "texts" in config.stages:
        write_texts(texts, config.work, config.out / "texts")
    if "tokenizer" in config.stages:
        build_tokenizer(texts, config.work / "tokenizer", TeacherConfig.vocabulary)
    if "train" in config.stages:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.work / "tokenizer")
        rows = {
            split: packed_rows(texts, split, tokenizer, TeacherConfig.context, TeacherConfig.seed)
            for split in ("train", "heldout")
        }
        train(TeacherConfig(), rows["train"], rows["heldout"][:256], config.work)
    if "export" in config.stages:
        export(config.work, config.out)
    if "saes" in config.stages:
        for layer in LAYERS:
            folder = config.out / "saes" / f"layer{layer}"
            if not (folder / "training.json").exists():
                train_sae.main(sae_config(layer, folder, config))


def sae_config(layer: int, folder: Path, config: EmbeddedTeacherConfig) -> TrainSAEConfig:
    """The settings of the SAE after a layer.

    It is trained on the teacher's own training text, Brown included. None of that text is measured on.
    """
    return TrainSAEConfig(
        model=str(config.out / "model"),
        hook=f"blocks.{layer}.hook_resid_post",
        source=str(config.work / "train.jsonl"),
        out=folder,
        tokens=config.sae_tokens,
        d_sae=2048,
        k=24,
        lr=2e-3,
        save_dtype="float16",
    )


def write_texts(texts: list[Document], work: Path, out: Path) -> None:
    """Write the training text to `work`, where it is never committed, and the compressed public-domain splits to the
    package.
    """
    shuffled = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    for split in SPLITS:
        chosen = [d for d in shuffled if d.split == split]
        lines = "".join(
            json.dumps({"text": d.text, "source": d.source, "unit": d.unit}, ensure_ascii=False) + "\n" for d in chosen
        ).encode()
        if split == "train":
            storage.write_bytes(work / "train.jsonl", lines)
        else:
            storage.make_folder(out)
            storage.write_bytes(out / f"{split}.jsonl.xz", lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME))


def build_tokenizer(texts: list[Document], folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the training split alone. `<|endoftext|>` (id 0) begins every row."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((d.text for d in texts if d.split == "train"), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        model_max_length=256,
        name_or_path="embedded",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def packed_rows(
    texts: list[Document], split: str, tokenizer: PreTrainedTokenizerFast, context: int, seed: int
) -> np.ndarray:
    """Rows `[BOS, 255 tokens]`, cut from a split's shuffled documents laid end to end with BOS between them."""
    chosen = [d.text for d in texts if d.split == split]
    np.random.default_rng(seed).shuffle(chosen)
    encoded = tokenizer(chosen, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    stream = np.concatenate([np.asarray([*ids, BOS], dtype=np.int32) for ids in encoded])
    rows = stream[: len(stream) // (context - 1) * (context - 1)].reshape(-1, context - 1)
    return np.concatenate([np.full((len(rows), 1), BOS, dtype=np.int32), rows], axis=1)


def new_teacher(config: TeacherConfig) -> GPTNeoXForCausalLM:
    torch.manual_seed(config.seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.d_model,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.d_model,
            max_position_embeddings=config.context,
            bos_token_id=BOS,
            eos_token_id=BOS,
            pad_token_id=1,
            tie_word_embeddings=False,
        )
    )


def next_token_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per predicted token."""
    logits = model(rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, rows: torch.Tensor, batch_rows: int = 16) -> float:
    model.eval()
    losses = [next_token_loss(model, batch).item() * len(batch) for batch in rows.split(batch_rows)]
    model.train()
    return sum(losses) / len(rows)


def train(config: TeacherConfig, train_rows: np.ndarray, heldout_rows: np.ndarray, folder: Path) -> None:
    """Train to the end of the last cycle, resuming from the newest checkpoint.

    The last two checkpoints and a record of the held-out loss are kept.
    """
    model = new_teacher(config)
    hidden = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimisers = [
        Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [config.muon_lr, config.adam_lr]
    record: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    saved = storage.last_whole(checkpoint, read_checkpoint)
    if saved is not None:
        # The cycles may change as long as no step that was taken would have had another learning rate.
        before = TeacherConfig(**saved["config"])
        if replace(before, cycles=config.cycles) != config or any(
            before.rate(step) != config.rate(step) for step in range(saved["step"])
        ):
            raise CapacityError(
                f"{checkpoint} was trained with other settings ({saved['config']}): choose another --work"
            )
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        record, first, seconds = saved["record"], saved["step"], saved["seconds"]
    heldout = torch.from_numpy(heldout_rows).long()
    started, running, last_save = time.monotonic() - seconds, 0.0, time.monotonic()
    rows_seen = np.random.default_rng(config.seed)
    epochs = math.ceil(config.steps * config.batch_rows / len(train_rows))
    order = np.concatenate([rows_seen.permutation(len(train_rows)) for _ in range(epochs)])
    for step in range(first, config.steps):
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * config.rate(step)
        rows = torch.from_numpy(train_rows[order[step * config.batch_rows : (step + 1) * config.batch_rows]]).long()
        loss = next_token_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if done % 250 == 0 or done == config.steps:
            record.append(
                {
                    "tokens": done * config.batch_rows * config.context,
                    "train_loss": round(running, 4),
                    "heldout_loss": round(heldout_loss(model, heldout), 4),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
            print(json.dumps(record[-1]), flush=True)
        if time.monotonic() - last_save > 60 or done == config.steps:
            content = io.BytesIO()
            torch.save(
                {
                    "config": asdict(config),
                    "model": model.state_dict(),
                    "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    "record": record,
                    "step": done,
                    "seconds": time.monotonic() - started,
                },
                content,
            )
            storage.write_bytes(checkpoint, content.getvalue(), keep_previous=True)
            last_save = time.monotonic()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint that `train` saved.

    Raises:
        CapacityError: where it is damaged.
    """
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        return {name: saved[name] for name in ("config", "model", "optimisers", "record", "step", "seconds")}
    except loading_errors() as problem:
        raise CapacityError(
            f"the checkpoint {path} is damaged ({reason_of(problem)}): delete it to train from the beginning"
        ) from problem


def export(work: Path, out: Path) -> None:
    """Write the trained weights in float16, the tokenizer and the training record into the package."""
    saved = storage.last_whole(work / "checkpoint.pt", read_checkpoint)
    if saved is None:
        raise CapacityError(f"{work} holds no checkpoint of the teacher: run the stage `train` first")
    config = TeacherConfig(**saved["config"])
    if saved["step"] < config.steps:
        raise CapacityError(
            f"the teacher is trained to step {saved['step']} of {config.steps}: finish the stage `train` first"
        )
    model, tokenizer = new_teacher(config), PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model.load_state_dict(saved["model"])
    # What is measured and distilled are the rounded weights, so the held-out loss of the record is theirs.
    model = model.half().float().eval()
    texts = documents(work / "sources")
    rows = torch.from_numpy(packed_rows(texts, "heldout", tokenizer, config.context, config.seed)).long()
    characters = sum(len(d.text) for d in texts if d.split == "heldout")
    loss = heldout_loss(model, rows)
    samples = list(sample(model, tokenizer))
    with new_folder(out / "model") as folder, written(out / "model"):
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    storage.write_json(
        out / "training.json",
        {
            "command": "tl-capacity run embedded-teacher",
            "config": saved["config"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "heldout_loss_nats_per_token": round(loss, 4),
            "heldout_characters_per_token": round(characters / rows.numel(), 3),
            "seconds": round(saved["seconds"]),
            "machine": (
                f"{os.cpu_count()} CPU cores, {platform.machine()}; shared with other work, so the seconds are an upper"
                " bound"
            ),
            "versions": library_versions(),
            "weights_sha256": digest((out / "model" / "model.safetensors").read_bytes()),
            "record": saved["record"],
            "samples": samples,
        },
    )


@torch.no_grad()
def sample(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int = 60) -> Iterator[dict[str, str]]:
    """A continuation of each prompt, sampled at temperature 0.8 from the 40 likeliest tokens."""
    torch.manual_seed(0)
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([[BOS, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        for _ in range(tokens):
            top = model(ids, use_cache=False).logits[0, -1].topk(40)
            ids = torch.cat([ids, top.indices[torch.multinomial((top.values / 0.8).softmax(0), 1)][None]], dim=1)
        yield {"prompt": prompt, "text": str(tokenizer.decode(ids[0, 1:]))}


if __name__ == "__main__":
    run_file(main)
