"""Candidates for each embedded concept: texts of its two classes, each with its document."""

from __future__ import annotations

import ast
import base64
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tl_capacity.recipes.concept_sources import (
    SHORTEST,
    Sources,
    field_texts,
    first_lines,
    paragraphs,
    passages,
    profiles,
    sentences,
    wordnet_nouns,
)

ENCODED_BYTES = 150
"""Size of a text in base64, where a token is hardly more than a character."""

UNTRANSLATED_SHARE = 0.4
"""Share of words that a paragraph may have in common with its translation: names and commands."""


@dataclass(frozen=True)
class Candidate:
    """A text that may be chosen for a concept.

    Attributes:
        text: what is probed.
        label: the class.
        document: what it is from: a chapter, a section, a module, a country; no document is in two splits.
        stratum: a pair is made within one stratum, so that what the stratum stands for says nothing about the class.
    """

    text: str
    label: str
    document: str
    stratum: str = ""


def questions(sources: Sources) -> Iterator[Candidate]:
    """Single sentences of commentary, Bible and novels, without their end marks and quotation marks."""
    for document in sources.prose:
        for sentence in re.findall(r"[A-Z][^.?!\n]+[.?]", document.text):
            if not re.search(r"[\d()]|\b(?:Verse|Mr|Mrs|Dr|St)$", sentence[:-1]):
                text = re.sub(r"[\"“”_*]", "", sentence[:-1]).strip(" '’‘-")
                yield Candidate(
                    text,
                    "question" if sentence.endswith("?") else "statement",
                    f"{document.source}/{document.unit}",
                    document.source,
                )


def sermons(sources: Sources) -> Iterator[Candidate]:
    """Commentary and novels."""
    for document in sources.prose:
        label = {"spurgeon": "sermon", "henry": "sermon", "austen": "novel"}.get(document.source)
        if label:  # a verse that is cited by number says by itself that this is a commentary
            without = (text for text in passages(document.text) if not re.search(r"\d", text))
            yield from (Candidate(text, label, f"{document.source}/{document.unit}") for text in without)


def encoded(sources: Sources) -> Iterator[Candidate]:
    """Prose, and other prose of the same documents in base64."""
    for document in sources.prose:
        for number, text in enumerate(passages(document.text)):
            name = f"{document.source}/{document.unit}"
            if number % 2:
                yield Candidate(text, "text", name)
            else:
                yield Candidate(base64.b64encode(text.encode()[:ENCODED_BYTES]).decode(), "base64", name)


def language(code: str, label: str) -> Callable[[Sources], Iterator[Candidate]]:
    """Paragraphs of the Debian handbook at the same place in both languages, if most of them was translated."""

    def candidates(sources: Sources) -> Iterator[Candidate]:
        for page in sorted((sources.handbook / "en-US").glob("*.html")):
            english, other = (paragraphs(sources.handbook / folder / page.name) for folder in ("en-US", code))
            for ours, theirs in zip(english, other, strict=True) if len(english) == len(other) else ():
                words, others = set(ours.lower().split()), set(theirs.lower().split())
                if len(words & others) <= UNTRANSLATED_SHARE * len(others):
                    for text, name in ((ours, "English"), (theirs, label)):
                        yield from (Candidate(part, name, page.stem, page.stem) for part in passages(text))

    return candidates


