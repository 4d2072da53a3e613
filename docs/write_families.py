"""Writes the table of docs/architectures.md by trying a tiny random model of each architecture: `python
docs/write_families.py [--check]`.

Each cell is tried, and what does not work is told in its own words. With `--check` nothing is written, and the exit
code is 1 where the table is stale.
"""

from __future__ import annotations

import io
import json
import os
import string
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, models
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tl_capacity import Measurement, add_capacity_hooks
from tl_capacity.cli import main as command_line
from tl_capacity.distillation import DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.models.loading import load_model

PAGE = Path(__file__).with_name("architectures.md")
BEGIN, END = "<!-- written by docs/write_families.py -->\n", "<!-- to here -->\n"
HOOK = "blocks.0.hook_resid_post"
VOCABULARY, CONTEXT, ROWS = 50, 16, 80
LETTERS = string.ascii_letters[: VOCABULARY - 2]

SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
OPT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": CONTEXT,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "GPT-NeoX, Pythia": lambda: GPTNeoXConfig(**SHARED, **SIZES, rotary_pct=0.25),  # type: ignore[call-arg]
    "GPT-2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, n_ctx=CONTEXT),  # type: ignore[call-arg]
    "OPT": lambda: OPTConfig(**SHARED, **OPT_SIZES, word_embed_proj_dim=32),
    "Llama, SmolLM2": lambda: LlamaConfig(**SHARED, **SIZES, **GROUPED, tie_word_embeddings=True),
    "Mistral": lambda: MistralConfig(**SHARED, **SIZES, **GROUPED, sliding_window=8),
    "Qwen 2": lambda: Qwen2Config(**SHARED, **SIZES, **GROUPED),
    "Qwen 3": lambda: Qwen3Config(**SHARED, **SIZES, **GROUPED, head_dim=16),
    "Gemma 2": lambda: Gemma2Config(
        **SHARED, **SIZES, **GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8
    ),
    "Gemma 3 (text)": lambda: Gemma3TextConfig(
        **SHARED, **SIZES, **GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8
    ),
    "Phi 1, 1.5 and 2": lambda: PhiConfig(**SHARED, **SIZES, partial_rotary_factor=0.5),  # type: ignore[call-arg]
    "Phi 3": lambda: Phi3Config(**SHARED, **SIZES, **GROUPED),
    "Mamba": lambda: MambaConfig(**SHARED, hidden_size=32, num_hidden_layers=2, state_size=4),
}
OFFICIAL = {"gemma2": "google/gemma-2-2b", "gemma3_text": "google/gemma-3-1b-pt"}
"""Architectures whose settings TransformerLens has under the names of published models, instead of reading a
configuration.
"""


