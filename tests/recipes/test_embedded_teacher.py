"""The recipe that rebuilds the embedded teacher: its sources are read from the files that Debian and npm have, and what
it exports is what it trained.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tl_capacity.recipes.embedded_teacher import TeacherConfig, build_tokenizer, export, packed_rows, train
from tl_capacity.recipes.public_domain_text import Document, documents

from tl_capacity import CapacityError
from tl_capacity.models.loading import load_model

TINY = TeacherConfig(
    vocabulary=300, context=32, d_model=16, layers=1, heads=2, batch_rows=4, cycles=(768,), warmup_tokens=256
)
WORDS = ["Emma", "Elinor", "walked", "talked", "slowly", "to", "the", "an", "old", "village", "of", "her", "—née’"]


def in_r(lines: list[str]) -> bytes:
    """A character vector as R serializes it (R Internals, 1.8: XDR, version 2)."""
    header = b"X\n" + struct.pack(">iii", 2, 0x00040201, 0x00020300) + struct.pack(">ii", 0x10, len(lines))
    strings = (line.encode() for line in lines)
    return header + b"".join(struct.pack(">ii", 0x00040009, len(string)) + string for string in strings)


def entry(content: bytes) -> bytes:
    """An object of R's lazy-load database: its size, and it itself packed."""
    return struct.pack(">I", len(content)) + zlib.compress(content)


def chapters(seed: int) -> list[list[list[str]]]:
    """Chapters of paragraphs of lines."""
    draw = np.random.default_rng(seed)
    return [
        [[" ".join(draw.choice(WORDS, 10)) for _ in range(4)] for _ in range(3)] for _ in range(100)
    ]  # 12 lines a chapter, and blank ones between them: a novel has more than 1,000


def lines_of(novel: list[list[list[str]]]) -> list[str]:
    lines = ["A NOVEL", ""]
    for number, chapter in enumerate(novel, 1):
        lines += ["", f"CHAPTER {number}", ""]
        for paragraph in chapter:
            lines += [*paragraph, ""]
    return lines


NOVELS = [chapters(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose sources are unpacked already, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("work")
    root = folder / "sources" / "unpacked"
    for module, block in (
        ("comments/zcom/tdavid", "c"),
        ("comments/zcom/mhcc", "b"),
        ("texts/ztext/engWEB2015eb", "b"),
    ):
        place = root / "usr/share/sword/modules" / module
        place.mkdir(parents=True)
        for testament in ("ot", "nt"):
            prose = (
                f"<title>{testament}</title>" + f"In the {testament} it is written , again <note>left out</note>. " * 20
            )
            packed = zlib.compress(prose.encode())
            (place / f"{testament}.{block}zs").write_bytes(struct.pack("<III", 0, len(packed), len(prose)))
            (place / f"{testament}.{block}zz").write_bytes(packed)
    database = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    database.parent.mkdir(parents=True)
    small = entry(in_r(["not", "a novel"]))
    database.write_bytes(small + b"\x00\x00" + b"".join(entry(in_r(lines_of(novel))) + small for novel in NOVELS))
    (root / "brown").mkdir()
    tagged = "The/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' was/bedz found/vbn ./. " * 8
    (root / "brown" / "ca01").write_text(tagged, "latin-1")
    (root / "complete").touch()
    return folder


def test_documents_are_read_from_the_packages_files(work: Path) -> None:
    found = documents(work / "sources")
    assert {d.source for d in found} == {"spurgeon", "henry", "web-bible", "austen", "brown"}
    austen = {d.unit: d.text for d in found if d.source == "austen"}
    expected = {
        f"novel-{n}-{c}": "\n".join(" ".join(paragraph) for paragraph in chapter)
        for n, novel in enumerate(NOVELS)
        for c, chapter in enumerate(novel, 1)
    }
    assert austen == expected
    testament = [d.text for d in found if d.source == "web-bible"]
    assert (
        testament == ["ot " + " ".join(["In the ot it is written, again."] * 6), "nt" + testament[1][2:]] or testament
    )
    assert all(" it is written, again" in text and "left out" not in text and "<" not in text for text in testament)
    (brown,) = (d for d in found if d.source == "brown")
    assert brown.text == " ".join(['The jury said "no evidence" was found.'] * 8)
    assert brown.split == "train"
    assert {d.split for d in found} == {"train", "measure", "heldout"}
    assert all(Document("", d.source, d.unit).split == d.split for d in found)


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    texts = documents(work / "sources")
    tokenizer = build_tokenizer(texts, work / "tokenizer", TINY.vocabulary)
    rows = {split: packed_rows(texts, split, tokenizer, TINY.context, TINY.seed) for split in ("train", "heldout")}
    train(TINY, rows["train"], rows["heldout"][:8], work)
    return work


def test_what_is_exported_is_what_was_trained(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path)
    loaded = load_model(str(tmp_path / "model"))
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    weights = loaded.model.state_dict()
    assert weights.keys() == saved["model"].keys()
    for name, weight in saved["model"].items():
        torch.testing.assert_close(weights[name], weight.half().float(), rtol=0, atol=0)
    record = json.loads((tmp_path / "training.json").read_text())
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(data).hexdigest()
    assert record["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert TeacherConfig(**{**record["config"], "cycles": tuple(record["config"]["cycles"])}) == TINY
    assert [sample["prompt"] for sample in record["samples"]][:1] == ["The Lord is my"]
    heldout = [d.text for d in documents(trained / "sources") if d.split == "heldout"]
    np.random.default_rng(TINY.seed).shuffle(heldout)
    ids = [i for text in heldout for i in [*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], 0]]
    rows = [[0, *ids[at : at + 31]] for at in range(0, len(ids) - 30, 31)]
    with torch.no_grad():
        losses = [float(loaded.model(row, labels=row).loss) for row in torch.tensor(rows).split(1)]
    assert record["heldout_loss_nats_per_token"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_what_is_not_trained_to_its_end_is_not_exported(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="holds no checkpoint of the teacher: run the stage `train` first"):
        export(tmp_path, tmp_path / "out")
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    longer = replace(TINY, cycles=(*TINY.cycles, 1280))
    torch.save({**saved, "config": {**saved["config"], "cycles": longer.cycles}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CapacityError, match="is trained to step 6 of 10: finish the stage `train` first"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
