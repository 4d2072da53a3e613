"""ReadAt: the hook point at which a student was read, and how it was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ReadAt:
    """Where a student is read.

    Attributes:
        hook: the hook point.
        tried: where it was chosen, the error of each hook point that was tried, smallest for the chosen one.
    """

    hook: str
    tried: Mapping[str, float]

    @classmethod
    def best_of(cls, errors: Mapping[str, float]) -> ReadAt:
        """The hook point with the smallest error."""
        return cls(min(errors, key=errors.__getitem__), dict(errors))

    def says(self, judge: str) -> str:
        """The hook point in words, with how it was chosen.

        Args:
            judge: the text by which it was chosen, in words.
        """
        return f"{self.hook}, the best of {len(self.tried)} on {judge}" if self.tried else self.hook
