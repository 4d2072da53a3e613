"""How IPython shows a result: its tables and its figure in a notebook, its tables in a terminal."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tl_capacity.errors import CapacityError


class ShownInNotebooks:
    """A result that a notebook shows by itself: `_repr_html_`, and below it the figure of `plot`.

    The figure is shown as plotly shows its own, so `plotly.io.renderers` decides how. A class has `to_frame` and
    `plot`, and its own `_repr_html_` where a frame says too little.
    """

    def _repr_html_(self: Any) -> str:
        """The frame as an HTML table, every cell escaped."""
        return str(self.to_frame().to_html(index=False))

    def _ipython_display_(self: Any) -> None:
        """Called by IPython, which then shows nothing itself."""
        ipython: Any = import_module("IPython")
        if not hasattr(ipython.get_ipython(), "kernel"):
            _print_in_terminal(self)
            return
        ipython.display.display(ipython.display.HTML(self._repr_html_()))
        try:
            figure = self.plot()
        except CapacityError:  # there is nothing to draw, as of a budget without widths
            return
        ipython.display.display(figure)


def _print_in_terminal(result: Any) -> None:
    """Print the result as its command prints it."""
    if not hasattr(result, "__rich_console__"):
        print(repr(result))
        return
    from rich.console import Console

    Console().print(result)
