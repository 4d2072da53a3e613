"""Token ids of texts, compared with what the tokenizer itself gives for the whole: long documents in pieces, special
tokens that are spelled in a text, and the BOS of tokenizers that have none.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from tl_capacity import Measurement
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.loading import LoadedModel
from tl_capacity.text.streams import TokenStream
from tl_capacity.text.tokenizing import bos_of, token_ids, tokens_in_pieces

END = "<|endoftext|>"
SENTENCES = [
    "The cat sat on the mat, and the dog didn't.",
    "In 1969 they'd counted 12,345 stars;   none answered!",
    "Ça va? Où est l'été… naïve façade — “déjà vu”.",
    "敏捷的棕色狐狸跳过懒狗。他说：你好，世界！",
    "def f(x):\n    return x ** 2  # 😀🚀\n\n\n",
    "\ttabs\tand      spaces \r\n and\u00a0others\u2003here",
]


def prose(sentences: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(SENTENCES, size=sentences))


def byte_level() -> Tokenizer:
    """As GPT-2, GPT-NeoX and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=500, special_tokens=[END], initial_alphabet=alphabet)
    )
    return tokenizer


def whole_text() -> Tokenizer:
    """As Llama 2 and Gemma have it: no cut before BPE, so that a merge may cross words, and a space put in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=[END, "<unk>"]))
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=300, special_tokens=[END, "<unk>"], unk_token="<unk>")
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=[END, "<unk>"]))
    return tokenizer


KINDS = (byte_level, whole_text, unigram, word_piece)


def joined(pieces: Iterable[list[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]


def wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="local", **special)


def tiny_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return GPTNeoXForCausalLM(config)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return wrapped(request.param(), eos_token=END, bos_token=END)


@pytest.fixture(scope="module")
def bpe() -> Any:
    return wrapped(byte_level(), eos_token=END, bos_token=END)


class TestPieces:
    @pytest.mark.parametrize("sizes", [(3000, 1500), (8000, 1000), (1 << 16, 1 << 11)])
    def test_the_tokens_of_the_whole(self, any_tokenizer: Any, sizes: tuple[int, int]) -> None:
        text = prose(2500)
        whole = any_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = list(tokens_in_pieces(any_tokenizer, text, size=sizes[0], overlap=sizes[1]))
        assert joined(pieces) == whole
        assert len(pieces) > 1

    @settings(max_examples=25, deadline=None)
    @given(
        parts=st.lists(st.sampled_from([*SENTENCES, "a", " ", "\n", "aaaa", "  ", END, "é", "敏"]), max_size=300),
        times=st.integers(1, 6),
        special=st.booleans(),
    )
    def test_whatever_the_text(self, any_tokenizer: Any, parts: list[str], times: int, special: bool) -> None:
        text = "".join(parts) * times
        [whole] = token_ids(any_tokenizer, [text], special)
        assert joined(tokens_in_pieces(any_tokenizer, text, special, size=900, overlap=400)) == whole

    @pytest.mark.parametrize("text", ["a" * 40_000, "ab" * 20_000, " " * 40_000, "x y" * 15_000, "敏捷" * 10_000])
    def test_a_text_without_a_seam(self, any_tokenizer: Any, text: str) -> None:
        whole = any_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert joined(tokens_in_pieces(any_tokenizer, text, size=3000, overlap=500)) == whole

    def test_rows_of_a_stream(self, bpe: Any) -> None:
        texts = ["short", prose(4000), "another", prose(3000, seed=1), ""]
        rows: dict[int, list[int]] = {}
        for batch in TokenStream(texts, bpe, context=64):
            for document, row in zip(batch.documents.tolist(), batch.tokens.tolist(), strict=True):
                rows[document] = rows.get(document, []) + [token for token in row[1:] if token >= 0]
        assert list(rows.values()) == bpe(texts[:4], add_special_tokens=False, verbose=False)["input_ids"]

    def test_no_more_is_tokenized_than_is_read(self, bpe: Any) -> None:
        """The first rows of a long document come from its first pieces."""
        text = prose(10_000)
        started = time.process_time()
        next(iter(TokenStream([text] * 4, bpe, context=64)))
        first = time.process_time() - started
        started = time.process_time()
        bpe(text, add_special_tokens=False, verbose=False)
        assert first < time.process_time() - started

    @pytest.mark.slow
    def test_documents_of_5_mb(self, bpe: Any, tmp_path: Path) -> None:
        """Four of them, read whole, take little more memory than their text."""
        bpe.save_pretrained(tmp_path)
        code = f"""
