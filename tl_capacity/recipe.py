"""Recipes as commands: the fields of a recipe's frozen dataclass become the options of `tl-capacity run NAME`, and of
the recipe's file run by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, PluginError, reporting_errors
from tl_capacity.interfaces import Recipe
from tl_capacity.options import argument as argument
from tl_capacity.options import command_with
from tl_capacity.options import option as option
from tl_capacity.options import option_of as option_of
from tl_capacity.options import values_of as values_of


def load(recipe: Recipe) -> Callable[[Any], Any]:
    """The function that a recipe names.

    Raises:
        PluginError: where it cannot be imported.
    """
    module, _, function = recipe.target.partition(":")
    try:
        return typing.cast(Callable[[Any], Any], getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as problem:
        raise PluginError(
            f"the recipe {recipe.name!r} cannot be loaded from {recipe.target} ({problem}): install what it needs"
        ) from problem


def settings_of(config: Any, *without: str) -> dict[str, Any]:
    """A recipe's settings as JSON holds them, but for some that say nothing of the result, such as
    where it is written.
    """
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in without
    }


def already_there(result: Path, about: Path, settings: dict[str, Any]) -> bool:
    """Whether a recipe's result is there, made with these settings, so that the same command started again has nothing
    to do.

    Args:
        result: the file that is written last.
        about: the JSON file that holds the result's `settings`.

    Raises:
        CapacityError: where the result is there, and of other settings.
    """
    if not result.exists():
        return False
    try:
        before = json.loads(about.read_bytes())["settings"]
        changed = [
            f"{name} = {before[name]}"
            for name, value in json.loads(json.dumps(settings)).items()
            if before[name] != value
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        changed = ["which are not known"]
    if changed:
        raise CapacityError(
            f"{result.parent} already holds a {result.name} of other settings ({', '.join(changed)}): choose another"
            " --out"
        )
    print(
        f"{result.parent} already holds a {result.name} of these settings, and it stays: choose another --out to make"
        " it anew"
    )
    return True


def run(function: Callable[[Any], Any], arguments: Sequence[str] | None = None, name: str | None = None) -> Any:
    """Parse `arguments` (by default the command line's) into the function's dataclass and call it.

    `tuple[int, ...]` fields are given as `16,32,64`, or the option is repeated; a field without a default is a required
    option.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return command_of(function).main(given, prog_name=name or sys.argv[0], standalone_mode=False)


def run_file(function: Callable[[Any], Any]) -> None:
    """What a recipe's file calls under `if __name__ == "__main__"`: `run`, with errors as on the command line."""
    with reporting_errors():
        run(function)


def command_of(function: Callable[[Any], Any]) -> Any:
    """A recipe's function as a command of click, which Typer makes."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    config_type = next(kind for name, kind in typing.get_type_hints(function).items() if name != "return")
    app.command()(command_with(config_type)(function))
    return typer.main.get_command(app)
