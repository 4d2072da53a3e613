"""Exports: functions that write a measurement for readers. They are found through an entry point, because they are
built on measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from tl_capacity.errors import PluginError

GROUP = "tl_capacity.exports"
"""Entry points of functions that write a measurement to a file: `name = module:function`. The function takes the
measurement, the file and student widths, and returns the file.
"""


def page_writer() -> Callable[..., Path]:
    """The function that writes a measurement's HTML page.

    Raises:
        PluginError: where no installed package offers one.
    """
    for entry in entry_points(group=GROUP, name="page"):
        writer: Callable[..., Path] = entry.load()
        return writer
    raise PluginError(
        f"no installed package has the entry point 'page' of the group {GROUP!r}: install tl-capacity again"
    )
