"""The documentation: its Python runs, its links lead somewhere, its commands exist, and the help page says what the command line says."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tl_capacity import plugins, recipe
from tl_capacity.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """`(line number, content)` of a page's fenced blocks in one of some languages."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found[1] in languages:
            yield text[: found.start(2)].count("\n"), found[2]


def having(*languages: str) -> list[Any]:
    return [pytest.param(page, id=page.stem) for page in PAGES if any(blocks(page, *languages))]


@pytest.fixture
def own_plugins() -> Iterator[None]:
    """Whatever a page registers is taken out again."""
    manager = plugins._manager()[0]
    before = {name for name, _ in manager.list_name_plugin()}
    yield
    for name, _ in manager.list_name_plugin():
        if name not in before:
            plugins.unregister_plugin(name)


@pytest.mark.parametrize("page", having("python"))
@pytest.mark.usefixtures("own_plugins")
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_contents() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert listed == ({page.name for page in PAGES[1:]} - {"index.md"}) | notebooks


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `tl-capacity …` and `make …` in a page's shell blocks."""
    for _, content in blocks(page, "sh", "console"):
        for line in content.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ ").rstrip("& "), comments=True)
            if words and words[0] in ("tl-capacity", "make"):
                yield words


@pytest.mark.parametrize("page", having("sh", "console"))
def test_commands_exist(page: Path) -> None:
    for program, *arguments in commands(page):
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), arguments
        else:
            parse(arguments)


def parse(arguments: list[str]) -> None:
    """Have the command line take the arguments, without doing what they say.

    Raises:
        Exception: typer's own, where a command or an option does not exist or has no such value.
    """
    command: Any = typer.main.get_command(app)
    for each in (command, *command.commands.values()):
        each.callback = lambda **_: None
    command.main(arguments, prog_name="tl-capacity", standalone_mode=False)
    if arguments[0] == "run" and len(arguments) > 1:
        function = recipe.load(plugins.plugins().recipes[arguments[1]])

        def nothing(config: Any) -> None: ...

        nothing.__annotations__ = typing.get_type_hints(function)
        recipe.run(nothing, arguments[2:], arguments[1])


@pytest.mark.parametrize(
    "wrong",
    [
        "measur --model embedded",
        "measure --model embedded",
        "budget runs/x --width 3",
        "floor runs/x",
        "run train-sae --tokens many",
        "run train",
        "--plugins x plugins",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|invalid|a valid|there is no"):
        parse(shlex.split(wrong))


def test_the_refusals_that_are_listed_exist() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    source = "".join(path.read_text(encoding="utf-8") for folder in ("tl_capacity", "hooks", "recipes") for path in (ROOT / folder).rglob("*.py"))
    assert len(listed) > 30
    assert not [fragment for fragment in listed if fragment not in source]


@pytest.fixture
def write_help() -> Any:
    spec = importlib.util.spec_from_file_location("write_help", ROOT / "docs" / "write_help.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_help_page_is_current(write_help: Any) -> None:
    assert write_help.main(["--check"]) == 0, "run `python docs/write_help.py`"


def test_a_stale_help_page_is_noticed(write_help: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(write_help, "PAGE", tmp_path / "help.md")
    assert write_help.main(["--check"]) == 1
    assert write_help.main([]) == 0
    assert write_help.main(["--check"]) == 0
    page = tmp_path / "help.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--widths", "--width"), encoding="utf-8")
    assert write_help.main(["--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
