"""Paths beside a file or folder, whatever the user called it."""

from __future__ import annotations

from pathlib import Path


def named(path: Path) -> Path:
    """The path with a name of its own: for `.` and `..` the folder that they lead to."""
    return path if path.name not in ("", "..") else path.resolve()


def beside(path: Path, ending: str) -> Path:
    """The place beside a file or folder that has its name and an ending."""
    whole = named(path)
    return whole.with_name(f"{whole.name}.{ending}")
