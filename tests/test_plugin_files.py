"""Plugins in one file, as `--plugin` loads it, and recipes whose target is a function: written from the documentation,
and what is wrong in them said in one sentence.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import HOOK, Cli

import tl_capacity
from tl_capacity import Measurement, hookimpl, plugins, recipe
from tl_capacity.errors import PluginError
from tl_capacity.interfaces import Concept, LabelledText, Recipe
from tl_capacity.models.loading import load_model
from tl_capacity.probing import load_concepts
from tl_capacity.text.streams import documents

DOCS = Path(__file__).parent.parent / "docs"
V0_1 = Path(__file__).parent / "fixtures" / "v0_1"
Plugin = Callable[..., Path]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    """`plugin(code, name="mine.py")` writes a plugin file into the working directory; what it registers is taken out
    again.
    """
    monkeypatch.chdir(tmp_path)
    manager = plugins.plugin_manager()
    before = {name for name, _ in manager.list_name_plugin()}

    def write(code: str, name: str = "mine.py") -> Path:
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
        return path

    yield write
    for name in [name for name, _ in manager.list_name_plugin() if name not in before] + [*manager.failures]:
        manager.unregister(name=name)


@pytest.fixture
def command(cli: Cli) -> Cli:
    """As `cli`, but each command is a process of its own as far as plugin files go."""

    def run(*arguments: object) -> tuple[int, str, str]:
        said = cli(*arguments)
        manager = plugins.plugin_manager()
        for name, _ in manager.list_name_plugin():
            if name.endswith(".py"):
                manager.unregister(name=name)
        return said

    return run


def one_file(page: str = "plugins.md", holding: str = "class ThirdMoment") -> str:
    """A plugin file of the documentation, from its text alone."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if holding in block)
    return str(code)


