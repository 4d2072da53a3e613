"""The documentation: its Python runs, its links lead somewhere, its commands exist, and the help page says what the
command line says.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from check_reading import GENERATED, length, plain
from commands import CHILDREN, concept_of, parse
from markdown_it import MarkdownIt

from tl_capacity import plugins

ROOT = Path(__file__).parent.parent
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*OUTSIDE, *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
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
    manager = plugins.plugin_manager()
    before = {name for name, _ in manager.list_name_plugin()}
    yield
    for name, _ in manager.list_name_plugin():
        if name not in before:
            plugins.unregister_plugin(name)


@pytest.mark.slow
@pytest.mark.parametrize("page", having("python"))
@pytest.mark.usefixtures("own_plugins", "hub")
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


@pytest.mark.parametrize(
    "page",
    [
        *(pytest.param(page, id=page.stem) for page in PAGES),
        *(pytest.param(p, id=f"results/{p.stem}") for p in RESULTS),
    ],
)
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


def contents() -> dict[str, list[str]]:
    """The pages under each heading of the contents page."""
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {section.partition("\n")[0]: LINK.findall(section) for section in sections}


def test_every_page_is_in_the_contents_once() -> None:
    listed = [link for links in contents().values() for link in links]
    pages = {page.name for page in PAGES if page not in OUTSIDE} - {"index.md"}
    results = {f"results/{page.name}" for page in RESULTS}
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert sorted(listed) == sorted(pages | results | notebooks)


def test_pages_are_ordered_by_their_kind() -> None:
    kinds = contents()
    assert list(kinds) == ["Tutorial", "How to", "Concepts", "Reference", "Results"]
    assert {"use-gpt2.md", "use-gemma-scope.md", "use-pythia.md", "use-offline.md", "many-machines.md"} <= set(
        kinds["How to"]
    )


def test_a_page_is_a_concept_if_its_name_says_so() -> None:
    concepts = {page.name for page in PAGES if page.name.startswith("about-")}
    assert concepts == set(contents()["Concepts"])


def test_code_has_one_heading() -> None:
    """`In Python`, wherever a page says how to do in code what it says of commands."""
    headings = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert "## In Python" in headings
    assert not [line for line in headings if re.fullmatch(r"#+ In (a session|code|a notebook)", line)]


def test_no_page_of_results_has_much_text() -> None:
    """Code, and what scripts and commands write, is not counted. Other kinds are held to `check_reading`."""
    written = {"results/toy.md"}
    long = {
        name: n
        for name in contents()["Results"]
        if name.endswith(".md") and name not in written and (n := words(ROOT / "docs" / name)) > 1500
    }
    assert not long


def words(page: Path) -> int:
    """The words of a page's text and tables."""
    text = GENERATED.sub("", page.read_text(encoding="utf-8"))
    tokens = MarkdownIt().enable("table").parse(text)
    return sum(length(plain(token)) for token in tokens if token.type == "inline")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's shell blocks that is of `tl-capacity`, `make` or the environment's own."""
    for _, content in blocks(page, "sh", "console"):
        for line in content.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ ").rstrip("& "), comments=True)
            if words and (words[0] in ("tl-capacity", "make") or words[0].startswith(".venv/")):
                yield words


def make_targets() -> list[str]:
    return re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_what_a_contributor_is_told_to_make_can_be_made() -> None:
    """In sentences too: `make help-pages`."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"))
    told = set(re.findall(r"\bmake ([a-z][\w-]*)(?=`|\n|  )", text))
    assert {"check", "fuzz", "help-pages"} <= told <= set(make_targets())


@pytest.mark.parametrize("page", having("sh", "console"))
def test_commands_exist(page: Path) -> None:
    for program, *arguments in commands(page):
        if program == "make":
            assert arguments[0] in make_targets()
        elif program.startswith(".venv/"):
            assert (ROOT / arguments[0]).is_file(), arguments
        else:
            parse(arguments)


