"""Token streams: rows from one document each, shards that share nothing and leave nothing out, and sources that say
what is wrong with them.
"""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import BOS
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_capacity as tlc
from tl_capacity.errors import TokenSourceError
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream, as_batches, documents

HOOK = "blocks.1.hook_resid_post"


def rows_of(stream: TokenStream) -> list[tuple[int, list[int]]]:
    """`(document, ids without padding)` of every row."""
    found = []
    for batch in stream:
        assert batch.tokens.dtype == batch.documents.dtype == np.int64
        assert batch.tokens.shape[0] == len(batch.documents) <= stream.batch_rows
        assert batch.tokens.shape[1] <= stream.context
        for document, row in zip(batch.documents.tolist(), batch.tokens.tolist(), strict=True):
            ids = [token for token in row if token != PADDING]
            assert row == ids + [PADDING] * (len(row) - len(ids)), "padding stands at the end"
            found.append((document, ids))
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    return [int(word.removeprefix("w")) for word in text.split()]


class TestTokenStream:
    @pytest.mark.parametrize("context", [2, 7, 16, 100])
    @pytest.mark.parametrize("batch_rows", [1, 5, 1000])
    def test_rows(self, tokenizer: Any, texts: list[str], context: int, batch_rows: int) -> None:
        rows = rows_of(TokenStream(texts, tokenizer, context=context, batch_rows=batch_rows))
        assert all(ids[0] == BOS and 2 <= len(ids) <= context for _, ids in rows)
        assert [document for document, _ in rows] == sorted(document for document, _ in rows)
        for number, text in enumerate(texts):
            own = [ids[1:] for document, ids in rows if document == number]
            assert [token for ids in own for token in ids] == encode(tokenizer, text)
            assert all(len(ids) == context - 1 for ids in own[:-1]), "only a document's last row may be short"

    def test_without_bos(self, tokenizer: Any, texts: list[str]) -> None:
        stream = TokenStream(texts, tokenizer, context=10, prepend_bos=False)
        assert stream.bos is None
        rows = rows_of(stream)
        assert [token for _, ids in rows for token in ids] == [
            token for text in texts for token in encode(tokenizer, text)
        ]
        assert max(len(ids) for _, ids in rows) == 10

    def test_bos_zero_is_a_bos(self, tokenizer: Any, texts: list[str]) -> None:
        assert tokenizer.bos_token_id == 0
        assert TokenStream(texts, tokenizer).bos == 0

    def test_twice_the_same(self, tokenizer: Any, texts: list[str]) -> None:
        stream = TokenStream(texts, tokenizer, context=9)
        assert rows_of(stream) == rows_of(stream)

    @settings(max_examples=30, deadline=None)
    @given(of=st.integers(1, 9), context=st.integers(2, 40), batch_rows=st.integers(1, 9))
    def test_shards_are_disjoint_and_complete(
        self, tokenizer: Any, texts: list[str], of: int, context: int, batch_rows: int
    ) -> None:
        whole = rows_of(TokenStream(texts, tokenizer, context, batch_rows))
        parts = [rows_of(TokenStream(texts, tokenizer, context, batch_rows, shard=(index, of))) for index in range(of)]
        for index, part in enumerate(parts):
            assert {document % of for document, _ in part} == {index}
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert [row for row in whole if row[0] % of == 0] == parts[0], "in the order of the whole"

    def test_rows_of_ids(self) -> None:
        ids = np.arange(1, 25, dtype=np.int64).reshape(6, 4)
        stream = TokenStream(ids, context=3, batch_rows=4)
        assert rows_of(stream) == [(i, part) for i, row in enumerate(ids.tolist()) for part in (row[:3], row[3:])]
        assert rows_of(TokenStream(ids, context=8, shard=(1, 3))) == [(1, ids[1].tolist()), (4, ids[4].tolist())]
        for wrong in (ids[0], ids[None]):
            with pytest.raises(TokenSourceError, match=r"rows of token ids are whole numbers \[row, position\], not"):
                TokenStream(wrong)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"context": 1}, "context = 1"),
            ({"batch_rows": 0}, "batch_rows = 0"),
            ({"shard": (3, 3)}, "shard 3 of 3 does not exist"),
            ({"shard": (-1, 3)}, "shard -1 of 3 does not exist"),
            ({"shard": (0, 0)}, "shard 0 of 0 does not exist"),
            ({"tokenizer": None}, "needs a tokenizer"),
        ],
    )
    def test_bad_settings(self, tokenizer: Any, texts: list[str], options: dict[str, Any], says: str) -> None:
        with pytest.raises(TokenSourceError, match=says):
            TokenStream(texts, **{"tokenizer": tokenizer, **options})

    @pytest.mark.parametrize("nothing", [[], [""], ["", "  \n "]])
    def test_nothing(self, tokenizer: Any, nothing: list[str]) -> None:
        with pytest.raises(TokenSourceError, match="yields no tokens"):
            list(TokenStream(nothing, tokenizer))

    def test_a_shard_without_documents(self, tokenizer: Any) -> None:
        with pytest.raises(TokenSourceError, match="this shard has no document"):
            list(TokenStream(["w1 w2"], tokenizer, shard=(1, 2)))

    def test_names(self, tokenizer: Any, texts: list[str]) -> None:
        assert TokenStream("some/file.txt", tokenizer).name() == "some/file.txt"
        assert TokenStream(texts, tokenizer).name() == "40 texts given in a session"
        assert TokenStream(np.ones((3, 4), dtype=np.int64)).name() == "3 rows of token ids given in a session"


