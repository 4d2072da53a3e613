"""Options: each field of a frozen dataclass becomes an option of a command, with its type, default and help text.

Every setting is declared once, in the dataclass; a verb of `tl-capacity` and a recipe are made into commands alike.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tl_capacity.errors import CapacityError, PluginError

Value = TypeVar("Value")
MOST = 2**63
"""Whole numbers are below it, as in all libraries that count with them."""

WIDEST = 2**31
"""Widths are below it."""


def option(
    default: Any,
    help: str,
    *names: str,
    repeated: bool = False,
    parse: Callable[[str], Any] | None = None,
    typed: str = "",
    least: int | None = None,
    **parameters: Any,
) -> Any:
    """A dataclass field with a help text for its option.

    Args:
        default: the field's default.
        help: what `--help` says of it.
        names: what is typed, as `--sae`, or `--bos/--no-bos` for a pair of flags; by default the field's name, with
            hyphens for its underscores.
        repeated: for a tuple, that the option is given once for each item; by default its items are joined by commas.
        parse: makes the value of the text that was typed; its `CapacityError` begins with that text, and the option's
            name is put before it.
        typed: with `parse`, the text that stands for `default`.
        least: the smallest number that may be given.
        parameters: others of `dataclasses.field`.
    """
    metadata = {"help": help, "names": names, "repeated": repeated, "parse": parse, "typed": typed, "least": least}
    return dataclasses.field(default=default, metadata=metadata, **parameters)


def required(help: str) -> Any:
    """A dataclass field without a default, with a help text for its option."""
    return dataclasses.field(metadata={"help": help})


def argument(help: str) -> Any:
    """A required dataclass field that is passed by position instead of as an option."""
    return dataclasses.field(metadata={"help": help, "by_place": True})


def option_of(declaring: type, name: str, help: str | None = None, **default: Any) -> Any:
    """A dataclass field for a setting that another dataclass declares. Default and help text are taken from there
    unless given.

    Args:
        declaring: the dataclass of the stage that the setting is for.
        name: of its field; the option may have another name.
        help: where the setting has a narrower meaning here.
        default: where it is another here.
    """
    (declared,) = (field for field in dataclasses.fields(declaring) if field.name == name)
    metadata = {**declared.metadata, "declared": (declaring, name)}
    if help is not None:
        metadata["help"] = help
    return dataclasses.field(default=default.get("default", declared.default), metadata=metadata)


def values_of(config: Any, declaring: type) -> dict[str, Any]:
    """The values in `config` of the settings that `declaring` declares, under their names there; see `option_of`."""
    declared = ((field.name, field.metadata.get("declared")) for field in dataclasses.fields(config))
    return {where[1]: getattr(config, name) for name, where in declared if where and where[0] is declaring}


def internal(default: Any) -> Any:
    """A dataclass field that only programs set."""
    return dataclasses.field(default=default, metadata={"internal": True})


def whole_numbers(text: str) -> tuple[int, ...]:
    """Student widths in a text such as `128,256,512`, which may be empty.

    Raises:
        CapacityError: where one is no whole number, or below 1.
    """
    try:
        widths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as problem:
        raise CapacityError(f"{text!r} is not a list of whole numbers: write them as 128,256,512") from problem
    if any(width < 1 for width in widths):
        raise CapacityError(f"{text!r} has a width below 1: give widths of at least 1")
    if any(width >= WIDEST for width in widths):
        raise CapacityError(f"a width of {len(str(max(widths)))} digits is no model's: give widths below 2³¹")
    return widths


def read(name: str, text: str, parse: Callable[[str], Value]) -> Value:
    """The value of an option's text.

    Raises:
        CapacityError: where `parse` refuses it; the option's name is put before what it says.
    """
    try:
        return parse(text)
    except CapacityError as problem:
        raise CapacityError(f"{name} {problem}") from problem


def command_with(
    config_type: type,
    *,
    only: Mapping[str, str | None] | None = None,
    defaults: Mapping[str, Any] | None = None,
    after: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a parameter that is a dataclass becomes options of the command, one for each field.

    What else the function takes stays, in Typer's words.

    Args:
        config_type: the dataclass.
        only: the fields that are options of this command, in this order, each with its help text here, or None for the
            field's own; by default all.
        defaults: by field, where this command has another.
        after: by name of another parameter of the function, the option that it follows in `--help`; by default each
            keeps its place.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = _options(config_type, only, defaults or {})
        hints = typing.get_type_hints(function, include_extras=True)
        config_name, parameters = "", []
        for parameter in inspect.signature(function).parameters.values():
            if hints[parameter.name] is config_type:
                config_name = parameter.name
                parameters += [option.parameter(function.__name__) for option in options]
            else:
                by_name = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
                parameters.append(by_name)
        for name, before in (after or {}).items():
            moved = parameters.pop([p.name for p in parameters].index(name))
            parameters.insert([p.name for p in parameters].index(before) + 1, moved)

        def command(**values: Any) -> Any:
            settings = {option.field.name: option.value(values.pop(option.field.name)) for option in options}
            return function(**{config_name: config_type(**settings)}, **values)

        command.__name__ = function.__name__
        command.__doc__ = (inspect.getdoc(function) or "").split("\n\n")[0]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _options(config_type: type, only: Mapping[str, str | None] | None, defaults: Mapping[str, Any]) -> list[_Option]:
    """The options of a command, in order."""
    types_of_fields = typing.get_type_hints(config_type)
    fields = {
        field.name: field for field in dataclasses.fields(config_type) if not field.metadata.get("internal", False)
    }
    helps = dict.fromkeys(fields) if only is None else only
    return [
        _Option(
            fields[name],
            types_of_fields[name],
            str(fields[name].metadata.get("help", "")) if help is None else help,
            defaults.get(name, _default(fields[name])),
        )
        for name, help in helps.items()
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or `...` if it has none, as Typer writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ... if field.default is dataclasses.MISSING else field.default


@dataclass(frozen=True)
class _Option:
    """A field, with its type, help text and default in one command."""

    field: dataclasses.Field[Any]
    kind: Any
    help: str
    default: Any

    @property
    def is_tuple(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    def parameter(self, command: str) -> inspect.Parameter:
        """The parameter from which Typer makes the option.

        Raises:
            PluginError: where it has a type of which none can be made.
        """
        import typer

        kind, default = self.kind, self.default
        if self.field.metadata.get("parse"):
            kind, default = str, self.field.metadata["typed"]
        elif self.is_tuple:
            kind, default = list[str], default if default is ... else self._typed(default)
        elif isinstance(kind, types.UnionType) and type(None) not in typing.get_args(kind):
            raise PluginError(
                f"the option {self.field.name!r} of {command} has the type {kind}, of which no option can be made: use"
                " one type or None"
            )
        declare = typer.Argument if self.field.metadata.get("by_place") else typer.Option
        info = declare(default, *self.field.metadata.get("names", ()), help=self.help)
        return inspect.Parameter(self.field.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)

    def value(self, given: Any) -> Any:
        """The typed value, as the field holds it.

        Raises:
            CapacityError: where it cannot be that.
        """
        name = next(iter(self.field.metadata.get("names", ())), f"--{self.field.name.replace('_', '-')}")
        parse = self.field.metadata.get("parse")
        if parse:
            return self.default if given == self.field.metadata["typed"] else read(name, given, parse)
        if not self.is_tuple:
            self._check(name, given)
            return given
        item = typing.get_args(self.kind)[0]
        joined = ",".join(given)
        parts = given if self.field.metadata.get("repeated") else [p for p in joined.split(",") if p.strip()]
        try:
            items = tuple(item(part) for part in parts)
        except ValueError as problem:
            raise CapacityError(
                f"{name} {joined!r} is not a list of {item.__name__}s: write them as 1,2,3"
            ) from problem
        for each in items:
            self._check(name, each)
        return items

    def _check(self, name: str, value: Any) -> None:
        """Refuse a number that has more digits than any count, or is not as large as it must be."""
        if not isinstance(value, int | float):
            return
        if isinstance(value, int) and abs(value) >= MOST:
            raise CapacityError(f"{name} has {len(str(abs(value)))} digits: give a number below 2⁶³")
        least = self.field.metadata.get("least")
        if least is not None and not value >= least:
            raise CapacityError(f"{name} {value:g} is not possible: give at least {least}")

    def _typed(self, items: Sequence[Any]) -> list[str]:
        """A tuple as a user would type it."""
        texts = [str(item) for item in items]
        return texts if self.field.metadata.get("repeated") or not texts else [",".join(texts)]