SHORT = {
    "measure": "--tokens 2000 --max-fvu inf",
    "doctor": "--tokens 2000",
    "floor": "--max-fvu inf",
    "observe": "--tokens 2000",
    "report": "--snippet-tokens 500",
    "run check-importance": "--rows 2 --latents 3 --context 32",
    "run distill": "--tokens 2000 --heldout-tokens 500 --evaluations 2 --context 32",
    "run probe": "--context 32 --no-baselines",
    "run placement": "--tokens 2000 --heldout-tokens 500 --evaluations 2 --context 32 --judge-tokens 20000",
    "run pythia-floor": "--tokens 2000 --measure-tokens 1000 --heldout-tokens 500 --evaluations 2 --context 32",
    "run recover": "--tokens 20000",
    "run rivals": "--tokens 300 --fit-tokens 500 --iterations 2",
    "run toy-sweep": "--steps 3 --seeds 1",
    "run train-sae": "--tokens 2000 --heldout-tokens 500 --d-sae 128",
}
"""What is written behind a command to make it short: of an option that is given twice, the last counts."""

INSTEAD = {"--concepts embedded": "--concepts question"}
"""What no further option makes short, all concepts, and what is: one."""

LEFT_OUT = {
    r"^make ": "minutes of what the pages' own commands do, or the tests themselves",
    r"^\.venv/bin/pytest": "the tests themselves",
    r"^\.venv/bin/python benchmarks": "minutes of a machine that does nothing else",
    r"^pip install": "an installation",
    r"^srun ": "needs a Slurm cluster of several machines",
    r"--rdzv-endpoint host-a": "needs a second machine that knows the first by its name",
    r"gpt2|EleutherAI/|google/|NeelNanda/": "a name on the hub, and tests have no network",
    r"report runs/gemma": "what a command with a name on the hub would have written",
    r"smollm2": "the package that holds its weights is not installed",
    r"run embedded-(teacher|concepts)": "downloads its sources, and trains for hours",
}
"""Commands that are not run, and why."""

EARLIER = {
    "doctor": ["runs/embedded"],
    "check-prediction": ["runs/embedded", "runs/students"],
    "effective": ["runs/embedded", "runs/students"],
    "estimators": ["explained.py"],
    "families": ["toy_family.py", "toy", "toy-sae", "texts.jsonl"],
    "floor-predictors": ["edge.py", "runs/embedded", "runs/students"],
    "keep": ["features.json"],
    "large-models": ["model", "sae", "texts.jsonl"],
    "many-machines": ["model", "sae", "texts.jsonl"],
    "observe": ["my-model", "runs/students"],
    "plan": ["runs/demo", "runs/students"],
    "plugins": ["my_plugin.py", "mine.py", "letters.csv", "runs/embedded"],
    "predict": ["runs/embedded", "curve.json"],
    "probe": ["runs/embedded", "runs/students", "my-model", "reviews.jsonl"],
    "README": ["my-model", "my-sae", "my-texts.jsonl"],
    "use-offline": ["my-model", "my-sae", "my-texts.jsonl"],
    "shards": ["model", "sae", "texts.jsonl"],
    "report": ["runs/students", "runs/recover", "runs/pythia-floor"],
    "sources": ["notes.txt"],
}
"""What a page takes for granted: the reader's own files, and results of other pages."""

ALTERNATIVES = ("many-machines", "large-models", "resume", "shards")
"""Pages that write the same result in several ways, of which a reader follows one: only --resume goes on from what the
same command wrote before.
"""

EMBEDDED = ROOT / "hooks" / "embedded" / "model"
FILES = {
    "explained.py": ("estimators", "ImportanceEstimator"),
    "mine.py": ("plugins", "ThirdMoment"),
    "edge.py": ("floor-predictors", "ImportanceAtTheEdge"),
    "my_plugin.py": ("plugins", "MeanActivation"),
    "toy_family.py": ("families", "Toy"),
}
"""Files that are made of a page's Python blocks: those that hold such a class."""
KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM

AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyModel)
"""
"""What makes transformers know the toy architecture, as `--model` with a folder needs."""
SAVED = """
from toy_family import *
from sae_lens import TopKSAE, TopKSAEConfig

ToyModel(ToyConfig(vocab_size=64)).save_pretrained("toy")
TopKSAE(TopKSAEConfig(d_in=16, d_sae=64, k=4)).save_model("toy-sae")
"""


def shell_commands(page: Path) -> Iterator[str]:
    """Every command of a page's shell blocks, in order; loops are unrolled, and so is a job array."""
    for _, content in blocks(page, "sh", "console"):
        lines = content.replace("\\\n", " ")
        if array := re.search(r"^#SBATCH --array=0-(\d+)$", lines, re.MULTILINE):
            lines = "".join(lines.replace("$SLURM_ARRAY_TASK_ID", str(task)) for task in range(int(array[1]) + 1))
        lines = re.sub(
            r"^for (\w+) in (.*); do\n(.*?)^done\n",
            lambda loop: "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()),
            lines,
            flags=re.MULTILINE | re.DOTALL,
        )
        for line in lines.splitlines():
            words = line.partition("  # ")[0].removeprefix("$ ").rstrip("& ").strip()
            if words and not words.startswith(("#", "export ")) and words != "wait":
                yield words


