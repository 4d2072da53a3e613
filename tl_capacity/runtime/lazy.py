"""Public names of a package that are imported on first use, so that importing the package stays cheap."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def lazily(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """A package's `__getattr__` and its public names.

    The names are those that its `__init__.py` imports under `if TYPE_CHECKING:`, so that type checkers and readers see
    the same list, and there is one.

    Args:
        package: its name.
        file: its `__init__.py`.
    """
    homes: dict[str, str] = {}
    for block in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            imports = [statement for statement in block.body if isinstance(statement, ast.ImportFrom)]
            homes |= {name.asname or name.name: str(line.module) for line in imports for name in line.names}
    return from_homes(package, homes), sorted(homes)


def from_homes(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names live elsewhere.

    Args:
        package: the module's name.
        homes: the module that each name lives in; for a module of the package, the package.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(homes[name]), name)

    return find
