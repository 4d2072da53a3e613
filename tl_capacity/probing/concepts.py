"""Concepts for probes: texts of two classes, each text with its document and split.

They come from plugins, a `.jsonl` file or the `datasets` library.

Texts of one document never stand in two splits, and an interval resamples documents, not texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError, PluginError, line_of, plugin_code
from tl_capacity.interfaces import Concept, LabelledText
from tl_capacity.plugins import plugins
from tl_capacity.runtime.checks import checked
from tl_capacity.storage.digests import place_of

FEWEST_DOCUMENTS = 50
"""A concept needs this many documents. Intervals resample documents, so many texts of few documents say little."""
SPLITS = {"train": 0.5, "validation": 0.15, "test": 0.35}
"""The splits, and each one's share of the documents if the texts name none.

Nothing is fitted or chosen on the last one.
"""
TEXT_FIELDS = ("text", "content")


@dataclass(frozen=True)
class LabelledTexts:
    """The checked texts of one concept.

    Attributes:
        name: of the concept.
        classes: the class of label 1, which the concept is named after, and that of label 0.
        texts: the texts.
        labels: bool [text], whether a text is of the first class.
        documents: int64 [text], numbers of the documents that the texts are from.
        splits: [text] "train", "validation" or "test".
    """

    name: str
    classes: tuple[str, str]
    texts: tuple[str, ...]
    labels: NDArray[np.bool_]
    documents: NDArray[np.int64]
    splits: NDArray[Any]

    @classmethod
    def of(cls, name: str, texts: Iterable[LabelledText], classes: tuple[str, str] | None = None) -> LabelledTexts:
        """Checked texts, with numbered documents and a split for each.

        Args:
            classes: the class of label 1 and the other; by default the two labels that occur, in the order in which
                they first do.

        Raises:
            CapacityError: where there are not two classes of texts, texts of fewer than 50 documents, a document in two
                splits, or a split that lacks a class.
        """
        texts = tuple(texts)
        labels = tuple(dict.fromkeys(text.label for text in texts))
        keys = [text.document if text.document is not None else f"text {number}" for number, text in enumerate(texts)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        if len(numbers) < FEWEST_DOCUMENTS:
            raise CapacityError(
                f"the concept {name!r} has {len(texts):,} texts of {len(numbers):,} documents: a probe needs at least"
                f" {FEWEST_DOCUMENTS} documents, and hundreds for a narrow interval"
            )
        if len(labels) != 2:
            raise CapacityError(
                f"the concept {name!r} has the labels {_listed(labels)}, but a probe tells two classes apart: give each"
                " text one of two labels"
            )
        classes = classes or (labels[0], labels[1])
        if set(labels) != set(classes):
            raise CapacityError(
                f"the concept {name!r} has the labels {_listed(labels)} instead of {_listed(classes)}: fix its plugin"
            )
        splits = [text.split or split_of(key) for text, key in zip(texts, keys, strict=True)]
        if unknown := set(splits) - SPLITS.keys():
            raise CapacityError(
                f"the concept {name!r} has a split {sorted(unknown)[0]!r}: use {', '.join(SPLITS)}, or none"
            )
        pairs = dict.fromkeys(zip(keys, splits, strict=True))
        if len(pairs) > len(numbers):
            torn = next(key for key in numbers if sum(key == other for other, _ in pairs) > 1)
            raise CapacityError(
                f"the document {torn!r} of the concept {name!r} is in two splits, so a probe would be tested on what"
                " it was trained on: use one split"
            )
        made = cls(
            name=name,
            classes=classes,
            texts=tuple(text.text for text in texts),
            labels=np.array([text.label == classes[0] for text in texts]),
            documents=np.array([numbers[key] for key in keys], dtype=np.int64),
            splits=np.array(splits),
        )
        for split in ("train", "test"):
            counted = [int((made.splits == split)[made.labels == label].sum()) for label in (True, False)]
            if min(counted) < 5:
                raise CapacityError(
                    f"the {split} split of the concept {name!r} has {counted[0]} and {counted[1]} texts of its classes:"
                    " 5 of each are needed"
                )
        return made

    @property
    def majority(self) -> float:
        """Accuracy on the test split when the answer is always the training split's commoner class."""
        commoner = bool(self.labels[self.splits == "train"].mean() > 0.5)
        return float((self.labels[self.splits == "test"] == commoner).mean())