def all_rows(stream: Any) -> tuple[list[list[int]], list[int]]:
    batches = list(as_batches(stream))
    assert all(isinstance(batch, TokenBatch) and batch.tokens.dtype == np.int64 for batch in batches)
    return [row for batch in batches for row in batch.tokens.tolist()], [
        document for batch in batches for document in batch.documents.tolist()
    ]


class TestAsBatches:
    IDS = torch.arange(24).reshape(6, 4)

    @pytest.mark.parametrize(
        "form",
        [
            lambda ids: ids,
            lambda ids: ids.numpy(force=True),
            lambda ids: ids.int(),
            lambda ids: ids.numpy(force=True).astype(np.uint16),
            lambda ids: ids.split(4),
            lambda ids: [ids[:2], ids[2:].numpy(force=True)],
            lambda ids: (ids[i : i + 1] for i in range(6)),
            lambda ids: list(ids),
            lambda ids: ids.tolist(),
            lambda ids: {"input_ids": ids},
            lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            lambda ids: [{"input_ids": part} for part in ids.split(3)],
            lambda ids: [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids],
            lambda ids: [{"input_ids": row.tolist(), "attention_mask": [1] * 4, "text": "ignored"} for row in ids],
            lambda ids: Dataset.from_dict({"input_ids": ids.tolist()}),
            lambda ids: Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
            lambda ids: Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"),
            lambda ids: Dataset.from_dict({"input_ids": ids.tolist()}).to_iterable_dataset(),
            lambda ids: Dataset.from_dict({"input_ids": ids.tolist()}).iter(batch_size=4),
            lambda ids: torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=4),
        ],
    )
    def test_whatever_a_notebook_has(self, form: Callable[[torch.Tensor], Any]) -> None:
        rows, numbers = all_rows(form(self.IDS))
        assert rows == self.IDS.tolist()
        assert numbers == list(range(6))

    def test_token_streams(self, tokenizer: Any, texts: list[str]) -> None:
        stream = TokenStream(texts, tokenizer, context=8)
        for mine, theirs in zip(as_batches(stream), stream, strict=True):
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)
            np.testing.assert_array_equal(mine.documents, theirs.documents)

    def test_padding(self) -> None:
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
        rows, _ = all_rows([{"input_ids": self.IDS[:3], "attention_mask": mask}])
        assert rows == [[0, 1, 2, PADDING], [4, 5, 6, 7], [8, PADDING, PADDING, PADDING]]
        assert self.IDS[0, 3] == 3, "the caller's tensor stays as it was"
        assert all_rows([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]}])[0] == [[5, 6, PADDING]]

    def test_rows_of_unequal_length(self) -> None:
        """As tokenisers and data sets give them."""
        ragged = [[1, 2, 3], [4], [5, 6]]
        wanted = [[1, 2, 3], [4, PADDING, PADDING], [5, 6, PADDING]]
        mask = [[1] * len(row) for row in ragged]
        for stream in (
            [ragged],
            {"input_ids": ragged},
            {"input_ids": ragged, "attention_mask": mask},
            Dataset.from_dict({"input_ids": ragged}),
        ):
            assert all_rows(stream) == (wanted, [0, 1, 2])

    @pytest.mark.parametrize(
        "stream", [[], iter(()), [np.zeros((0, 4), dtype=np.int64)], Dataset.from_dict({"input_ids": []})]
    )
    def test_nothing(self, stream: Any) -> None:
        with pytest.raises(TokenSourceError, match="yields no batch"):
            list(as_batches(stream))

    @pytest.mark.parametrize(
        "stream",
        [
            torch.zeros(2, 3, 4, dtype=torch.long),
            torch.tensor(3),
            [5, 6, 7],
            torch.full((2, 3), 0.5),
            [torch.full((2, 3), 0.5)],
            [{"text": "w1 w2"}],
            Dataset.from_dict({"text": ["w1 w2"]}),
            ["w1 w2"],
            "w1 w2",
            [[1, 2], [3, "x"]],
            [None],
            [[[1, 2], [[3], 4]]],
            [[[[1, 2]], [[3, 4]]]],
            3,
            None,
            {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1]]},
        ],
        ids=str,
    )
    def test_no_tokens(self, stream: Any) -> None:
        with pytest.raises(TokenSourceError):
            list(as_batches(stream))

    def test_a_dataset_is_counted_like_its_rows(
        self, make_model: Callable[..., Any], make_sae: Callable[..., Any], tokens: torch.Tensor
    ) -> None:
        model, sae = make_model("gpt_neox"), make_sae("topk", HOOK)
        found = []
        for stream in (tokens.split(8), Dataset.from_dict({"input_ids": tokens.tolist()}), tokens):
            with tlc.add_capacity_hooks(model, sae) as capacity:
                found.append(capacity.run(stream).measurement()[HOOK].summary)
        for other in found[1:]:
            np.testing.assert_array_equal(found[0].arrays["counts"], other.arrays["counts"])
            np.testing.assert_array_equal(found[0].arrays["documents"], other.arrays["documents"])