def test_the_file_of_the_documentation_does_all_that_it_says(command: Cli, setup: Path, plugin: Plugin) -> None:
    mine = plugin(one_file())
    texts = [json.loads(line)["text"] for line in (setup / "text.jsonl").read_text().splitlines()[:60]]
    Path("letters.csv").write_text("letter\n" + "\n".join(texts) + "\n")
    code, out, _ = command("--plugin", mine, "plugins", "--json")
    listed = {(row["kind"], row["name"]) for row in json.loads(out)["plugins"] if row["from"] == "mine.py"}
    assert code == 0
    assert {kind for kind, _ in listed} == {
        "importance estimator",
        "capacity law",
        "token source",
        "concept",
        "recipe",
    }

    measure = ["measure", "--model", setup / "model", "--sae", setup / "sae", "--source", "letters.csv", "--out", "out"]
    code, _, err = command("--plugin", mine, *measure, "--importance", "third_moment", "--tokens", 4000)
    assert code == 0, err
    hook = Measurement.load("out")[HOOK]
    model, sae = load_model(str(setup / "model")), tl_capacity.load_sae(str(setup / "sae"))[1]
    cubes, tokens = np.zeros(sae.cfg.d_sae), 0
    for text in texts:
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), 31):
            row = torch.tensor([[0, *ids[start : start + 31]]])
            with torch.no_grad():
                stream = model.model(row, output_hidden_states=True).hidden_states[2][0, 1:]
                cubes += (sae.encode(stream).double().abs() ** 3).sum(0).numpy(force=True)
            tokens += len(stream)
            if tokens >= hook.summary.n_tokens:
                break
        if tokens >= hook.summary.n_tokens:
            break

    code, out, err = command(
        "--plugin", mine, "floor", "out", "--widths", "8,16", "--importance", "third_moment", "--law", "in_proportion",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert tokens == hook.summary.n_tokens
    alive = np.sort((cubes / tokens)[hook.summary.alive])[::-1]
    for floor in json.loads(out):
        kept = len(alive) * floor["width"] // 32
        assert floor["features_kept"] == kept
        assert floor["predicted_floor"] == pytest.approx(alive[kept:].sum(), rel=1e-4)
        assert floor["caveat"] == "knows nothing of superposition; for comparison"

    english = Path(shutil.copytree(setup / "model", "english"))
    tokenizer = (english / "tokenizer.json").read_text()
    for word, instead in (("w2", "Hello,"), ("w3", "Goodbye,"), ("w4", "number")):
        tokenizer = tokenizer.replace(f'"{word}"', f'"{instead}"')
    (english / "tokenizer.json").write_text(tokenizer)
    code, _, err = command(
        "--plugin", mine, "run", "probe", "--model", english, "--hook", HOOK, "--concepts", "farewell",
        "--context", 16, "--no-baselines", "--out", "farewell",
    )  # fmt: skip
    assert code == 0, err
    assert {row["concept"] for row in json.loads(Path("farewell/probes.json").read_text())["probes"]} == {"farewell"}

    code, out, err = command("--plugin", mine, "run", "kept", "out", "--widths", "8,16", "--law", "in_proportion")
    assert code == 0, err
    assert out == "".join(f"{HOOK}, width {w}: {len(alive) * w // 32}\n" for w in (8, 16))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked", "few_replicates")
def test_a_predictor_of_the_documentation_is_a_candidate(command: Cli, plugin: Plugin) -> None:
    mine = plugin(one_file("floor-predictors.md", "class ImportanceAtTheEdge"), "edge.py")
    decompose = ("decompose", V0_1 / "measurement", V0_1 / "floors" / "distillation", "--max-fvu", "inf", "--json")
    code, out, err = command("--plugin", mine, *decompose)
    assert code == 0, err
    found = json.loads(out)
    candidates = {candidate["name"]: candidate for candidate in found["candidates"]}
    edges = [candidate for name, candidate in candidates.items() if name.startswith("edge, ")]
    assert {candidate["kind"] for candidate in edges} == {"prediction"}
    assert {candidate["constants"] for candidate in edges} >= {1, 2, 3}
    floors = [student for student in found["observed"] if student["start"] != "teacher"]
    x = np.array([float(student["width"]) ** -2 for student in floors])
    y = np.array([student["last_tenth"] for student in floors])
    factor, line = candidates["1/d², B = 0"], candidates["1/d²"]
    assert {factor["kind"], line["kind"]} == {"rival"}
    assert factor["C"]["value"] == pytest.approx((x @ y) / (x @ x))
    assert (line["C"]["value"], line["B"]["value"]) == pytest.approx(tuple(np.polyfit(x, y, 1)))
    broken = plugin(mine.read_text().replace("width**-2", 'float("nan")'), "broken.py")
    code, out, err = command("--plugin", broken, *decompose)
    assert (code, out) == (2, "")
    assert err == (
        "error: the floor predictor '1/d²' gives nan at width 2, but a finite number of at least 0 is needed: fix it\n"
    )


def test_a_measurement_whose_estimator_is_not_loaded_says_so(command: Cli, setup: Path, plugin: Plugin) -> None:
    mine = plugin(one_file())
    measure = ["measure", "--model", setup / "model", "--sae", setup / "sae", "--source", setup / "text.jsonl"]
    command("--plugin", mine, *measure, "--importance", "third_moment", "--tokens", 2000, "--out", "out")
    for verb in (["floor", "out", "--widths", "8"], ["plan", "out", "--keep", "0.9"]):
        code, out, err = command(*verb, "--importance", "third_moment")
        assert (code, out) == (2, "")
        assert err == (
            f"error: no loaded plugin has the importance estimator 'third_moment'; {HOOK} was measured with"
            " 'third_moment', whose plugin is not loaded: pass its file, as tl-capacity --plugin FILE …, or register it"
            " in the session\n"
        )
    _, _, err = command("floor", "out", "--widths", "8", "--importance", "second_moments")
    assert "has the importance estimator 'second_moments'; " in err
    assert "was measured with 'third_moment', whose plugin is not loaded" in err
    assert command("floor", "out", "--widths", "8")[0] == 0


RECIPE = """
from dataclasses import dataclass
from pathlib import Path
from tl_capacity import hookimpl
from tl_capacity.interfaces import Recipe
from tl_capacity.recipe import option

@dataclass(frozen=True)
class Config:
    number: int = option(1, "What to double.")

def main(config: Config) -> None:
    \"\"\"Double a number.\"\"\"
    print(TIMES * config.number)

TIMES = 2

@hookimpl
def register_recipes(register):
    register(Recipe("double", summary="Twice a number", target=TARGET))
"""


@pytest.mark.parametrize("target", ["main", "'mine:main'", "f'{__name__}:main'"])
@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"], ids=["now", "later"])
def test_a_recipe_in_a_plugin_file(command: Cli, plugin: Plugin, target: str, future: str) -> None:
    mine = plugin(future + RECIPE.replace("TARGET", target))
    assert command("--plugin", mine, "run", "double", "--number", 21)[:2] == (0, "42\n")
    code, out, _ = command("--plugin", mine.resolve(), "run", "double", "--help")
    assert code == 0
    assert "Double a number." in out
    assert "What to double." in out
    assert "Twice a number" in command("--plugin", mine, "run")[1]


@pytest.mark.parametrize(
    ("stops", "code", "says"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted; what was saved is whole"),
        ("raise SystemExit(3)", 3, ""),
        ("import typer; raise typer.Exit(4)", 4, ""),
    ],
)
def test_a_recipe_that_is_stopped_ends_with_its_own_code(
    command: Cli, plugin: Plugin, stops: str, code: int, says: str
) -> None:
    mine = plugin(RECIPE.replace("TARGET", "'mine:main'").replace("    print(", f"    {stops}\n    print("))
    ended, out, err = command("--plugin", mine, "run", "double", "--number", 2)
    assert (ended, out) == (code, "")
    assert says in err


def test_two_files_of_one_name_each_run_their_own_recipe(cli: Cli, plugin: Plugin) -> None:
    first = plugin(RECIPE.replace("TARGET", "'mine:main'"))
    other = RECIPE.replace("TARGET", "'mine:main'").replace('"double"', '"triple"').replace("TIMES = 2", "TIMES = 3")
    other = other.replace("number: int", "numero: int").replace("config.number", "config.numero")
    second = plugin("from __future__ import annotations\n" + other, "folder/mine.py")
    assert cli("--plugin", first, "--plugin", second, "run", "triple", "--numero", 2)[:2] == (0, "6\n")
    assert cli("run", "double", "--number", 2)[:2] == (0, "4\n")


def test_a_recipe_of_a_notebook_cell(capsys: pytest.CaptureFixture[str]) -> None:
    cells = {"__name__": "__main__"}
    exec(RECIPE.replace("TARGET", "main"), cells)

    class Cell:
        register_recipes = staticmethod(hookimpl(cells["register_recipes"]))  # type: ignore[arg-type]

    plugins.register_plugin(Cell(), "cell")
    try:
        function = recipe.load(plugins.plugins().recipes["double"])
        assert function is cells["main"]
        recipe.run(function, ["--number", "4"])
    finally:
        plugins.unregister_plugin("cell")
    assert capsys.readouterr().out == "8\n"


NO_DATACLASS = "has a function that takes no dataclass in line LINE of MINE: write it as def main(config: Config)"
BAD_MAINS = {
    "no argument": ("def main(): ...", NO_DATACLASS),
    "no annotation": ("def main(config): ...", NO_DATACLASS),
    "an int": ("def main(config: int): ...", NO_DATACLASS),
    "a dataclass or none": ("def main(config: 'Config | None'): ...", NO_DATACLASS),
    "an unknown name": (
        "def main(config: 'Missing'): ...",
        "has a function whose types cannot be read in line LINE of MINE (name 'Missing' is not defined): write them",
    ),
    "a number": (
        "main = 3",
        "has the target 3, which is not a function: give a function of a frozen dataclass, or its place",
    ),
}


@pytest.mark.parametrize(("main", "says"), BAD_MAINS.values(), ids=BAD_MAINS)
@pytest.mark.parametrize("target", ["main", "'mine:main'"])
@pytest.mark.usefixtures("unchecked")
def test_a_recipe_whose_function_takes_no_dataclass(
    command: Cli, plugin: Plugin, main: str, says: str, target: str
) -> None:
    code = RECIPE.replace("TARGET", target).replace("@hookimpl", f"{main}\n\n@hookimpl")
    mine = plugin(code)
    status, out, err = command("--plugin", mine, "run", "double")
    assert (status, out) == (2, "")
    says = says.replace("MINE", str(mine.resolve())).replace("LINE", str(1 + code.splitlines().index(main)))
    assert err.startswith(f"error: the recipe 'double' {says}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("number: __import__('typing').Union[int, str] = option(1, '')", "Typer currently doesn't support Union types"),
        ("number: 'Missing' = option(1, '')", "name 'Missing' is not defined"),
    ],
)
def test_a_recipe_with_a_field_of_no_option(command: Cli, plugin: Plugin, field: str, says: str) -> None:
    code = RECIPE.replace("TARGET", "main").replace('number: int = option(1, "What to double.")', field)
    status, out, err = command("--plugin", plugin(code), "run", "double")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: the options of the recipe 'main' cannot be made ({says}): give each field of Config")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere:main", "No module named 'nowhere'"),
        ("mine:missing", "module 'tl_capacity_plugin_mine' has no attribute 'missing'"),
        ("mine", "module 'tl_capacity_plugin_mine' has no attribute ''"),
        (":main", "ValueError: Empty module name"),
        ("failing:main", "ZeroDivisionError: division by zero"),
        ("leaving:main", "SystemExit: 3"),
    ],
)
def test_a_recipe_that_cannot_be_loaded(
    command: Cli, plugin: Plugin, monkeypatch: pytest.MonkeyPatch, target: str, says: str
) -> None:
    plugin("1 / 0", "failing.py")
    plugin("raise SystemExit(3)", "leaving.py")
    monkeypatch.syspath_prepend(".")
    mine = plugin(RECIPE.replace("TARGET", repr(target)))
    code, out, err = command("--plugin", mine, "run", "double")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: the recipe 'double' cannot be loaded from {target} ({says}): install what it needs")
    assert err.count("\n") == 1