def code(sources: Sources) -> Iterator[Candidate]:
    """Functions of the standard library without comments and docstrings, and docstring paragraphs of the same
    modules.
    """
    skipped = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "__pycache__",
    }
    for path in sorted(sources.library.rglob("*.py")):
        module = path.relative_to(sources.library)
        if skipped & set(module.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(ast.get_docstring(node) or "")):
                if re.fullmatch(r"[A-Z][^<>=()\[\]{}|\\]*[a-z][.]", paragraph) and len(paragraph.split()) > 6:
                    yield Candidate(paragraph, "prose", str(module))
            if isinstance(node, ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                lines = ast.unparse(node).splitlines(keepends=True)
                yield Candidate(first_lines(lines), "code", str(module))


def geography(sources: Sources) -> Iterator[Candidate]:
    """Texts of the World Factbook on land and climate, and prose."""
    for country, profile in profiles(sources.factbook):
        for field in (
            "Location",
            "Climate",
            "Terrain",
            "Natural resources",
            "Natural hazards",
            "Environment - current issues",
            "Geography - note",
        ):
            for text in field_texts(profile.get("Geography", {}).get(field, {})):
                yield from (Candidate(part, "geography", country) for part in passages(text, shortest=SHORTEST))
    for document in sources.prose:
        yield from (
            Candidate(text, "prose", f"{document.source}/{document.unit}")
            for text in passages(document.text, shortest=SHORTEST)
        )


def economy(sources: Sources) -> Iterator[Candidate]:
    """Two overviews of the same countries."""
    for country, profile in profiles(sources.factbook):
        for section, field, label in (
            ("Economy", "Economy - overview", "economy"),
            ("Introduction", "Background", "history"),
        ):
            for text in field_texts(profile.get(section, {}).get(field, {})):
                yield from (Candidate(part, label, country) for part in passages(text))


def numbers(sources: Sources) -> Iterator[Candidate]:
    """Sentences of the same overviews: some with a number in digits other than a year, some without a digit."""
    for country, profile in profiles(sources.factbook):
        for section, field in (
            ("Economy", "Economy - overview"),
            ("Introduction", "Background"),
            ("Communications", "Telephone system"),
        ):
            for text in field_texts(profile.get(section, {}).get(field, {})):
                for sentence in sentences(text):
                    numeral = re.search(r"(?<![\d-])(?!(?:1[5-9]|20)\d\d\b)\d", sentence) is not None
                    if numeral or not re.search(r"\d", sentence):
                        yield Candidate(sentence, "number" if numeral else "no number", country, section)


def glosses(labels: dict[str, str]) -> Callable[[Sources], Iterator[Candidate]]:
    """WordNet nouns with their definitions, labelled by lexicographer file.

    Siblings under one hypernym count as one document.
    """

    def candidates(sources: Sources) -> Iterator[Candidate]:
        for synset in wordnet_nouns(sources.wordnet):
            if synset.file in labels:
                yield Candidate(synset.text, labels[synset.file], synset.parent)

    return candidates


def domain(label: str) -> Callable[[Sources], Iterator[Candidate]]:
    """WordNet nouns of a domain, and others of the same lexicographer files."""

    def candidates(sources: Sources) -> Iterator[Candidate]:
        synsets = list(wordnet_nouns(sources.wordnet))
        children: dict[str, list[str]] = defaultdict(list)
        for synset in synsets:
            children[synset.parent].append(synset.offset)
        inside: set[str] = {s.offset for s in synsets if label in s.domains}
        open_ = [s.offset for s in synsets if (s.word, s.file) in DOMAIN_ROOTS[label]]
        while open_:
            inside.add(offset := open_.pop())
            open_ += children[offset]
        files = {s.file for s in synsets if s.offset in inside}
        for synset in synsets:
            if synset.file in files:
                yield Candidate(synset.text, label if synset.offset in inside else "other", synset.parent, synset.file)

    return candidates


DOMAIN_ROOTS = {
    "medicine": (
        ("illness", "26"),
        ("medical_procedure", "04"),
        ("medicine", "06"),
        ("medicine", "09"),
        ("medical_practitioner", "18"),
    ),
    "law": (("crime", "04"), ("proceeding", "04"), ("lawyer", "18")),
}
"""Words that also belong to a domain: everything under these roots, each given with its lexicographer file."""
CONCEPTS: dict[str, tuple[str, str, Callable[[Sources], Iterator[Candidate]]]] = {
    "question": ("question", "statement", questions),
    "sermon": ("sermon", "novel", sermons),
    "french": ("French", "English", language("fr-FR", "French")),
    "german": ("German", "English", language("de-DE", "German")),
    "code": ("code", "prose", code),
    "base64": ("base64", "text", encoded),
    "geography": ("geography", "prose", geography),
    "economy": ("economy", "history", economy),
    "number": ("number", "no number", numbers),
    "medicine": ("medicine", "other", domain("medicine")),
    "law": ("law", "other", domain("law")),
    "animal": ("animal", "plant", glosses({"05": "animal", "20": "plant"})),
    "food": ("food", "place", glosses({"13": "food", "15": "place"})),
}
"""Name → (the class that the concept is named after, the other class, candidates)."""