PARAGRAPHS = [f"Passage {i} ü€😀. " + "word " * 400 for i in range(5)]


def write(folder: Path, name: str, texts: list[str]) -> Path:
    path, name = folder / name, name.lower()
    opened = gzip.open if name.endswith(".gz") else lzma.open if name.endswith(".xz") else open
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
        return path
    with opened(path, "wt", encoding="utf-8") as file:
        if ".jsonl" in name or ".ndjson" in name:
            file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
        else:
            file.write("\n\n".join(texts) + "\n")
    return path


class TestSources:
    @pytest.mark.parametrize(
        "name",
        [
            "a.txt",
            "a.md",
            "a.txt.gz",
            "a.txt.xz",
            "a.jsonl",
            "a.ndjson",
            "a.jsonl.gz",
            "a.jsonl.xz",
            "a.parquet",
            "A.TXT",
            "with space.JSONL",
        ],
    )
    def test_the_same_texts_from_any_file(self, tmp_path: Path, name: str) -> None:
        path = write(tmp_path, name, PARAGRAPHS)
        for _ in range(2):
            assert [text.strip() for text in documents(str(path))] == [text.strip() for text in PARAGRAPHS]

    def test_short_paragraphs_are_joined(self, tmp_path: Path) -> None:
        """A line break is no reason to cut; a passage ends with a paragraph once it is long enough."""
        path = write(tmp_path, "a.txt", [f"paragraph {i} " + "x" * 300 for i in range(40)])
        passages = list(documents(str(path)))
        assert 4 <= len(passages) <= 8
        assert "".join(passages).count("paragraph") == 40
        assert all(len(passage) >= 2000 for passage in passages[:-1])

    def test_one_endless_paragraph(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a line without end\n" * 5000)
        passages = list(documents(str(tmp_path / "a.txt")))
        assert len(passages) > 1
        assert "".join(passages) == "a line without end\n" * 5000

    def test_other_names_of_the_text_field(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"content": "one"}\n\n{"document": "two"}\n')
        assert list(documents(str(tmp_path / "a.jsonl"))) == ["one", "two"]

    def test_a_folder_of_data_files(self, tmp_path: Path) -> None:
        for number, name in enumerate(("a.parquet", "b.parquet")):
            write(tmp_path, name, PARAGRAPHS[number::2])
        assert sorted(documents(str(tmp_path))) == sorted(PARAGRAPHS)

    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "notes.pdf").write_bytes(b"%PDF")
        with pytest.raises(TokenSourceError, match=str(tmp_path)):
            list(documents(str(tmp_path)))

    def test_streams_read_them(self, tmp_path: Path, tokenizer: Any, texts: list[str]) -> None:
        path = write(tmp_path, "a.jsonl.xz", texts)
        assert rows_of(TokenStream(str(path), tokenizer, context=16)) == rows_of(
            TokenStream(texts, tokenizer, context=16)
        )

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.xz"])
    @pytest.mark.parametrize("fault", ["missing", "empty", "binary", "random bytes", "a folder"])
    def test_faulty_files(self, tmp_path: Path, tokenizer: Any, name: str, fault: str) -> None:
        path = tmp_path / name
        if fault == "a folder":
            path.mkdir()
        elif fault != "missing":
            path.write_bytes(
                {"empty": b"", "binary": b"\0\1\2\3" * 500, "random bytes": np.random.default_rng(0).bytes(5000)}[fault]
            )
        with pytest.raises(TokenSourceError, match=str(path)):
            list(TokenStream(str(path), tokenizer))

    @pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.jsonl.gz", "a.parquet"])
    def test_truncated_files(self, tmp_path: Path, tokenizer: Any, name: str) -> None:
        path = write(tmp_path, name, PARAGRAPHS)
        data = path.read_bytes()
        for length in (1, 5, len(data) // 2, len(data) - 5):
            path.write_bytes(data[:length])
            with pytest.raises(TokenSourceError):
                list(TokenStream(str(path), tokenizer))

    def test_damaged_files(self, tmp_path: Path, tokenizer: Any) -> None:
        """Flipped bytes: read, or refused in one sentence, and never anything else."""
        random = np.random.default_rng(0)
        for name in ("a.txt.gz", "a.txt.xz", "a.parquet", "a.jsonl"):
            path = write(tmp_path, name, PARAGRAPHS)
            data = bytearray(path.read_bytes())
            for place in random.integers(0, len(data), size=60):
                damaged = data.copy()
                damaged[place] ^= 0x55
                path.write_bytes(damaged)
                try:
                    list(documents(str(path)))
                except TokenSourceError:
                    continue

    @pytest.mark.parametrize(
        "line", ["not json", "[1, 2]", "3", '{"text": 3}', '{"title": "x"}', '{"title": null}', "[" * 100_000]
    )
    def test_odd_lines(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(TokenSourceError, match=r"line 2 of .*a\.jsonl"):
            list(documents(str(tmp_path / "a.jsonl")))

    @pytest.mark.parametrize("columns", [{"title": ["a", "b"]}, {"text": [1, 2]}])
    def test_a_table_without_text(self, tmp_path: Path, columns: dict[str, Any]) -> None:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(TokenSourceError, match=r"a\.parquet"):
            list(documents(str(tmp_path / "a.parquet")))

    @pytest.mark.parametrize("kind", ["a.parquet", "a.jsonl", "a folder", "a session"])
    def test_empty_texts_and_nulls_are_no_documents(
        self, tmp_path: Path, tokenizer: Any, unchecked: None, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        """They are left out of every kind of source alike, have no number, and are counted."""
        rows, path = ["w1", "", None, "w2 w3"], tmp_path / kind
        if kind == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
        elif kind == "a.jsonl":
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        elif kind == "a folder":
            path.mkdir()
            Dataset.from_dict({"text": rows}).to_json(path / "a.jsonl")
        source = [*rows, float("nan")] if kind == "a session" else str(path)
        assert rows_of(TokenStream(source, tokenizer)) == [(0, [BOS, 1]), (1, [BOS, 2, 3])]
        name = f"{len(source)} texts given in a session" if kind == "a session" else source
        assert caplog.messages == [
            f"{len(source) - 2 if kind == 'a session' else 2} of {len(source) if kind == 'a session' else 4} documents"
            f" of {name} have no text and were left out"
        ]

    @pytest.mark.parametrize("source", [["w1", 3], ["w1", b"w2"], [["w1"]]], ids=str)
    def test_what_is_no_text(self, tokenizer: Any, unchecked: None, source: Any) -> None:
        with pytest.raises(TokenSourceError, match=r"gave a (int|bytes|list) of \d texts given in a session, not"):
            list(TokenStream(source, tokenizer))

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.xz", "a.jsonl", "a.jsonl.gz"])
    def test_files_as_windows_writes_them(self, tmp_path: Path, tokenizer: Any, name: str) -> None:
        """A byte order mark and CRLF are no part of a text."""
        path = write(tmp_path, name, PARAGRAPHS)
        wanted, opened = list(documents(str(path))), {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opened(path, "rb") as file:
            content = file.read()
        with opened(path, "wb") as file:
            file.write(codecs.BOM_UTF8 + content.replace(b"\n", b"\r\n"))
        assert list(documents(str(path))) == wanted

    @pytest.mark.parametrize("spec", ["", "   ", "a.csv", "notes.pdf", "two words", "a/b/c/d/e"])
    def test_nobody_knows_it(self, spec: str) -> None:
        with pytest.raises(TokenSourceError, match="no token source knows"):
            list(documents(spec))
