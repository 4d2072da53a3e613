"""Recipes as commands: the fields of a recipe's frozen dataclass become the options of `tl-capacity run NAME`, and of
the recipe's own file.
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

from tl_capacity.errors import CapacityError, PluginError, line_of, reporting_errors
from tl_capacity.interfaces import Recipe
from tl_capacity.options import argument as argument
from tl_capacity.options import command_with
from tl_capacity.options import option as option
from tl_capacity.options import option_of as option_of
from tl_capacity.options import values_of as values_of
from tl_capacity.plugins import plugin_file, plugins
from tl_capacity.storage.same_run import earlier_values


def load(recipe: Recipe) -> Callable[[Any], Any]:
    """The function of a recipe: its target, or what its target names.

    Raises:
        PluginError: where it cannot be imported, or is no function of a dataclass.
    """
    function = _imported(recipe, recipe.target) if isinstance(recipe.target, str) else recipe.target
    if not callable(function):
        raise PluginError(
            f"the recipe {recipe.name!r} has the target {function!r}, which is not a function: give a function of a "
            "frozen dataclass, or its place as module:function"
        )
    _config_type(function, f"the recipe {recipe.name!r}")
    return typing.cast(Callable[[Any], Any], function)


def _imported(recipe: Recipe, target: str) -> Any:
    """The object that `module:function` names. A plugin file that registers the recipe may name itself."""
    module, _, function = target.partition(":")
    itself = plugin_file(plugins().recipes.origins.get(recipe.name, ""), module)
    try:
        return getattr(itself or importlib.import_module(module), function)
    except CapacityError:
        raise
    except (Exception, SystemExit) as problem:  # importing runs somebody's code
        usual = isinstance(problem, ImportError | AttributeError)
        reason = str(problem) if usual else f"{type(problem).__name__}: {problem}"
        raise PluginError(
            f"the recipe {recipe.name!r} cannot be loaded from {target} ({reason}): install what it needs, or give the"
            " function itself as its target"
        ) from problem


def _config_type(function: Callable[[Any], Any], what: str) -> type:
    """The dataclass that a recipe's function takes.

    Raises:
        PluginError: where its first argument is none.
    """
    try:
        kinds = [kind for name, kind in typing.get_type_hints(function).items() if name != "return"]
    except (NameError, TypeError, AttributeError) as problem:
        raise PluginError(
            f"{what} has a function whose types cannot be read{line_of(function)} ({problem}): write them as names "
            "that exist in its module"
        ) from problem
    if not kinds or not (isinstance(kinds[0], type) and dataclasses.is_dataclass(kinds[0])):
        raise PluginError(
            f"{what} has a function that takes no dataclass{line_of(function)}: write it as def main(config: Config),"
            " where Config is a frozen dataclass whose fields are the options"
        )
    return kinds[0]


def settings_of(config: Any, *without: str) -> dict[str, Any]:
    """A recipe's settings as JSON holds them, without those that do not change the result, such as where
    it is written.
    """
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in without
    }


def already_there(result: Path, about: Path, settings: dict[str, Any]) -> bool:
    """Whether a recipe's result, made with these settings, already exists. The same command started again then has
    nothing to do.

    Args:
        result: the file that is written last.
        about: the JSON file that holds the result's `settings`.

    Raises:
        CapacityError: where the result is there, and of other settings.
    """
    if not result.exists():
        return False
    try:
        before, now = json.loads(about.read_bytes())["settings"], json.loads(json.dumps(settings))
        changed = earlier_values(before, now)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        changed = "which are unknown"
    if changed:
        raise CapacityError(
            f"{result.parent} already holds a {result.name} of other settings ({changed}): choose another --out"
        )
    print(
        f"{result.parent} already holds a {result.name} of these settings, which stays: choose another --out to make "
        "it anew"
    )
    return True


def run(function: Callable[[Any], Any], arguments: Sequence[str] | None = None, name: str | None = None) -> Any:
    """Parse `arguments` (by default the command line's) into the function's dataclass, and call the function.

    `tuple[int, ...]` fields are given as `16,32,64`, or the option is repeated; a field without a default is a required
    option.
    """
    import typer

    given, command = list(sys.argv[1:] if arguments is None else arguments), command_of(function)
    try:  # not its `main`, which would turn an interruption into a number that cannot be told from a result
        with command.make_context(name or sys.argv[0], given) as context:
            return command.invoke(context)
    except typer.Exit as ended:
        if ended.exit_code:
            raise SystemExit(ended.exit_code) from None
        return None


def run_file(function: Callable[[Any], Any]) -> None:
    """What a recipe's file calls under `if __name__ == "__main__"`: `run`, with errors shown as on the command line."""
    with reporting_errors():
        run(function)


def command_of(function: Callable[[Any], Any]) -> Any:
    """A recipe's function as a click command, made by Typer.

    Raises:
        PluginError: where the function takes no dataclass, or one of whose fields no options can be made.
    """
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    name = getattr(function, "__name__", repr(function))
    config_type = _config_type(function, f"the recipe {name!r}")
    try:
        app.command()(command_with(config_type)(function))
        return typer.main.get_command(app)
    except (
        RuntimeError,
        AssertionError,
        NameError,
        KeyError,
    ) as problem:  # a type that Typer has no option for, or none at all
        raise PluginError(
            f"the options of the recipe {name!r} cannot be made ({problem}): give each field of {config_type.__name__}"
            " a type that Typer knows"
        ) from problem
