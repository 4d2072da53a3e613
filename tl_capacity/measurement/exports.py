"""Exports: what writes a measurement down for readers, found through an entry point, as it is built on measurements."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from tl_capacity.errors import PluginError

GROUP = "tl_capacity.exports"
"""The entry points of whatever writes a measurement to a file: `name = module:function`, which takes the measurement,
the file and student widths, and returns the file.
"""


def page_writer() -> Callable[..., Path]:
    """What writes the HTML page of a measurement.

    Raises:
        PluginError: where no installed package offers one.
    """
    for entry in entry_points(group=GROUP, name="page"):
        writer: Callable[..., Path] = entry.load()
        return writer
    raise PluginError(
        f"no installed package has the entry point 'page' of the group {GROUP!r}: install tl-capacity again"
    )
