"""How the code is laid out: modules that can be read at one sitting, objects that keep their own fields to themselves,
and every package in what is installed.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"tl_capacity": "tl_capacity", "hooks": "tl_capacity.hooks", "recipes": "tl_capacity.recipes"}
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES = 450
OTHERS_OWN = {
    "_repr_html_": "IPython's name for how a result looks in a notebook, to be called by whoever shows it",
    "_dynamo": "torch has no public limit of how often a function is compiled",
    "_forward_hooks": "torch has no public way to ask whether a module has hooks",
}
"""Private names of other packages that may be used, and why."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_is_read_at_one_sitting(path: Path) -> None:
    lines = path.read_bytes().count(b"\n")
    assert lines <= MOST_LINES


def private(name: str) -> bool:
    """Whether a name is its owner's alone. Python's own names, such as `__name__`, are not."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def reaches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`(line, access)` of every private name of something else: `other._name` and `from other import _name`, but not
    `self._name` or `__name__`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
        if not isinstance(node, ast.Attribute) or node.attr in OTHERS_OWN or not private(node.attr):
            continue
        owner = node.value
        of_its_own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        of_its_base = isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        if not (of_its_own or of_its_base):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_nobody_reaches_into_another(path: Path) -> None:
    """An object's fields with an underscore are its own, and so are a module's."""
    assert not list(reaches(ast.parse(path.read_text(encoding="utf-8"))))


def test_reaches_are_found() -> None:
    code = "self._a; cls._b; super()._c; x.__dict__; other._d; self.other._e; f()._g; __file__\nfrom other import h, _i"
    assert [access for _, access in reaches(ast.parse(code))] == ["_i", "other._d", "self.other._e", "f()._g"]


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in its code, for type checkers as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("tl_capacity."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_capacity"):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in NAMES else str(node.module)


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


NAMES = {module_name(path) for path in MODULES}


def test_no_modules_import_one_another_in_a_circle() -> None:
    """The package itself, which offers what its rooms hold, is left out; every other import counts."""
    imports = {module_name(path): set(imported(path)) - {"tl_capacity"} for path in MODULES}
    TopologicalSorter({name: imports[name] for name in imports if name != "tl_capacity"}).prepare()


def test_every_package_is_installed() -> None:
    """A folder that the build does not list is missing from the wheel, though an editable install has it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(listed) == sorted(there)
