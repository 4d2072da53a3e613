"""Plugins: what is found through entry points, clashes, failures that leave the rest working, misspelt hooks, and an
estimator with a state of its own.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli, arguments

import tl_capacity
from tl_capacity import hookimpl, plugins
from tl_capacity.errors import PluginError
from tl_capacity.interfaces import FeatureSums, ImportanceEstimator
from tl_capacity.results.sums import merge_sums
from tl_capacity.text.streams import TokenBatch

CORE = Path(tl_capacity.__file__).parent


class Largest(ImportanceEstimator):
    """Σ |z|³ per feature: needs a state of its own, so that it must be named when measuring."""

    name = "cubed"
    unit = "latent³"

    def start(self, sae: Any, groups: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {"cubes": torch.zeros(groups, sae.W_dec.shape[0], dtype=torch.float64, device=device)}

    def update(self, state: dict[str, torch.Tensor], batch: Any) -> None:
        state["cubes"].index_put_((batch.groups, batch.features), batch.values.abs() ** 3, accumulate=True)

    def compute(self, sums: FeatureSums) -> np.ndarray[Any, Any]:
        return sums.state["cubes"] / sums.tokens


@pytest.fixture
def registered() -> Any:
    """Registers plugins and takes them out again, whatever happens."""
    names: list[str] = []

    def register(plugin: object) -> str:
        names.append(plugins.register_plugin(plugin, f"test-{len(names)}"))
        return names[-1]

    yield register
    for name in names:
        plugins.unregister_plugin(name)


def estimator_plugin(*estimators: ImportanceEstimator) -> object:
    class Plugin:
        @hookimpl
        def register_importance_estimators(self, register: Callable[[ImportanceEstimator], None]) -> None:
            for estimator in estimators:
                register(estimator)

    return Plugin()


def test_built_ins_come_through_entry_points() -> None:
    found = plugins.plugins()
    assert not found.failures
    assert {"second_moment", "decoder_weighted", "firing_rate"} <= set(found.importance_estimators.items)
    assert {"compressed_sensing", "equilibrium", "proportional"} <= set(found.capacity_laws.items)
    assert {"importance", "splice", "rank_bound", "1/d"} <= set(found.floor_predictors.items)
    assert found.importance_estimators.origins["second_moment"] == "importance"
    assert {"embedded", "smollm2-135m"} <= set(found.models.items)
    assert {"embedded-teacher", "train-sae"} <= set(found.recipes.items)


def test_the_core_imports_no_plugin() -> None:
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(f"{name}.".startswith(("tl_capacity.hooks.", "tl_capacity.recipes.")) for name in names), (
                path.relative_to(CORE)
            )


def test_the_core_names_no_item_of_a_plugin() -> None:
    """Concepts and some floor predictors are left out: their names are everyday words, such as `law`, which the core's
    own JSON has too. So are the predictors that the core's own runs compute.
    """
    found = plugins.plugins()
    registries = (
        found.importance_estimators,
        found.capacity_laws,
        found.model_families,
        found.models,
        found.token_sources,
        found.floor_predictors,
    )
    words = {"importance", "naive", "splice", "constant"}
    computed = {predictor.name for predictor in found.floor_predictors if predictor.made_by.endswith("rivals")}
    built_in = {
        item.name
        for registry in registries
        for item in registry
        if vars(plugins.plugin_manager().get_plugin(registry.origins[item.name])).get("__name__", "").startswith("tl_")
    }
    built_in -= words | computed
    assert {"second_moment", "compressed_sensing", "gpt2", "embedded", "1/d"} <= built_in
    named = []
    for path in sorted(CORE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        named += [
            f"{path.relative_to(CORE)}:{node.lineno}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in built_in and id(node) not in docstrings
        ]
    assert not named


def test_a_name_clash_names_both_plugins(registered: Callable[[object], str]) -> None:
    other = Largest()
    other.name = "second_moment"
    registered(estimator_plugin(other))
    with pytest.raises(PluginError, match=r"'importance' and 'test-0' both register .* 'second_moment'"):
        plugins.plugins()


def test_the_default_is_what_the_built_in_plugins_say() -> None:
    found = plugins.plugins()
    assert found.importance_estimators.default.name == "second_moment"
    assert found.capacity_laws.named(None) is found.capacity_laws["compressed_sensing"]
    assert found.capacity_laws.named("equilibrium") is found.capacity_laws["equilibrium"]


def test_two_defaults_name_both_plugins(registered: Callable[[object], str]) -> None:
    other = Largest()
    other.is_default = True
    registered(estimator_plugin(other))
    with pytest.raises(
        PluginError,
        match="'importance' and 'test-0' both register a default importance estimator: set `is_default = False` in one",
    ):
        plugins.plugins()


def test_a_class_that_inherits_from_a_default_is_none(registered: Callable[[object], str]) -> None:
    class Halved(type(plugins.plugins().importance_estimators.default)):
        name = "halved"

    registered(estimator_plugin(Halved()))
    assert plugins.plugins().importance_estimators.default.name == "second_moment"
    assert plugins.plugins().importance_estimators["halved"].is_default


def test_no_default_is_one_sentence() -> None:
    registry = plugins.Registry[Any]("capacity law")
    with pytest.raises(PluginError, match=r"^no capacity law is the default: name one of \(none\), or register one"):
        registry.named(None)
    registry.add(plugins.plugins().capacity_laws["equilibrium"], "mine")
    with pytest.raises(PluginError, match="name one of equilibrium, or register one with `is_default = True`"):
        _ = registry.default


def test_what_the_plugin_manager_registers_is_seen_at_once() -> None:
    manager, before = plugins.plugin_manager(), plugins.plugins()
    name = manager.register(estimator_plugin(Largest()), "by-the-manager")
    try:
        assert "cubed" not in before.importance_estimators
        assert "cubed" in plugins.plugins().importance_estimators
    finally:
        manager.unregister(name=name)
    assert "cubed" not in plugins.plugins().importance_estimators


def test_two_plugins_of_one_name_are_named() -> None:
    class Other:
        """Has a name that is taken."""

    with pytest.raises(
        PluginError,
        match=(
            r"Other object .* cannot be registered as 'laws', because <module 'tl_capacity.hooks.laws' .* has that name"
        ),
    ):
        plugins.register_plugin(Other(), "laws")
    laws = plugins.plugin_manager().get_plugin("laws")
    with pytest.raises(PluginError, match="as 'more-laws', because it is registered as 'laws' already"):
        plugins.register_plugin(laws, "more-laws")
    assert "compressed_sensing" in plugins.plugins().capacity_laws


def test_two_packages_with_plugins_of_one_name_are_named(tmp_path: Path) -> None:
    for package in ("one", "two"):
        (tmp_path / f"{package}-1.dist-info").mkdir()
        (tmp_path / f"{package}-1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n"
        )
        (tmp_path / f"{package}-1.dist-info" / "entry_points.txt").write_text("[tl_capacity]\nsame = json\n")
    run = subprocess.run(
        [sys.executable, "-m", "tl_capacity", "plugins"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert (
        run.stderr == "error: the packages 'one' and 'two' both have a plugin named 'same': rename or uninstall one\n"
    )


def test_a_class_in_place_of_an_object_is_refused(registered: Callable[[object], str]) -> None:
    registered(estimator_plugin(Largest))  # type: ignore[arg-type]
    with pytest.raises(
        PluginError, match=r"'test-0' registers the class Largest itself: register an object of it, Largest\(\)"
    ):
        plugins.plugins()


@pytest.mark.parametrize("lacking", ["name", "unit"])
def test_an_estimator_without_a_name_or_a_unit_is_refused(
    neox: Any, make_sae: Any, registered: Callable[[object], str], lacking: str
) -> None:
    class Lacking(ImportanceEstimator):
        name, unit = "lacking", "latent"

        def compute(self, sums: FeatureSums) -> np.ndarray[Any, Any]:
            return sums.squares

    delattr(Lacking, lacking)
    says = f"a {lacking}: give it a `{lacking}` attribute$"
    with pytest.raises(PluginError, match=f"^plugin 'notebook:.*' registers a importance estimator without {says}"):
        tl_capacity.register_importance_estimator(Lacking)
    with pytest.raises(tl_capacity.CapacityError, match=f"^the importance estimator Lacking has no {says[2:]}"):
        tl_capacity.add_capacity_hooks(neox, {"blocks.1.hook_resid_post": make_sae()}, importance=[Lacking()])
    registered(estimator_plugin(Lacking()))
    with pytest.raises(PluginError, match=f"'test-0' registers a importance estimator without {says}"):
        plugins.plugins()


def test_a_hook_with_another_argument_is_an_error() -> None:
    class Different:
        @hookimpl
        def register_recipes(self, registry: Any) -> None: ...

    with pytest.raises(
        PluginError,
        match=(
            r"'different' for hook 'register_recipes' .*\{'registry'\} are declared .*: a hook takes one argument,"
            r" `register`$"
        ),
    ):
        plugins.register_plugin(Different(), "different")
    assert "train-sae" in plugins.plugins().recipes


def test_a_misspelt_hook_is_an_error_with_the_right_spelling(registered: Callable[[object], str]) -> None:
    class Misspelt:
        @hookimpl
        def register_capacity_law(self, register: Callable[[Any], None]) -> None: ...

    registered(Misspelt())
    with pytest.raises(PluginError, match="did you mean register_capacity_laws"):
        plugins.plugins()


def test_a_plugin_that_fails_is_reported_and_the_rest_works(registered: Callable[[object], str]) -> None:
    class Failing:
        @hookimpl
        def register_capacity_laws(self, register: Callable[[Any], None]) -> None:
            raise RuntimeError("no such library")

    registered(Failing())
    found = plugins.plugins()
    assert found.failures == {"test-0": "RuntimeError in register_capacity_laws: no such library"}
    assert "compressed_sensing" in found.capacity_laws


def test_a_plugin_file_that_raises_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ImportError('needs something')")
    try:
        plugins.load_plugin_file(path)
        assert "needs something" in plugins.plugins().failures[str(path)]
    finally:
        plugins.unregister_plugin(str(path))
    assert str(path) not in plugins.plugins().failures


def test_a_plugin_file_adds_a_law(tmp_path: Path) -> None:
    path = tmp_path / "law.py"
    path.write_text(
        "from tl_capacity import CapacityLaw, hookimpl\nclass Half(CapacityLaw):\n    name = 'half'\n    def"
        " features_per_dimension(self, alpha, importance): return 0.5\n@hookimpl\ndef register_capacity_laws(register):"
        " register(Half())\n"
    )
    name = plugins.load_plugin_file(path)
    try:
        assert plugins.plugins().capacity_laws["half"].features_per_dimension(0.9, np.ones(1)) == 0.5
    finally:
        plugins.unregister_plugin(name)


CUBED = """
import torch
from tl_capacity import ImportanceEstimator, hookimpl

