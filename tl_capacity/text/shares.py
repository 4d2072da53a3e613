"""Shares: which documents each of several processes reads, also after an earlier launch with another number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


class Place(NamedTuple):
    """How far a process has come in its documents: it has read all of them before `document`, and `rows` rows of that
    one.
    """

    document: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Share:
    """What one process reads of the text that earlier launches have left.

    Documents that were begun are dealt to the processes in turn, and so are those that were not. Which process reads a
    document follows from its number alone, so that processes need not talk about it.

    Attributes:
        index, count: the process, and how many there are.
        launches: of each earlier launch, the place of each of its processes.
    """

    index: int = 0
    count: int = 1
    launches: tuple[tuple[Place, ...], ...] = ()

    @classmethod
    def recorded(cls, index: int, count: int, launches: Sequence[Sequence[Sequence[int]]]) -> Share:
        """The share of a process, with earlier launches read from JSON."""
        return cls(index, count, tuple(tuple(Place(*map(int, place)) for place in launch) for launch in launches))

    def __call__(self, numbered: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, int, Item]]:
        """The documents of this process.

        Args:
            numbered: all documents by number, in their order.

        Yields:
            The number of a document, how many of its rows were read, and the document.
        """
        not_begun = [0] * len(self._stages)
        for number, item in numbered:
            rows = 0
            for stage, (begun, places) in enumerate(self._stages):
                if number in begun:
                    process, rows = begun[number]
                else:
                    process = not_begun[stage] % (len(places) or self.count)
                    not_begun[stage] += 1
                if places and number < places[process].document:
                    break
                if places and number == places[process].document:
                    rows = places[process].rows
            else:
                if process == self.index:
                    yield number, rows, item

    @cached_property
    def begun(self) -> Mapping[int, int]:
        """The documents of this process that earlier launches began, and how many rows of each they read."""
        return {number: rows for number, (process, rows) in self._stages[-1][0].items() if process == self.index}

    @cached_property
    def all_begun(self) -> Mapping[int, int]:
        """The documents of all processes that earlier launches began, and how many rows of each they read."""
        return {number: rows for number, (_, rows) in self._stages[-1][0].items()}

    def place(self, place: Place) -> Place:
        """A place whose rows count from where this process began, turned into one that counts from the document's
        beginning.
        """
        return Place(place.document, place.rows + self.begun.get(place.document, 0)) if place.rows else place

    @cached_property
    def _stages(self) -> list[tuple[dict[int, tuple[int, int]], tuple[Place, ...]]]:
        """For each launch: the process and the rows of each unfinished document at its beginning, and where its
        processes ended. This launch comes last and has not ended.
        """
        stages: list[tuple[dict[int, tuple[int, int]], tuple[Place, ...]]] = []
        rows: dict[int, int] = {}
        for places in (*self.launches, ()):
            dealt = len(places) or self.count
            begun = {number: (turn % dealt, rows[number]) for turn, number in enumerate(sorted(rows))}
            stages.append((begun, places))
            if not places:
                break
            rows = {
                number: places[process].rows if number == places[process].document and places[process].rows else so_far
                for number, (process, so_far) in begun.items()
                if number >= places[process].document
            }
            rows |= {place.document: place.rows for place in places if place.rows}
        return stages

    def to_json(self) -> list[Any]:
        """The earlier launches as JSON has them."""
        return [[list(place) for place in launch] for launch in self.launches]