def fails() -> Iterator[LabelledText]:
    yield LabelledText("one", "a")
    raise KeyError("two")


def numbered() -> Iterator[Any]:
    yield LabelledText("one", "a")
    yield LabelledText("two", "b", document=2)  # type: ignore[arg-type]


WRONG_TEXTS = {
    "raises": (fails, r"failed in line \d+ of FILE \(KeyError: 'two'\): fix it, or choose another"),
    "raises at once": (
        lambda: 1 / 0,
        r"failed in line \d+ of FILE \(ZeroDivisionError: division by zero\): fix it, or choose another",
    ),
    "nothing": (
        lambda: None,
        r"failed in line \d+ of FILE \(TypeError: 'NoneType' object is not iterable\): fix it, or choose another",
    ),
    "tuples": (
        lambda: [("one", "a")],
        r"gives a tuple in line \d+ of FILE, as its text 1: its load must give LabelledText",
    ),
    "a number": (lambda: [LabelledText(1, "a")], r"gives a text that is a int in line \d+ of FILE, as its text 1"),  # type: ignore[arg-type]
    "a list": (lambda: [LabelledText("1", ["a"])], r"gives a label that is a list in line \d+ of FILE, as its text 1"),  # type: ignore[arg-type]
    "a document": (numbered, r"gives a document that is a int in line \d+ of FILE, as its text 2"),
}