def split_of(document: str) -> str:
    """The split of a document. It depends only on the document's name."""
    position, reached = place_of(document), 0.0
    for split, share in SPLITS.items():
        reached += share
        if position < reached:
            return split
    return "test"


@checked
def load_concepts(spec: str | Sequence[str]) -> list[LabelledTexts]:
    """The concepts that `spec` names, in the same order.

    Args:
        spec: names of registered concepts or of collections of them (`embedded`, `brown`), paths of `.jsonl` files or
            `datasets` ids, separated by commas. A file or data set is one concept: rows with `text` and `label`, and
            `document` and `split` where known.

    Raises:
        CapacityError: where nothing knows a name, or what it names cannot be probed for.
    """
    parts = [part.strip() for part in (spec.split(",") if isinstance(spec, str) else spec)]
    loaded: dict[str, LabelledTexts] = {}
    for part in filter(None, parts):
        for concept in _registered(part):
            loaded[concept.name] = LabelledTexts.of(concept.name, _texts_of(concept), concept.classes)
        if not _registered(part):
            name = Path(part).name.partition(".")[0]
            loaded[name] = LabelledTexts.of(name, _rows(part))
    if not loaded:
        raise CapacityError(
            "no concept is named: pass `embedded`, or names of concepts that `tl-capacity plugins` lists"
        )
    return list(loaded.values())


def _texts_of(concept: Concept) -> list[LabelledText]:
    """The texts of a plugin's concept.

    Raises:
        PluginError: where its code fails, or gives something else than labelled texts.
    """
    with plugin_code("concept", concept.name, concept.load):
        texts = list(concept.load())
    for number, text in enumerate(texts, 1):
        if not isinstance(text, LabelledText):
            what = f"a {type(text).__name__}"
        elif not isinstance(text.text, str):
            what = f"a text that is a {type(text.text).__name__}"
        elif not isinstance(text.label, str | int):
            what = f"a label that is a {type(text.label).__name__}"
        elif not isinstance(text.document, str | None):
            what = f"a document that is a {type(text.document).__name__}"
        else:
            continue
        raise PluginError(
            f"the concept {concept.name!r} gives {what}{line_of(concept.load)}, as its text {number:,}: its load must"
            " give LabelledText(text, label) objects whose fields are strings"
        )
    return texts


def _registered(name: str) -> list[Concept]:
    known = plugins().concepts
    return [known[name]] if name in known else [concept for concept in known if concept.collection == name]


def _rows(spec: str) -> list[LabelledText]:
    if spec.endswith((".jsonl", ".ndjson")):
        return [_labelled(row, f"line {number} of {spec}") for number, row in enumerate(_json_lines(spec), 1)]
    if "/" not in spec and not Path(spec).exists():
        plugins().concepts[spec]  # no data set's id is a bare word, so that this raises and names the nearest concept
    from tl_capacity.text.datasets import load_dataset_rows

    return [_labelled(row, f"row {number} of {spec}") for number, row in enumerate(load_dataset_rows(spec), 1)]


def _json_lines(path: str) -> list[Any]:
    try:
        return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except OSError as problem:
        raise CapacityError(f"the concept file {path} cannot be read ({problem.strerror}): check the path") from problem
    except (ValueError, RecursionError) as problem:
        raise CapacityError(
            f"the concept file {path} is not JSON on each line ({problem}): write one object with `text` and `label`"
            " per line"
        ) from problem


def _labelled(row: Any, where: str) -> LabelledText:
    text = (
        next((row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str)), None)
        if isinstance(row, Mapping)
        else None
    )
    label = row.get("label") if isinstance(row, Mapping) else None
    if text is None or not isinstance(label, (str, int)):
        raise CapacityError(f"{where} lacks a `text` or a `label`: give both; the label is a word or a whole number")
    document, split = (
        None if row.get(field) is None or row[field] is text else str(row[field]) for field in ("document", "split")
    )
    return LabelledText(text, str(label), document, split)


def _listed(names: Sequence[str]) -> str:
    return (
        ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if names
        else "(none)"
    )
