"""The interfaces of token sources, and of labelled texts for probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


class TokenSource:
    """Base of a token source: it turns a specification, such as a path, into documents."""

    name: str
    summary: str = ""

    def matches(self, spec: str) -> bool:
        """Whether this source can read `spec`. Sources are asked in the order in which plugins registered them."""
        raise NotImplementedError(f"the token source {self.name!r} does not override matches()")

    def documents(self, spec: str) -> Iterator[str | None]:
        """The documents, always in the same order. None stands for a row without text, which is left
        out and counted.
        """
        raise NotImplementedError(f"the token source {self.name!r} does not override documents()")


@dataclass(frozen=True)
class LabelledText:
    """One text of a concept.

    Attributes:
        text: what is probed.
        label: its class.
        document: what it is from: texts of one document stay in one split and are resampled together; by default each
            text is a document of its own.
        split: "train", "validation" or "test"; by default a hash of the document decides.
    """

    text: str
    label: str
    document: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Concept:
    """A property of texts that a probe reads off activations: texts of two classes.

    Attributes:
        name: as given to `--concepts`.
        classes: the class that the concept is named after, and the other.
        load: the texts, always in the same order; may import and read whatever it needs.
        collection: the name of the set it belongs to, which `--concepts` also takes.
        licence: of the texts.
    """

    name: str
    classes: tuple[str, str]
    load: Callable[[], Iterable[LabelledText]]
    summary: str = ""
    collection: str = ""
    licence: str = ""