def shortened(arguments: list[str]) -> list[str]:
    """Arguments of `tl-capacity` with what makes the command short behind them, on the CPU."""
    if "--help" in arguments:
        return arguments
    at = 2 if arguments[0] == "--plugin" else 0
    name = " ".join(arguments[at : at + 2]) if arguments[at] == "run" else arguments[at]
    return [*arguments, *SHORT.get(name, "").split(), *(["--device", "cpu"] if "--device" in arguments else [])]


def run_into(arguments: list[str], folder: Path, said: Path) -> None:
    """What a child process does: run the command line in a folder, and write what it says to a file."""
    import torch

    from tl_capacity.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        main(arguments)


def run_command(command: str, folder: Path) -> tuple[int | None, str]:
    """Run a command of a page in a folder; returns the exit code, and what was said."""
    for long, short in INSTEAD.items():
        command = command.replace(long, short)
    program, *words = shlex.split(command)
    if program == "tl-capacity":
        said = folder / "said.txt"
        child = CHILDREN.Process(target=run_into, args=(shortened(words), folder, said))
        child.start()
        child.join()
        return child.exitcode, said.read_text()
    module = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}[program]
    launched = words.index("tl_capacity") + 1
    launch = re.sub(r"(--num_processes|--nproc-per-node) 4", r"\1 2", " ".join(words[:launched])).split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", module, *launch, *shortened(words[launched:])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def earlier(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that pages take for granted."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("earlier")
    for name, of in (
        ("model", "model"),
        ("sae", "sae"),
        ("my-sae", "sae"),
        ("texts.jsonl", "text.jsonl"),
        ("my-texts.jsonl", "text.jsonl"),
    ):
        (folder / name).symlink_to(setup / of)
    (folder / "reviews.jsonl").symlink_to(concept_of(setup))
    (folder / "notes.txt").symlink_to(ROOT / "README.md")
    (folder / "curve.json").write_text(
        json.dumps({"sorted_importance": [1 / rank for rank in range(1, 5001)], "alpha": 0.99})
    )
    few = {"hook": "blocks.3.hook_resid_post", "features": [716, 772, 1682]}
    (folder / "features.json").write_text(json.dumps(few))
    letters = [f"{'Hello' if i % 2 else 'Goodbye'}, this is the letter of number {i}." for i in range(300)]
    (folder / "letters.csv").write_text("letter\n" + "".join(f'"{letter}"\n' for letter in letters))
    # One that has a block 12, and knows the English words in which concepts are told.
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder / "my-model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 13, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EMBEDDED, **sizes)).float().save_pretrained(
        folder / "my-model"
    )
    for name, (page, part) in FILES.items():
        code = [
            content
            for _, content in blocks(ROOT / "docs" / f"{page}.md", "python")
            if re.search(rf"^class .*{part}", content, re.MULTILINE)
        ]
        (folder / name).write_text("\n".join(code) + (KNOWN if page == "families" else ""))
    subprocess.run([sys.executable, "-c", SAVED], cwd=folder, check=True)
    for path in (setup / "model").glob("tokenizer*"):
        shutil.copy(path, folder / "toy")
    for command in (
        "measure --model embedded --out runs/embedded",
        "run distill --teacher embedded --widths 16,32,64 --out runs/students",
        "run recover runs/embedded runs/students --out runs/recover",
        "run pythia-floor --preset quick --widths 16,32 --out runs/pythia-floor",
    ):
        exit_code, said = run_command(f"tl-capacity {command}", folder)
        assert exit_code == 0, said
    shutil.copytree(folder / "runs" / "embedded", folder / "runs" / "demo")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", having("sh", "console"))
def test_commands_run(page: Path, earlier: Path, tmp_path: Path) -> None:
    """In the page's order, in a folder of their own, with fewer tokens; the exit code is 0."""
    for name in EARLIER.get(page.stem, []):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(earlier / name)
    failed, written = [], {}
    for command in shell_commands(page):
        if any(re.search(pattern, command) for pattern in LEFT_OUT):
            continue
        out = re.search(r"--out (\S+)", command)
        if page.stem in ALTERNATIVES and out:
            if "--resume" not in command or written.get(out[1]) != command.replace(" --resume", ""):
                shutil.rmtree(tmp_path / out[1], ignore_errors=True)
            written[out[1]] = command.replace(" --resume", "")
        code, said = run_command(command, tmp_path)
        if code != 0:
            failed.append(f"{command}\n{said[-2000:]}")
    assert not failed, "\n".join(failed)