import resource
from transformers import AutoTokenizer
from tl_capacity.text.streams import TokenStream
tokenizer, texts = AutoTokenizer.from_pretrained({str(tmp_path)!r}), [{prose(1000)!r} * 130] * 4
assert len(texts[0]) > 5_000_000
next(iter(TokenStream(["some words"], tokenizer)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = sum(batch.present.sum() for batch in TokenStream(texts, tokenizer))
print(tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        tokens, kilobytes = map(int, done.stdout.split())
        assert tokens > 5_000_000
        assert kilobytes < 150_000, "2.5 GB where the documents are tokenized whole"


class TestSpecialTokens:
    @pytest.mark.parametrize("kind", [byte_level, whole_text])
    def test_text_is_text(self, kind: Callable[[], Tokenizer]) -> None:
        tokenizer, text = wrapped(kind(), eos_token=END, bos_token=END), f"a {END} b"
        control = tokenizer.eos_token_id
        [row] = [row for batch in TokenStream([text], tokenizer, context=64) for row in batch.tokens.tolist()]
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert row == [control, *plain]
        assert control not in plain
        assert control in tokenizer(text, add_special_tokens=False)["input_ids"], "later calls are as before"

    def test_an_option_for_corpora_that_mean_it(self, bpe: Any) -> None:
        text = f"a {END} b"
        [batch] = TokenStream([text], bpe, context=64, special_tokens=True)
        assert batch.tokens[0].tolist() == [bpe.eos_token_id, *bpe(text, add_special_tokens=False)["input_ids"]]

    def test_never_two_bos(self, bpe: Any) -> None:
        """A text that begins with BOS gets none, and neither does a row that begins where one stands in the text."""
        text = f"{END}The cat sat{END}on the mat{END}"
        ids, bos = bpe(text, add_special_tokens=False)["input_ids"], bpe.bos_token_id
        assert ids[0] == ids[-1] == bos
        [batch] = TokenStream([text], bpe, context=64, special_tokens=True)
        assert batch.tokens[0].tolist() == ids
        for context in range(2, 9):
            batches = list(TokenStream([text], bpe, context, special_tokens=True))
            rows = [[token for token in row if token >= 0] for batch in batches for row in batch.tokens.tolist()]
            assert all(row[0] == bos and row[1:2] != [bos] for row in rows)
            words = [token for row in rows for token in row if token != bos]
            assert words == [token for token in ids if token != bos]


class TestBosOfTokenizersWithoutOne:
    """TransformerLens gives them their EOS; what is measured without it sees the same rows."""

    def test_as_transformer_lens_has_it(self) -> None:
        tokenizer = wrapped(byte_level(), eos_token=END)
        hf = tiny_model(tokenizer)
        loaded = LoadedModel(hf, tokenizer, "local/x", None)
        stream = TokenStream([SENTENCES[0]], tokenizer)
        before = next(iter(stream)).tokens.tolist()
        bridge = loaded.bridge
        assert isinstance(bridge, TransformerBridge)
        assert (tokenizer.bos_token, bridge.tokenizer.bos_token) == (None, END), "the bridge has a copy"
        assert before == next(iter(stream)).tokens.tolist() == bridge.to_tokens(SENTENCES[0], prepend_bos=True).tolist()
        assert bos_of(tokenizer) == bos_of(bridge.tokenizer) == tokenizer.eos_token_id

    @pytest.mark.fidelity(
        source="SAELens",
        says="prepend_bos: true",
        obeyed="a tokenizer without BOS puts its EOS before each row, as TransformerLens does",
    )
    def test_the_fast_and_the_bridged_path(self, tmp_path: Path) -> None:
        tokenizer = wrapped(byte_level(), eos_token=END)
        tiny_model(tokenizer).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text("\n\n".join(SENTENCES), encoding="utf-8")
        found = {}
        for hook in ("blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"):
            sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, metadata=SAEMetadata(hook_name=hook)))
            sae.save_model(tmp_path / hook)
            found[hook] = measure(
                MeasureSettings(
                    str(tmp_path / "model"),
                    tmp_path / f"m-{hook}",
                    (str(tmp_path / hook),),
                    10_000,
                    str(tmp_path / "text.txt"),
                    context=64,
                    max_fvu=float("inf"),
                    progress=False,
                )
            )
        fast, bridged = found.values()
        assert fast.provenance.tokens_digest == bridged.provenance.tokens_digest != ""
        assert fast.provenance.settings["bos"] == bridged.provenance.settings["bos"] == tokenizer.eos_token_id
        assert fast.hooks[0].summary.n_tokens == bridged.hooks[0].summary.n_tokens
        assert fast.hooks[0].summary.masked == bridged.hooks[0].summary.masked

    def test_what_is_measured_with_control_tokens_says_so(self, tmp_path: Path, cli: Cli) -> None:
        """On the command line; going on without the option is refused."""
        tokenizer, hook = wrapped(byte_level(), eos_token=END), "blocks.0.hook_resid_post"
        tiny_model(tokenizer).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, metadata=SAEMetadata(hook_name=hook)))
        sae.save_model(tmp_path / "sae")
        (tmp_path / "text.txt").write_text(f"The cat {END} sat {END} on the mat.")
        measured = {}
        for out, options in (("text", []), ("control", ["--special-tokens"])):
            command = ["measure", "--model", tmp_path / "model", "--sae", tmp_path / "sae", "--tokens", 1000]
            command += ["--source", tmp_path / "text.txt", "--max-fvu", "inf", "--out", tmp_path / out, *options]
            assert cli(*command)[0] == 0
            measured[out] = Measurement.load(tmp_path / out)
        assert {out: m.hooks[0].summary.masked["special"] for out, m in measured.items()} == {"text": 1, "control": 3}
        assert "special_tokens" not in measured["text"].provenance.settings
        assert measured["control"].provenance.settings["special_tokens"] is True
        command[command.index(tmp_path / "control")] = tmp_path / "text"
        code, _, err = cli(*command, "--resume")
        assert code == 2
        assert "settings" in err
