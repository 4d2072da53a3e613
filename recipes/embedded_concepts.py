"""Rebuilds the embedded concepts: labelled texts for probes, from Debian and npm packages and this Python's standard
library.

For each concept: candidates with the document that each is from, duplicates dropped, documents split, and in each split
pairs of one text of either class whose lengths differ by at most a tenth. The same packages give the same files, to the
byte.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tl_capacity.recipes.concept_candidates import CONCEPTS, Candidate
from tl_capacity.recipes.concept_sources import (
    LONGEST,
    SHORTEST,
    fetch,
)

from tl_capacity.errors import CapacityError
from tl_capacity.recipe import option, run_file
from tl_capacity.storage.digests import digest, place_of
from tl_capacity.storage.files import make_folder, write_bytes

PYTHON = (3, 11)
SHARES = {"train": 0.5, "validation": 0.15, "test": 0.35}
TEXTS_PER_CLASS = 400
TEXTS_PER_DOCUMENT = 20
"""Most texts of either class from one document, so that no document outweighs the others."""
LENGTH_RATIO = 1.1
REPEATED_SHARE = 0.5
"""A text is a near duplicate if more than this share of its word triples occurs in texts already chosen."""


@dataclass(frozen=True)
class EmbeddedConceptsConfig:
    """The options of `tl-capacity run embedded-concepts`."""

    work: Path = option(
        Path("runs/embedded-concepts"),
        "Folder for downloads.",
    )
    prose: Path = option(
        Path("runs/embedded-teacher/sources"),
        "Folder of the public-domain prose, as `embedded-teacher` fetches it. It is fetched if it is missing.",
    )
    out: Path = option(Path("hooks/concepts/texts"), "Package folder to write the texts to.")


def main(config: EmbeddedConceptsConfig) -> None:
    """Rebuild the embedded concepts from their sources.

    Raises:
        CapacityError: where a source cannot be fetched, or this Python is another one than the texts were taken from.
    """
    version = sys.version.split()[0]
    if sys.version_info[:2] != PYTHON:
        raise CapacityError(
            f"the code is taken from the standard library of Python {'.'.join(map(str, PYTHON))}, but this is"
            f" {version}: use that one"
        )
    sources = fetch(config.work, config.prose)
    make_folder(config.out)
    for name, (positive, negative, candidates) in CONCEPTS.items():
        chosen = choose(candidates(sources), positive, negative)
        lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in chosen).encode()
        write_bytes(config.out / f"{name}.jsonl.xz", lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME))
        counted = Counter(text["split"] for text in chosen)
        print(
            f"{name}: {', '.join(f'{counted[split]} {split}' for split in SHARES)};"
            f" {len({t['document'] for t in chosen})} documents"
        )


def choose(candidates: Iterable[Candidate], positive: str, negative: str) -> list[dict[str, str]]:
    """Balanced, deduplicated, length-matched texts of each split. A hash of the text decides their order.

    Raises:
        CapacityError: where a class runs short.
    """
    pools: dict[tuple[str, str, str], list[Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda c: _hash(c.text)):
        if SHORTEST <= len(candidate.text) <= LONGEST:
            pools[split_of(candidate.document), candidate.stratum, candidate.label].append(candidate)
    seen: set[str] = set()
    texts: list[dict[str, str]] = []
    for split, share in SHARES.items():
        wanted, taken = round(share * TEXTS_PER_CLASS), 0
        uses: Counter[tuple[str, str]] = Counter()
        strata = sorted({stratum for at, stratum, _ in pools if at == split}, key=_hash)
        pairs = [
            _pairs(pools[split, stratum, positive], pools[split, stratum, negative], seen, uses) for stratum in strata
        ]
        while pairs and taken < wanted:  # a pair from each stratum in turn
            for stratum_pairs in list(pairs):
                pair = next(stratum_pairs, None)
                if pair is None:
                    pairs.remove(stratum_pairs)
                elif taken < wanted:
                    taken += 1
                    texts += [{"text": c.text, "label": c.label, "document": c.document, "split": split} for c in pair]
        if taken < 25:
            raise CapacityError(f"{positive}/{negative} has {taken} pairs in the {split} split: its source has changed")
    return texts


def _pairs(
    positives: list[Candidate], negatives: list[Candidate], seen: set[str], uses: Counter[tuple[str, str]]
) -> Iterator[tuple[Candidate, Candidate]]:
    """Pairs of texts of both classes with similar lengths. What is chosen is added to `seen` and `uses`."""
    left = list(negatives)
    for candidate in positives:
        if not _fresh(candidate, seen, uses):
            continue
        near = (
            c
            for c in left
            if max(len(c.text), len(candidate.text)) <= LENGTH_RATIO * min(len(c.text), len(candidate.text))
        )
        other = next((c for c in near if _fresh(c, seen, uses)), None)
        if other is None:
            continue
        left.remove(other)
        for chosen in (candidate, other):
            uses[chosen.document, chosen.label] += 1
            seen |= _triples(chosen.text)
        yield candidate, other


def _fresh(candidate: Candidate, seen: set[str], uses: Counter[tuple[str, str]]) -> bool:
    triples = _triples(candidate.text)
    repeated = sum(triple in seen for triple in triples)
    return uses[candidate.document, candidate.label] < TEXTS_PER_DOCUMENT and repeated <= REPEATED_SHARE * len(triples)


def _triples(text: str) -> set[str]:
    """Neighbouring triples of words, without numbers and signs; the whole text if it is shorter."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def split_of(document: str) -> str:
    """The split of a document. It depends only on the document's name, so it never moves when a source is added."""
    # The prose was split by a hash of these names already, so another is needed.
    position, reached = place_of(f"concepts/{document}"), 0.0
    for split, share in SHARES.items():
        reached += share
        if position < reached:
            return split
    return split


def _hash(text: str) -> str:
    return digest(text.encode())


if __name__ == "__main__":
    run_file(main)