@pytest.mark.parametrize(("load", "says"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
@pytest.mark.usefixtures("unchecked")
def test_a_concept_that_is_wrong_is_named_with_its_place(load: Any, says: str) -> None:
    class Concepts:
        @hookimpl
        def register_concepts(self, register: Callable[[Concept], None]) -> None:
            register(Concept("wrong", ("a", "b"), load))

    name = plugins.register_plugin(Concepts(), "wrong concepts")
    try:
        with pytest.raises(PluginError, match=f"^the concept 'wrong' {says.replace('FILE', re.escape(__file__))}"):
            load_concepts("wrong")
    finally:
        plugins.unregister_plugin(name)


def test_a_concept_of_a_plugin_file_that_is_wrong_is_one_sentence(command: Cli, plugin: Plugin, setup: Path) -> None:
    mine = plugin(
        "from tl_capacity import hookimpl\nfrom tl_capacity.interfaces import Concept\ndef load():\n"
        "    yield 'a', 'b'\n"
        "@hookimpl\ndef register_concepts(register):\n    register(Concept('pairs', ('a', 'b'), load))\n"
    )
    code, out, err = command(
        "--plugin",
        mine,
        "run",
        "probe",
        "--model",
        setup / "model",
        "--hook",
        HOOK,
        "--concepts",
        "pairs",
        "--out",
        "x",
    )
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: the concept 'pairs' gives a tuple in line 3 of {mine.resolve()}, as its text 1: its load"
    )
    assert err.count("\n") == 1


def test_plugins_shows_what_a_law_is_and_its_caveat(command: Cli) -> None:
    law = plugins.plugins().capacity_laws["equilibrium"]
    assert law.summary
    assert law.caveat
    listed = json.loads(command("plugins", "--json")[1])["plugins"]
    (row,) = (row for row in listed if row["name"] == "equilibrium")
    assert (row["summary"], row["caveat"]) == (law.summary, law.caveat)
    assert ["summary" in row for row in listed] == [True] * len(listed)
    assert [row["name"] for row in listed if "caveat" in row] == ["equilibrium", "proportional"]
    shown = " ".join(command("plugins")[1].replace("│", " ").split())
    assert law.summary in shown


def test_a_family_whose_rule_fails_is_named() -> None:
    from transformers import BloomConfig

    from tl_capacity.distillation.students import student_config
    from tl_capacity.interfaces import ModelFamily

    class Families:
        @hookimpl
        def register_model_families(self, register: Callable[[ModelFamily], None]) -> None:
            register(ModelFamily("bloom", ("bloom",), "transformer.h", student=lambda config, width: {}[width]))

    name = plugins.register_plugin(Families(), "bloom families")
    try:
        with pytest.raises(
            PluginError, match=rf"^the model family 'bloom' failed in line \d+ of {__file__} \(KeyError: 8"
        ):
            student_config(BloomConfig(), 8)
    finally:
        plugins.unregister_plugin(name)


def test_a_source_of_a_plugin_file_is_read(plugin: Plugin) -> None:
    plugins.load_plugin_file(plugin(one_file()))
    Path("two.csv").write_text('letter\n"a, b"\nc\n')
    assert list(documents("two.csv")) == ["a, b", "c"]
    assert Recipe("x", "y", one_file).target is one_file