def test_what_is_left_out_is_there() -> None:
    found = [command for page in PAGES for command in shell_commands(page)]
    assert all(any(re.search(pattern, command) for command in found) for pattern in LEFT_OUT)
    assert {shlex.split(command)[0] for command in found} == {
        "tl-capacity",
        "make",
        "pip",
        ".venv/bin/pytest",
        ".venv/bin/python",
        "srun",
        "accelerate",
        "torchrun",
    }


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


TELL_WHAT_TO_DO = ("use-gpt2.md", "use-offline.md")
"""Pages with a table of refusals as a reader sees them, with a value in each."""


def test_the_refusals_that_are_listed_exist() -> None:
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("errors.md", *TELL_WHAT_TO_DO)}
    listed = [
        re.sub(r"\d+|'OWNER/NAME'|…", "{…}", fragment) if name in TELL_WHAT_TO_DO else fragment
        for name, page in pages.items()
        for fragment in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    ]
    sentences = [
        sentence
        for folder in ("tl_capacity", "hooks", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        for sentence in texts_of(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(listed) > 30
    assert not [fragment for fragment in listed if not any(fragment in sentence for sentence in sentences)]


def texts_of(tree: ast.AST) -> list[str]:
    """The texts in some code but for docstrings, those written in pieces put together, with `{…}` for a value."""
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [
        "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{…}" for part in getattr(node, "values", [node])
        )
        for node in ast.walk(tree)
        if node not in docstrings
        and (isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)))
    ]


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write_help() -> Any:
    return script("write_help")


@pytest.fixture
def write_fidelity() -> Any:
    return script("write_fidelity")


def test_the_help_page_is_current(write_help: Any) -> None:
    assert write_help.main(["--check"]) == 0, "run `python docs/write_help.py`"


def test_a_stale_help_page_is_noticed(
    write_help: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_help, "PAGE", tmp_path / "help.md")
    assert write_help.main(["--check"]) == 1
    assert write_help.main([]) == 0
    assert write_help.main(["--check"]) == 0
    page = tmp_path / "help.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--widths", "--width"), encoding="utf-8")
    assert write_help.main(["--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_the_fidelity_page_is_current(write_fidelity: Any) -> None:
    assert write_fidelity.main(["--check"]) == 0, "run `python docs/write_fidelity.py`"


def test_the_page_of_hook_points_is_current() -> None:
    assert script("write_taps").main(["--check"]) == 0, "run `python docs/write_taps.py`"


MARKED = """
@pytest.mark.fidelity(source="any", says="`z`", obeyed="a | b")
class TestOne:
    @pytest.mark.fidelity(source="SAELens", says="`k`", obeyed="kept")
    @pytest.mark.slow
    def test_two(self): ...

@pytest.mark.fidelity(source="SAELens", says="`k`", obeyed="kept")
def test_three(): ...
"""
TABLE = r"""| SAELens | `k` | kept | [`test_three`](../tests/test_it.py), [`test_two`](../tests/test_it.py) |
| any | `z` | a \| b | [`TestOne`](../tests/test_it.py) |
"""


def test_marks_are_collected(write_fidelity: Any, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(MARKED)
    assert write_fidelity.table(write_fidelity.all_marks(tmp_path / "tests")).split("|---|\n")[1] == TABLE


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("pytestmark = pytest.mark.fidelity(source='a', says='b', obeyed='c')", "test_it.py:1 .* stands on no test"),
        ("@pytest.mark.fidelity(source='a', says='b')\ndef test(): ...", "write source, says, obeyed, each a text"),
        ("@pytest.mark.fidelity(source='a', says='b', obeyed=c)\ndef test(): ...", "each a text"),
        ("@pytest.mark.fidelity('a', 'b', 'c')\ndef test(): ...", "each a text"),
    ],
)
def test_a_mark_that_cannot_be_read(write_fidelity: Any, tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "test_it.py").write_text(code)
    with pytest.raises(write_fidelity.MarkError, match=says):
        write_fidelity.all_marks(tmp_path)
