"""What commands print on standard output: tables and text with rich, and JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = 140
"""Columns of an output that is not a terminal. Rich assumes 80, and would fold numbers."""


def console() -> Console:
    """Standard output as rich sees it."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=COLUMNS)


def print_text(text: str, style: str | None = None) -> None:
    """Print text. Brackets are not read as markup, and numbers are not coloured."""
    console().print(text, style=style, markup=False, highlight=False)


def print_json(content: Any) -> None:
    """Print JSON, with non-ASCII letters in names unchanged."""
    import typer

    typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
