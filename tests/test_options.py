"""Options: what is typed becomes the dataclass, and what `--help` says comes from its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from tl_capacity.errors import CapacityError, PluginError
from tl_capacity.options import argument, command_with, internal, option, required
from tl_capacity.runtime.units import bytes_in


@dataclass(frozen=True)
class Settings:
    place: str = argument("Where.")
    name: str = required("Of the thing.")
    parts: tuple[str, ...] = option((), "May be repeated.", "--part", repeated=True)
    widths: tuple[int, ...] = option((1, 2), "Joined by commas.")
    shuffle: bool = option(True, "Or not.", "--shuffle/--in-order")
    limit: int | None = option(None, "A size.", parse=bytes_in)
    watched: bool = internal(False)


def run(decorate: Any, arguments: list[str]) -> tuple[Settings, str]:
    """What a command was given."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    def show(settings: Settings, more: Annotated[str, typer.Option(help="More.")] = "") -> tuple[Settings, str]:
        """Show them.

        Not in the help.
        """
        return settings, more

    app.command()(decorate(show))
    given: tuple[Settings, str] = app(arguments, standalone_mode=False)
    return given


def test_what_is_typed_becomes_the_dataclass() -> None:
    takes = command_with(Settings)
    assert run(takes, ["here", "--name", "x"]) == (Settings("here", "x"), "")
    typed = [
        "here",
        "--name",
        "x",
        "--part",
        "a,b",
        "--part",
        "c",
        "--widths",
        "8,16",
        "--in-order",
        "--limit",
        "0.29GB",
    ]
    assert run(takes, [*typed, "--more", "y"]) == (
        Settings("here", "x", ("a,b", "c"), (8, 16), False, 290_000_000),
        "y",
    )


def test_help_says_what_the_fields_say(capsys: pytest.CaptureFixture[str]) -> None:
    run(command_with(Settings, after={"more": "name"}), ["--help"])
    shown = capsys.readouterr().out
    said = [
        "Show them.",
        "Where.",
        "--name",
        "Of the thing.",
        "--more",
        "--part",
        "[default: 1,2]",
        "--in-order",
        "--limit",
    ]
    assert sorted(said, key=shown.index) == said
    assert "Not in the help" not in shown
    assert "watched" not in shown
    run(command_with(Settings, only={"widths": "Other words.", "place": None, "name": None}), ["--help"])
    shown = capsys.readouterr().out
    assert "Other words." in shown
    assert "--part" not in shown


def test_a_command_may_have_fewer_options_and_other_defaults() -> None:
    takes = command_with(Settings, only={"place": None, "name": None, "widths": None}, defaults={"name": "y"})
    assert run(takes, ["here"]) == (Settings("here", "y"), "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "much"], "--limit 'much' is not a size: write it as 500MB or 4GB"),
        (["--widths", "8,x"], "--widths '8,x' is not a list of ints: write them as 1,2,3"),
    ],
)
def test_a_refusal_names_the_option(arguments: list[str], says: str) -> None:
    with pytest.raises(CapacityError, match=says):
        run(command_with(Settings), ["here", "--name", "x", *arguments])


def test_a_type_of_which_no_option_can_be_made_is_refused() -> None:
    @dataclass(frozen=True)
    class Either:
        value: int | str = option(1, "One of two types.")

    def show(settings: Any) -> None: ...

    show.__annotations__["settings"] = Either
    with pytest.raises(PluginError, match="of which no option can be made: use one type or None"):
        command_with(Either)(show)