class Cubed(ImportanceEstimator):
    name, unit = "cubed", "latent³"

    def start(self, sae, groups, device):
        return {"cubes": torch.zeros(groups, len(sae.W_dec), dtype=torch.float64, device=device)}

    def update(self, state, batch):
        state["cubes"].index_put_((batch.groups, batch.features), batch.values.abs() ** 3, accumulate=True)

    def compute(self, sums):
        return RETURNED

@hookimpl
def register_importance_estimators(register):
    register(Cubed())
"""


@pytest.fixture
def plugin_file(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Writes plugin files, and takes what they register out again."""
    files: list[Path] = []

    def write(name: str, content: str) -> Path:
        files.append(tmp_path / name)
        files[-1].write_text(content, encoding="utf-8")
        return files[-1]

    yield write
    manager = plugins.plugin_manager()
    for path in files:
        if manager.has_plugin(str(path)) or str(path) in manager.failures:
            manager.unregister(name=str(path))


def test_an_estimator_from_a_file_beside_a_file_that_fails(
    cli: Cli, setup: Path, tmp_path: Path, plugin_file: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    broken = plugin_file("broken.py", "import tl_capacity\nraise RuntimeError('no such disk')\n")
    cubed = plugin_file("cubed.py", CUBED.replace("RETURNED", "sums.state['cubes'] / sums.tokens"))
    measure = arguments(setup, tmp_path / "out", "--importance", "cubed", "--widths", "4", tokens=600)
    code, out, _ = cli("--plugin", broken, "--plugin", cubed, *measure)
    assert code == 0
    assert f"the plugin file {broken} failed and was left out (RuntimeError: no such disk)" in caplog.text
    assert "latent³" in out
    measured = tl_capacity.Measurement.load(tmp_path / "out").hooks[0]
    squared, cubes = measured.importance("second_moment"), measured.importance("cubed")
    assert ((cubes > 0) == (squared > 0)).all()
    assert np.corrcoef(np.log(squared), np.log(cubes))[0, 1] > 0.9


@pytest.mark.parametrize(("options", "tokens"), [(["--fvu-every", 1], 20_000), ([], 300)], ids=["long", "short"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("sums.counts[:3]", "shape (3,) instead of (64,): return one importance for each feature"),
        ("sums.counts * float('nan')", "negative or non-finite values: importances must be finite and ≥ 0"),
        ("-sums.squares - 1", "negative or non-finite values: importances must be finite and ≥ 0"),
    ],
)
def test_an_estimator_that_is_wrong_is_refused(
    cli: Cli,
    setup: Path,
    tmp_path: Path,
    plugin_file: Callable[[str, str], Path],
    returned: str,
    message: str,
    options: list[object],
    tokens: int,
) -> None:
    wrong = plugin_file("wrong.py", CUBED.replace("RETURNED", returned))
    measure = arguments(setup, tmp_path / "out", "--importance", "cubed", *options, tokens=tokens)
    assert cli("--plugin", wrong, *measure) == (2, "", f"error: the importance estimator 'cubed' returned {message}\n")
    assert not (tmp_path / "out").exists()


FAILING = """
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import CapacityLaw, ImportanceEstimator, TokenSource

class Estimator(ImportanceEstimator):
    name, unit = "broken", "nothing"

    def start(self, sae, groups, device):
        return {"state": [][3]} if "start" == FAILS else {}

    def update(self, state, batch):
        state["missing"] if "update" == FAILS else None
        exit(0) if "exit" == FAILS else None

    def compute(self, sums):
        return sums.squares / ({} if "compute" == FAILS else 1)

class Law(CapacityLaw):
    name = "broken"

    def features_per_dimension(self, alpha, importance):
        return 1 / 0 if "law" == FAILS else float("nan")

class Source(TokenSource):
    name = "broken"

    def matches(self, spec):
        return spec.index("broken") >= 0 if "matches" == FAILS else spec == "broken"

    def documents(self, spec):
        yield "w3 w4 w5"
        raise RuntimeError("the disk\\nis gone")

class Wrong(Source):
    name = "wrong"

    def matches(self, spec):
        return spec == "wrong"

    def documents(self, spec):
        yield 3

@hookimpl
def register_importance_estimators(register):
    register(Estimator())

@hookimpl
def register_capacity_laws(register):
    register(Law())

@hookimpl(tryfirst=True)
def register_token_sources(register):
    register(Wrong())
    register(Source())
"""


@pytest.mark.parametrize(
    ("fails", "options", "says"),
    [
        (
            "start",
            ["--importance", "broken"],
            "importance estimator 'broken' failed in line 9 of FILE (IndexError: list index out of range): fix it",
        ),
        (
            "update",
            ["--importance", "broken"],
            "importance estimator 'broken' failed in line 12 of FILE (KeyError: 'missing'): fix it",
        ),
        (
            "exit",
            ["--importance", "broken"],
            "importance estimator 'broken' failed in line 13 of FILE (SystemExit: 0): fix it",
        ),
        (
            "compute",
            ["--importance", "broken"],
            "importance estimator 'broken' failed in line 16 of FILE (TypeError: unsupported operand type(s)",
        ),
        (
            "matches",
            ["--source", "text.jsonl"],
            "token source 'broken' failed in line 28 of FILE (ValueError: substring not found): fix it",
        ),
        (
            "documents",
            ["--source", "broken"],
            (
                "token source 'broken' failed in line 32 of FILE (RuntimeError: the disk is gone): fix it, or choose"
                " another\n"
            ),
        ),
        (
            "nothing",
            ["--source", "wrong"],
            "token source 'wrong' gave a int of wrong, not a text: make its documents strings\n",
        ),
    ],
    ids=["start", "update", "exit", "compute", "matches", "documents", "no text"],
)
def test_a_plugin_whose_code_fails_is_named_with_its_line(
    cli: Cli,
    setup: Path,
    tmp_path: Path,
    plugin_file: Callable[[str, str], Path],
    fails: str,
    options: list[str],
    says: str,
) -> None:
    failing = plugin_file("failing.py", FAILING.replace("FAILS", repr(fails)))
    code, out, err = cli("--plugin", failing, *arguments(setup, tmp_path / "out", *options, "--fvu-every", 1))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: the {says.replace('FILE', str(failing))}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_law_whose_code_fails_is_named(
    cli: Cli, setup: Path, tmp_path: Path, plugin_file: Callable[[str, str], Path]
) -> None:
    cli(*arguments(setup, tmp_path / "out", tokens=600))
    raises = plugin_file("raises.py", FAILING.replace("FAILS", "'law'"))
    says = f"failed in line 22 of {raises} (ZeroDivisionError: division by zero): fix it, or choose another"
    for command, *more in (["budget"], ["floor", "--widths", "8"], ["plan", "--keep", "0.9"]):
        assert cli("--plugin", raises, command, tmp_path / "out", *more, "--law", "broken") == (
            2,
            "",
            f"error: the capacity law 'broken' {says}\n",
        )
        plugins.unregister_plugin(str(raises))
    gives_nan = plugin_file("gives_nan.py", FAILING.replace("FAILS", "'nothing'"))
    says = "gives nan features per dimension, but a finite number above 0 is needed: fix it"
    assert cli("--plugin", gives_nan, "budget", tmp_path / "out", "--law", "broken") == (
        2,
        "",
        f"error: the capacity law 'broken' {says}\n",
    )


def test_in_a_session_the_cause_is_kept(neox: Any, make_sae: Any, tokens: torch.Tensor) -> None:
    class Dividing(Largest):
        def update(self, state: dict[str, torch.Tensor], batch: Any) -> None:
            raise ZeroDivisionError

    with (
        tl_capacity.add_capacity_hooks(
            neox, {"blocks.1.hook_resid_post": make_sae()}, importance=[Dividing()]
        ) as capacity,
        pytest.raises(
            PluginError, match=r"'cubed' failed in line \d+ of .*test_plugins.py \(ZeroDivisionError\): fix it"
        ) as found,
    ):
        capacity.run(tokens, progress=False)
    assert isinstance(found.value.__cause__, ZeroDivisionError)


def test_an_estimator_given_twice_is_refused(neox: Any, make_sae: Any) -> None:
    with pytest.raises(tl_capacity.CapacityError, match="'cubed' is given twice, and both would add to the same sums"):
        tl_capacity.add_capacity_hooks(
            neox, {"blocks.1.hook_resid_post": make_sae()}, importance=[Largest(), "second_moment", Largest()]
        )


@pytest.mark.parametrize(
    "inside",
    [
        "import sys; sys.exit(3)",
        "raise SystemExit",
        "import sys\n@hookimpl\ndef register_recipes(register):\n    sys.exit(3)",
    ],
)
def test_a_plugin_file_that_would_end_the_program(
    cli: Cli, plugin_file: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture, inside: str
) -> None:
    ending = plugin_file("ending.py", f"from tl_capacity import hookimpl\n{inside}")
    code, out, _ = cli("--plugin", ending, "--plugin", plugin_file("cubed.py", CUBED), "plugins", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["failures"][str(ending)].startswith("SystemExit")
    assert "cubed" in [plugin["name"] for plugin in found["plugins"]]
    assert f"the plugin file {ending} failed and was left out (SystemExit" in caplog.text


def test_a_plugin_file_given_twice_is_refused(cli: Cli, plugin_file: Callable[[str, str], Path]) -> None:
    cubed = plugin_file("cubed.py", CUBED)
    code, _, err = cli("--plugin", cubed, "--plugin", cubed, "plugins")
    assert code == 2
    assert err.startswith("error: the plugin <module")
    assert f"cannot be registered as {str(cubed)!r}" in err
    assert err.count("\n") == 1


def test_unknown_names_are_met_with_the_nearest() -> None:
    with pytest.raises(PluginError, match="did you mean 'firing_rate'"):
        plugins.plugins().importance_estimators["firing_rates"]


def test_a_name_that_is_taken_leaves_the_notebook_working() -> None:
    class Taken(Largest):
        name = "second_moment"

    with pytest.raises(PluginError, match="'importance' and 'notebook:second_moment' both register"):
        tl_capacity.register_importance_estimator(Taken)
    assert plugins.plugins().importance_estimators["second_moment"].unit == "latent²"


def test_registering_from_a_notebook_replaces_the_earlier_one() -> None:
    try:
        tl_capacity.register_importance_estimator(Largest)
        tl_capacity.register_importance_estimator(Largest())
        assert plugins.plugins().importance_estimators["cubed"].unit == "latent³"
    finally:
        plugins.unregister_plugin("notebook:cubed")


class TestEstimatorWithState:
    def test_equals_a_dense_computation(self, neox: Any, make_sae: Any, tokens: torch.Tensor) -> None:
        sae, hook = make_sae("standard"), "blocks.1.hook_resid_post"
        with tl_capacity.add_capacity_hooks(neox, {hook: sae}, importance=[Largest()], mask_token_ids=()) as capacity:
            capacity.run(tokens, progress=False)
            measured = capacity.measurement().hooks[0]
        hidden: list[torch.Tensor] = []
        handle = neox.gpt_neox.layers[1].register_forward_hook(
            lambda _, args, out: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            neox(tokens)
            latents = sae.encode(hidden[0].flatten(0, 1)).double()
        handle.remove()
        expected = (latents.abs() ** 3).mean(0).numpy(force=True)
        np.testing.assert_allclose(
            measured.summary.importance(Largest().compute, "cubed"), expected[measured.summary.alive], rtol=1e-6
        )

    def test_the_batch_offers_all_there_is_to_know_of_a_token(
        self, neox: Any, make_sae: Any, tokens: torch.Tensor
    ) -> None:
        batches: list[Any] = []

        class Looking(ImportanceEstimator):
            name, unit = "looking", "nothing"

            def update(self, state: dict[str, torch.Tensor], batch: Any) -> None:
                batches.append(batch)

        sae, hook = make_sae("standard"), "blocks.1.hook_resid_post"
        with tl_capacity.add_capacity_hooks(
            neox, {hook: sae}, importance=[Looking()], skip_first_positions=2
        ) as capacity:
            capacity.taps[0].encoder.chunk = 7  # a forward pass in many pieces
            capacity.run(tokens, progress=False)
        with torch.no_grad():
            activations = neox(tokens, output_hidden_states=True).hidden_states[2]
        counted = (tokens != 0) & (torch.arange(tokens.shape[1], device=tokens.device) >= 2)
        assert len(batches) > 1
        counted, activations = counted.cpu(), activations.cpu()
        assert all(torch.equal(batch.counted.cpu(), counted) and batch.sae is sae for batch in batches)
        rows, positions, documents = (
            torch.cat([getattr(batch, name).cpu() for batch in batches]) for name in ("rows", "positions", "documents")
        )
        assert torch.equal(torch.stack([rows, positions], 1), counted.nonzero())
        assert torch.equal(documents, rows), "each row of a tensor is a document of its own"
        seen = torch.cat([batch.activations.cpu() for batch in batches])
        torch.testing.assert_close(seen, activations[rows, positions])
        for batch in batches:
            torch.testing.assert_close(batch.dense(), sae.encode(batch.activations).double(), rtol=1e-4, atol=1e-5)
            assert torch.equal(batch.groups, batch.token_groups[batch.tokens])
            assert torch.equal(batch.dense()[batch.tokens, batch.features], batch.values)

    def test_shards_merge(self, neox: Any, make_sae: Any, tokens: torch.Tensor) -> None:
        sae, hook = make_sae("standard"), "blocks.1.hook_resid_post"

        def measured(documents: slice) -> tl_capacity.Measurement:
            with tl_capacity.add_capacity_hooks(neox, {hook: sae}, importance=[Largest()]) as capacity:
                capacity.run(
                    TokenBatch(tokens.numpy(force=True)[documents], np.arange(len(tokens))[documents]) for _ in range(1)
                )
            return capacity.measurement()

        whole, parts = measured(slice(None)), [measured(slice(None, 9)), measured(slice(9, None))]
        summed = sum(part[hook].summary.arrays["state/cubed/cubes"] for part in parts)
        np.testing.assert_allclose(summed, whole[hook].summary.arrays["state/cubed/cubes"], rtol=1e-9)
        merged = merge_sums(*(part[hook].summary.arrays for part in parts))
        np.testing.assert_array_equal(merged["state/cubed/cubes"], summed)

    def test_a_state_that_cannot_be_merged_is_refused(self, neox: Any, make_sae: Any, tokens: torch.Tensor) -> None:
        class Ungrouped(Largest):
            def start(self, sae: Any, groups: int, device: torch.device) -> dict[str, torch.Tensor]:
                return {"cubes": torch.zeros(len(sae.W_dec))}

        class Other(Largest):
            def start(self, sae: Any, groups: int, device: torch.device) -> Any:
                return {"cubes": np.zeros((groups, len(sae.W_dec)))}

        class Replacing(Largest):
            def update(self, state: dict[str, torch.Tensor], batch: Any) -> None:
                state["cubes"] = state["cubes"] + 1

        saes = {"blocks.1.hook_resid_post": make_sae("standard", d_sae=72)}
        with pytest.raises(
            tl_capacity.CapacityError,
            match=r"'cubed' starts with 'cubes' of shape \(72,\): its first axis must be the 64 document groups",
        ):
            tl_capacity.add_capacity_hooks(neox, saes, importance=[Ungrouped()])
        with pytest.raises(tl_capacity.CapacityError, match="'cubed' starts with 'cubes', a ndarray: make it a tensor"):
            tl_capacity.add_capacity_hooks(neox, saes, importance=[Other()])
        with (
            tl_capacity.add_capacity_hooks(neox, saes, importance=[Replacing()]) as capacity,
            pytest.raises(tl_capacity.CapacityError, match="'cubed' replaces its state"),
        ):
            capacity.run(tokens, progress=False)

    @pytest.mark.parametrize(
        ("start", "says"),
        [
            (
                lambda zeros: zeros,
                r"starts with a Tensor instead of a mapping in line \d+ of FILE: return tensors by name",
            ),
            (lambda zeros: None, r"starts with a NoneType instead of a mapping in line \d+ of FILE: return tensors by"),
            (lambda zeros: [("cubes", zeros)], r"starts with a list instead of a mapping in line \d+ of FILE: return"),
            (lambda zeros: {"cubes": zeros + 1}, "starts with 'cubes' with numbers other than zero, which each shard"),
            (lambda zeros: {"cubes": zeros * float("nan")}, "starts with 'cubes' with numbers other than zero"),
            (lambda zeros: {"cubes": zeros.half()}, r"starts with 'cubes' in torch.float16, which loses sums: make it"),
            (lambda zeros: {"cubes": zeros.bfloat16()}, r"starts with 'cubes' in torch.bfloat16, which loses sums"),
            (lambda zeros: {"cubes": zeros.bool()}, r"starts with 'cubes' in torch.bool, which loses sums"),
        ],
        ids=["tensor", "nothing", "pairs", "ones", "nan", "float16", "bfloat16", "bool"],
    )
    def test_a_state_that_starts_wrong_is_refused(self, neox: Any, make_sae: Any, start: Any, says: str) -> None:
        class Starting(Largest):
            def start(self, sae: Any, groups: int, device: torch.device) -> Any:
                return start(super().start(sae, groups, device)["cubes"])

        saes = {"blocks.1.hook_resid_post": make_sae("standard")}
        message = f"^the importance estimator 'cubed' {says.replace('FILE', __file__)}"
        with pytest.raises(tl_capacity.CapacityError, match=message):
            tl_capacity.add_capacity_hooks(neox, saes, importance=[Starting()])

    def test_what_update_adds_to_the_state_is_refused(self, neox: Any, make_sae: Any, tokens: torch.Tensor) -> None:
        class Gaining(Largest):
            def update(self, state: dict[str, torch.Tensor], batch: Any) -> None:
                super().update(state, batch)
                state["fourth"] = batch.values**4

        with (
            tl_capacity.add_capacity_hooks(
                neox, {"blocks.1.hook_resid_post": make_sae("standard")}, importance=[Gaining()]
            ) as capacity,
            pytest.raises(tl_capacity.CapacityError, match="'cubed' adds 'fourth' to its state in update, where it is"),
        ):
            capacity.run(tokens, progress=False)

    def test_counts_and_sums_in_float32_are_taken(self, neox: Any, make_sae: Any, tokens: torch.Tensor) -> None:
        class Counting(ImportanceEstimator):
            name, unit = "counting", "firings"

            def start(self, sae: Any, groups: int, device: torch.device) -> dict[str, torch.Tensor]:
                return {
                    "fired": torch.zeros(groups, len(sae.W_dec), dtype=torch.int64, device=device),
                    "sum": torch.zeros(groups, len(sae.W_dec), device=device),
                }

            def update(self, state: dict[str, torch.Tensor], batch: Any) -> None:
                ones = torch.ones(len(batch.features), dtype=torch.int64, device=batch.features.device)
                state["fired"].index_put_((batch.groups, batch.features), ones, accumulate=True)
                state["sum"].index_put_((batch.groups, batch.features), batch.values.float(), accumulate=True)

        hook = "blocks.1.hook_resid_post"
        with tl_capacity.add_capacity_hooks(neox, {hook: make_sae("standard")}, importance=[Counting()]) as capacity:
            sums = capacity.run(tokens, progress=False).measurement()[hook].summary.arrays
        np.testing.assert_array_equal(sums["state/counting/fired"], sums["counts"])
        np.testing.assert_allclose(sums["state/counting/sum"], sums["sums"], rtol=1e-5, atol=1e-6)

    def test_one_that_needs_gradients_is_refused_in_inference_mode(
        self, make_model: Any, make_sae: Any, tokens: torch.Tensor
    ) -> None:
        saes = {"blocks.1.hook_resid_post": make_sae("standard")}
        message = "'gradient' needs the gradient of cross_entropy, which torch.inference_mode does not record"
        model = make_model("gpt_neox")
        with tl_capacity.add_capacity_hooks(model, saes, importance=["gradient"]) as capacity:
            with torch.inference_mode(), pytest.raises(tl_capacity.CapacityError, match=message):
                capacity.run(tokens, progress=False)
            capacity.run(tokens, progress=False)
        with torch.inference_mode():
            made_there = make_model("gpt_neox")
            with tl_capacity.add_capacity_hooks(made_there, saes) as plain:
                plain.run(tokens, progress=False)
        np.testing.assert_array_equal(
            plain.measurement().hooks[0].summary.arrays["counts"],
            capacity.measurement().hooks[0].summary.arrays["counts"],
        )
        with (
            tl_capacity.add_capacity_hooks(made_there, saes, importance=["gradient"]) as capacity,
            pytest.raises(tl_capacity.CapacityError, match=message),
        ):
            capacity.run(tokens, progress=False)

    @pytest.mark.parametrize(
        ("returned", "message"),
        [(np.ones(3), "shape"), (np.full(64, np.nan), "non-finite"), (np.full(64, -1.0), "negative")],
    )
    def test_a_wrong_result_is_refused_by_name(
        self,
        neox: Any,
        make_sae: Any,
        tokens: torch.Tensor,
        registered: Callable[[object], str],
        returned: Any,
        message: str,
    ) -> None:
        class Wrong(ImportanceEstimator):
            name, unit = "wrong", "nothing"

            def compute(self, sums: FeatureSums) -> Any:
                return returned

        registered(estimator_plugin(Wrong()))
        with tl_capacity.add_capacity_hooks(neox, {"blocks.1.hook_resid_post": make_sae("standard")}) as capacity:
            capacity.run(tokens, progress=False)
        with pytest.raises(tl_capacity.CapacityError, match=f"'wrong' returned .*{message}"):
            capacity.measurement().floors([4], importance="wrong", max_fvu=None)

    def test_one_that_was_not_measured_must_be_named_when_measuring(
        self, neox: Any, make_sae: Any, tokens: torch.Tensor, registered: Callable[[object], str]
    ) -> None:
        registered(estimator_plugin(Largest()))
        with tl_capacity.add_capacity_hooks(neox, {"blocks.1.hook_resid_post": make_sae("standard")}) as capacity:
            capacity.run(tokens, progress=False)
        with pytest.raises(tl_capacity.CapacityError, match="--importance cubed"):
            capacity.measurement().floors([4], importance="cubed", max_fvu=None)
