"""Recipes as commands: the fields of a recipe's frozen dataclass become the options of `tl-capacity run NAME`, and of
the recipe's file run by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, PluginError, reporting_errors
from tl_capacity.interfaces import Recipe


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


def option(default: Any, help: str, **parameters: Any) -> Any:
    """A dataclass field with a help text for its option."""
    return dataclasses.field(default=default, metadata={"help": help}, **parameters)


def argument(help: str) -> Any:
    """A dataclass field that is given by its place instead of by an option's name; required."""
    return dataclasses.field(metadata={"help": help, "by_place": True})


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
    app.command()(_with_options(function))
    return typer.main.get_command(app)


def _with_options(function: Callable[[Any], Any]) -> Callable[..., Any]:
    import typer

    hints = typing.get_type_hints(function)
    config_type = next(kind for name, kind in hints.items() if name != "return")
    field_types = typing.get_type_hints(config_type)
    parameters, listed = [], set()
    for field in dataclasses.fields(config_type):
        kind: Any = field_types[field.name]
        default = field.default if field.default is not dataclasses.MISSING else ...
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if typing.get_origin(kind) is tuple:
            listed.add(field.name)
            kind, default = list[str], default if default is ... else [",".join(map(str, default))] if default else []
        elif isinstance(kind, types.UnionType) and type(None) not in typing.get_args(kind):
            raise PluginError(
                f"the option {field.name!r} of {function.__name__} has the type {kind}, of which no option can be made:"
                " use one type or None"
            )
        declare = typer.Argument if field.metadata.get("by_place") else typer.Option
        info = declare(default, help=str(field.metadata.get("help", "")))
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind))

    def command(**values: Any) -> Any:
        for name in listed:
            item, given = typing.get_args(field_types[name])[0], ",".join(values[name])
            try:
                values[name] = tuple(item(part) for part in given.split(",") if part.strip())
            except ValueError as problem:
                raise CapacityError(
                    f"--{name.replace('_', '-')} {given!r} is no list of {item.__name__}s: write them as 1,2,3"
                ) from problem
        return function(config_type(**values))

    command.__doc__ = (inspect.getdoc(function) or "").split("\n\n")[0]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
