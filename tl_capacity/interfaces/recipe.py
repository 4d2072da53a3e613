"""An experiment for the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """An experiment for `tl-capacity run NAME`.

    Attributes:
        name: as typed on the command line.
        summary: one line.
        target: a function of one frozen dataclass, whose fields become the command's options; or where it is, as
            `module:function`, which is imported only when the recipe runs. The module may be a plugin file's own name.
    """

    name: str
    summary: str
    target: str | Callable[[Any], Any]
