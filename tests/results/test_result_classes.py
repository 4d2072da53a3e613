"""One naming rule for all results: `to_frame`, `plot`, and `save` and `load` for what a model or training made."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_capacity as tlc
from tl_capacity.errors import CapacityError
from tl_capacity.measurement.exports import page_writer

ROOT = Path(__file__).parents[2]
RULE = ("to_frame", "plot", "save", "load")
OTHER_NAMES = {
    "plot_importance": "of 0.1, for Measurement.plot",
    "plot_floors": "the second figure of a distillation",
    "floors_frame": "the second table of a budget",
    "save_arrays": "the readouts of a recovery, beside what recover saves",
}
"""Names that mean nearly the same, and why they are there."""
LOOKS_LIKE_IT = re.compile(
    r"(plot|save|load|write|dump|export)_\w+|(?!to_frame)\w+_(frame|figure|plot)|(to|as)_(df|pandas|csv)"
)


def classes() -> Iterator[tuple[str, str, set[str]]]:
    """`(module, class, public methods)` of every public class of the package that has a name of the rule."""
    for path in sorted((ROOT / "tl_capacity").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                targets = [t for each in node.body if isinstance(each, ast.Assign) for t in each.targets]
                assigned = {target.id for target in targets if isinstance(target, ast.Name)}
                if {"to_frame", "plot"} & methods:
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                    yield module, node.name, {name for name in methods | assigned if not name.startswith("_")}


FOUND = list(classes())


def documented() -> dict[str, bool]:
    """The results in the documentation's table, and whether it says that they are saved."""
    page = (ROOT / "docs" / "result-classes.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| (yes)? ?\|$", page, re.M)
    return {name: saved == "yes" for name, saved in rows}


def test_the_table_has_every_result() -> None:
    assert documented() == {name: "save" in methods for _, name, methods in FOUND}
    assert len(FOUND) > 9


@pytest.mark.parametrize(("module", "name", "methods"), FOUND, ids=[name for _, name, _ in FOUND])
def test_the_rule_is_kept(module: str, name: str, methods: set[str]) -> None:
    assert {"to_frame", "plot"} <= methods
    assert ("save" in methods) == ("load" in methods)
    assert {each for each in methods if LOOKS_LIKE_IT.fullmatch(each)} <= set(OTHER_NAMES)
    result = getattr(import_module(module), name)
    assert all(
        parameter.default is not inspect.Parameter.empty
        for each in ("to_frame", "plot")
        for parameter in list(inspect.signature(getattr(result, each)).parameters.values())[1:]
    ), "a figure and a table can be had without arguments"
    if "save" in methods:
        for each, gives in (("save", "Path"), ("load", name)):
            signature = inspect.signature(getattr(result, each))
            (argument,) = [p for p in signature.parameters.values() if p.name != "self"]
            assert str(argument.annotation).replace("'", "") == "str | Path"
            assert str(signature.return_annotation).replace("'", "") == gives


class TestShortcuts:
    @pytest.fixture
    def measurement(self, neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor) -> Any:
        twice, once = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
        saes = {twice: [make_sae("standard", twice), make_sae("topk", twice)], once: make_sae("topk", once)}
        with tlc.add_capacity_hooks(neox, saes, fvu_every=1) as capacity:
            return capacity.run(tokens).measurement()

    def test_headline_figures(self, measurement: Any) -> None:
        assert list(measurement.d_star) == list(measurement.n_alive)
        assert len(measurement.d_star) == len(measurement.hooks) == 3
        for found, d_star, n_alive in zip(
            measurement, measurement.d_star.values(), measurement.n_alive.values(), strict=True
        ):
            assert d_star == found.d_star == found.summary.critical_width
            assert n_alive == found.n_alive == found.summary.n_alive
        assert measurement.d_star["blocks.0.hook_resid_post"] == measurement["blocks.0.hook_resid_post"].d_star

    @pytest.mark.slow
    def test_floors_and_frames(self, measurement: Any) -> None:
        floors = measurement.floors([4, 8], max_fvu=None)
        assert floors == list(measurement.budget([4, 8], max_fvu=None).floors)
        assert len(floors) == 6
        assert list(measurement.budget(max_fvu=None).to_frame()["hook"]) == [found.hook for found in measurement]

    @pytest.mark.slow
    def test_the_report(self, measurement: Any, tmp_path: Path, unchecked: None) -> None:
        path = measurement.report(str(tmp_path / "deep" / "page.html"), widths=[4, 8])
        assert path == tmp_path / "deep" / "page.html"
        written = path.read_text("utf-8")
        assert "runs the model and shows text on which features are active" in written
        assert all(found.sae in written for found in measurement)
        assert measurement.floors([4], max_fvu=None)[0].predicted_floor.show(",.1f").split(" ")[0] in written
        (tmp_path / "file").write_text("")
        with pytest.raises(CapacityError, match=r"the folder .* cannot be created"):
            page_writer()(measurement, tmp_path / "file" / "page.html")