@dataclass(frozen=True)
class Tiny:
    """A tiny random model of one architecture in a folder, with an SAE, text, and the SAE's
    latents computed densely.
    """

    folder: Path

    @classmethod
    def make(cls, config: Any, folder: Path) -> Tiny:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # initial weights leave all activations alike
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        # Each letter a token: transformers makes Qwen 2's tokenizers anew from their vocabulary and merges, whatever
        # else was saved.
        whole = Tokenizer(
            models.BPE({"<s>": 0, "<pad>": 1, **{letter: i for i, letter in enumerate(LETTERS, start=2)}}, [])
        )
        PreTrainedTokenizerFast(
            tokenizer_object=whole, bos_token="<s>", eos_token="<s>", pad_token="<pad>", add_bos_token=True
        ).save_pretrained(folder)
        TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=4)).save_model(str(folder / "sae"))
        ids = np.random.default_rng(0).integers(2, VOCABULARY, size=(ROWS, CONTEXT - 1))
        lines = [
            {"text": "".join(LETTERS[i - 2] for i in row), "label": "odd" if row[0] % 2 else "even"} for row in ids
        ]
        (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return cls(folder)

    @cached_property
    def tokens(self) -> Any:
        """Int64 [row, position]: each text as a row that begins with BOS."""
        texts = [json.loads(line)["text"] for line in (self.folder / "texts.jsonl").read_text().splitlines()]
        return torch.tensor([[0, *(LETTERS.index(letter) + 2 for letter in text)] for text in texts])

    @cached_property
    def model(self) -> Any:
        return load_model(str(self.folder)).model

    @cached_property
    def bridge(self) -> Any:
        return load_model(str(self.folder)).bridge

    @cached_property
    def hooked_transformer(self) -> Any:
        """A HookedTransformer as `HookedTransformer.from_pretrained`, which takes no folder, would make it."""
        kind, config = self.model.config.model_type, self.model.config
        settings = loading_from_pretrained.get_pretrained_model_config(
            OFFICIAL.get(kind, str(self.folder)), device="cpu", n_ctx=CONTEXT
        )
        if kind in OFFICIAL:
            settings.d_model, settings.n_layers, settings.n_heads, settings.d_head, settings.d_mlp = 32, 2, 4, 16, 96
            settings.n_key_value_heads, settings.rotary_dim, settings.window_size = 2, 16, config.sliding_window
            settings.d_vocab = settings.d_vocab_out = VOCABULARY
            settings.attn_scale, settings.attn_types = (
                4.0,
                ["local" if kind.startswith("sliding") else "global" for kind in config.layer_types],
            )
        loaded = load_model(str(self.folder))
        weights = loading_from_pretrained.get_pretrained_state_dict(str(self.folder), settings, loaded.model)
        model = HookedTransformer(settings, loaded.tokenizer, move_to_device=False)
        model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        return model.eval()

    @cached_property
    def sae(self) -> Any:
        return TopKSAE.load_from_disk(self.folder / "sae")

    @cached_property
    def counts(self) -> Any:
        """[feature] tokens on which each latent is active, without BOS."""
        seen: list[Any] = []
        handle = last_block(self.model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            self.model(self.tokens)
            handle.remove()
            return (self.sae.encode(seen[0][:, 1:].flatten(0, 1)) != 0).sum(0).numpy()

    def count(self, model: Any, importance: str = "second_moment") -> Measurement:
        """Tap any form of the model and count."""
        with add_capacity_hooks(model, {HOOK: self.sae}, importance=[importance], mask_token_ids=[0]) as capacity:
            capacity.run(self.tokens, progress=False)
        return capacity.measurement()

    def compare(self, measurement: Measurement) -> None:
        """Compare counts. Another order of summation may choose the other of two nearly equal latents, but nothing else
        may differ.
        """
        different = int(np.abs(measurement[HOOK].summary.arrays["counts"].sum(0) - self.counts).sum())
        if different > 2:
            raise CapacityError(f"{different} of {self.counts.sum():,} active latents are counted otherwise")


def measure(tiny: Tiny) -> None:
    command(
        "measure",
        "--model",
        tiny.folder,
        "--sae",
        f"{HOOK}={tiny.folder / 'sae'}",
        *source(tiny),
        "--max-fvu",
        "inf",
        "--out",
        tiny.folder / "measured",
    )
    tiny.compare(Measurement.load(tiny.folder / "measured"))


def distill(tiny: Tiny) -> None:
    out = tiny.folder / "distilled"
    size = ["--widths", "16", "--tokens", "600", "--heldout-tokens", "60", "--evaluations", "2", "--context", CONTEXT]
    command("run", "distill", "--teacher", tiny.folder, *source(tiny), *size, "--out", out)
    (student,) = DistillationRun.load(out).students
    if student.width != 16:
        raise CapacityError(f"the student has width {student.width}")


def probe(tiny: Tiny) -> None:
    out = tiny.folder / "probed"
    what = ["--hook", HOOK, "--concepts", tiny.folder / "texts.jsonl", "--sae", tiny.folder / "sae", "--no-baselines"]
    command("run", "probe", "--model", tiny.folder, *what, "--out", out)
    if not (out / "probes.json").exists():
        raise CapacityError("no probes were written")


def hugging_face(tiny: Tiny) -> None:
    tiny.compare(tiny.count(tiny.model))


def bridge(tiny: Tiny) -> None:
    tiny.compare(tiny.count(tiny.bridge))


def hooked_transformer(tiny: Tiny) -> None:
    tiny.compare(tiny.count(tiny.hooked_transformer))


def stops(tiny: Tiny) -> None:
    """Whether the block after the tapped one never runs."""
    for model in forms(tiny):
        ran: list[Any] = []
        handle = last_block(model).register_forward_hook(lambda *_, ran=ran: ran.append(None))
        tiny.count(model)
        handle.remove()
        if ran:
            raise CapacityError(f"{type(model).__name__} runs on after the tapped layer")


def gradient(tiny: Tiny) -> None:
    """Whether importances in nats are the same in every form."""
    found = [tiny.count(model, "gradient")[HOOK].importance("gradient") for model in forms(tiny)]
    for other in found[1:]:
        if not np.allclose(other, found[0], rtol=1e-3, atol=1e-5 * found[0].max()):
            raise CapacityError("the forms of the model differ in their gradients")


TRIALS: dict[str, Callable[[Tiny], None]] = {
    "`measure`": measure,
    "`run distill`": distill,
    "`run probe`": probe,
    "Hugging Face": hugging_face,
    "`TransformerBridge`": bridge,
    "`HookedTransformer`": hooked_transformer,
    "stops early": stops,
    "gradients": gradient,
}


def forms(tiny: Tiny) -> Iterator[Any]:
    """The model in each form that it can have."""
    for name in ("model", "bridge", "hooked_transformer"):
        try:
            form = getattr(tiny, name)
        except Exception:  # told in the form's own column
            continue
        yield form


def last_block(model: Any) -> Any:
    """The second of two blocks, found without asking the family, which may be wrong about it."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 2)[1]


def source(tiny: Tiny) -> list[Any]:
    return ["--source", tiny.folder / "texts.jsonl"]


def command(*arguments: Any) -> None:
    """Run the command line in this process. Its output is shown only if it fails.

    Raises:
        CapacityError: with its own words.
    """
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            command_line([str(argument) for argument in arguments])
        except SystemExit as ended:
            if ended.code:
                raise CapacityError(errors.getvalue().rpartition("error: ")[2]) from None


@contextmanager
def tiny_model(architecture: str) -> Iterator[Tiny]:
    """The tiny model of an architecture, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Tiny.make(ARCHITECTURES[architecture](), Path(folder) / "model")


def reasons(architecture: str) -> dict[str, str | None]:
    """For each column, why it does not work; None if it works."""
    found: dict[str, str | None] = {}
    with tiny_model(architecture) as tiny:
        for name, trial in TRIALS.items():
            try:
                trial(tiny)
                found[name] = None
            except Exception as problem:  # whatever a library raises is the reason
                found[name] = " ".join(str(problem).split()).replace(str(tiny.folder), "…")
    return found


def row(architecture: str, found: dict[str, str | None]) -> str:
    """A row of the table. Reasons for what does not work stand below the table."""
    return f"| {architecture} | " + " | ".join("yes" if reason is None else "no" for reason in found.values()) + " |\n"


def why_not(architecture: str, found: dict[str, str | None]) -> str:
    """A line for each thing that does not work."""
    return "".join(f"- {architecture}, {name}: {reason}\n" for name, reason in found.items() if reason is not None)


def table(found: dict[str, dict[str, str | None]]) -> str:
    """The part of the page between the two marks."""
    head = f"| architecture | {' | '.join(TRIALS)} |\n|{'---|' * (len(TRIALS) + 1)}\n"
    rows = "".join(row(*each) for each in found.items())
    versions = f"With TransformerLens {version('transformer-lens')} and transformers {version('transformers')}:\n"
    return f"{BEGIN}{head}{rows}\n{versions}\n{''.join(why_not(*each) for each in found.items())}{END}"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(f"{' '.join(arguments)!r} is no option: pass --check, or nothing to write {PAGE}", file=sys.stderr)
        return 2
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    content = before + table({name: reasons(name) for name in ARCHITECTURES}) + rest.split(END)[1]
    if not arguments:
        PAGE.write_text(content, encoding="utf-8")
    elif content != PAGE.read_text(encoding="utf-8"):
        print(f"{PAGE} does not say what works: run `python docs/write_families.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
