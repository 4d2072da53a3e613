"""Capacity laws: what a law is told, laws that look at the widths of the hook point and of the teacher, and the width
that keeps so many features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli
from hypothesis import given
from hypothesis import strategies as st
from measurements import measurement_of_counts

from tl_capacity import CapacityError, Measurement, add_capacity_hooks, hookimpl, theory
from tl_capacity.errors import PluginError
from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.plan import plan
from tl_capacity.plugins import plugins, register_plugin, unregister_plugin
from tl_capacity.predict.curve import Curve
from tl_capacity.predict.laws import budgets, exact_width, kept_features, narrowest_width
from tl_capacity.report.edges import edges

COUNTS, TOKENS = np.arange(1, 201) * 64, 64_000
"""So that all 200 features are alive, and their L0 is 20.1."""


class Squared(CapacityLaw):
    """Grows with the square of the width, and not in every step."""

    name = "squared"

    def kept(self, width: int, at: CapacityContext) -> float:
        return (width // 2) ** 2


class Few(CapacityLaw):
    name = "few"

    def kept(self, width: int, at: CapacityContext) -> float:
        return 7


class Looking(CapacityLaw):
    """Says what it was told."""

    name = "looking"

    def __init__(self) -> None:
        self.told: list[tuple[int, CapacityContext]] = []

    def kept(self, width: int, at: CapacityContext) -> float:
        self.told.append((width, at))
        return width


class Even(CapacityLaw):
    """As many features in every dimension."""

    name = "even"

    def __init__(self, held: float) -> None:
        self.held = held

    def features_per_dimension(self, alpha: float, importance: np.ndarray[Any, Any]) -> float:
        return self.held


@pytest.fixture
def laws() -> Iterator[dict[str, CapacityLaw]]:
    """Registered for one test."""
    registered = {law.name: law for law in (Squared(), Few(), Looking())}

    class Plugin:
        @hookimpl
        def register_capacity_laws(self, register: Callable[[CapacityLaw], None]) -> None:
            for law in registered.values():
                register(law)

    name = register_plugin(Plugin(), "laws of a test")
    yield registered
    unregister_plugin(name)


def test_a_law_of_the_share_of_the_teachers_width() -> None:
    measurement = measurement_of_counts(COUNTS, tokens=TOKENS)
    hook = measurement.hooks[0]
    assert (hook.width, hook.teacher_width, int(hook.summary.n_alive.value)) == (16, 16, 200)
    values = np.sort(hook.importance())[::-1]
    for prediction in measurement.floors([1, 3, 8, 16, 32], law="proportional"):
        kept = min(200, floor(Fraction(200 * prediction.width, 16)))
        assert prediction.features_kept.value == kept
        assert prediction.predicted_floor.value == pytest.approx(values[kept:].sum(), abs=1e-12)
        assert prediction.caveat == plugins().capacity_laws["proportional"].caveat
    budget = measurement.budget((4,), law="proportional")
    assert budget.to_frame().budget[0] == 200
    answer = plan(measurement, keep=0.5, law="proportional")
    assert answer.width == 8
    (edge,) = edges(hook, [4], None, plugins().capacity_laws["proportional"])
    assert edge.n_kept == 50
    marks = [trace for trace in measurement.plot(widths=[4, 8], law="proportional").data if trace.mode == "markers"]
    assert list(marks[0].x) == [50, 100]


def test_a_law_is_told_the_widths_of_the_hook_and_of_the_teacher(
    any_model: Any, make_sae: Any, tokens: torch.Tensor, laws: dict[str, Any]
) -> None:
    hook = "blocks.1.hook_resid_post"
    with add_capacity_hooks(any_model, {hook: make_sae()}) as capacity:
        measured = capacity.run(tokens, progress=False).measurement()
    measured.floors([5], law="looking", max_fvu=None)
    width, at = laws["looking"].told[0]
    assert (width, at.hook_width, at.teacher_width) == (5, 32, 32)
    assert at.n_features == int(measured[hook].summary.n_alive.value)
    assert at.alpha == measured[hook].summary.alpha.value
    np.testing.assert_array_equal(at.importance, measured[hook].importance())


def test_at_neurons_the_hook_is_wider_than_the_teacher(
    hooked: Any, make_sae: Any, tokens: torch.Tensor, tmp_path: Path, laws: dict[str, Any]
) -> None:
    hook, wide = "blocks.1.mlp.hook_post", 4 * hooked.cfg.d_model
    with add_capacity_hooks(hooked, {hook: make_sae(hook=hook, d_in=wide)}) as capacity:
        measured = capacity.run(tokens, progress=False).measurement()
    measured.save(tmp_path)
    loaded = Measurement.load(tmp_path)
    for each in (measured, loaded):
        each.floors([5], law="looking", max_fvu=None)
        at = laws["looking"].told[-1][1]
        assert (at.hook_width, at.teacher_width) == (wide, hooked.cfg.d_model)
    as_by_01 = replace(loaded, hooks=(replace(loaded.hooks[0], d_model=None),))
    with pytest.raises(CapacityError, match=r"'looking' asks for the widths .* not known here: measure again"):
        as_by_01.floors([5], law="looking", max_fvu=None)
    assert as_by_01.floors([5], max_fvu=None) == measured.floors([5], max_fvu=None)


def test_a_measurement_whose_width_of_the_model_is_garbled_is_refused(tmp_path: Path) -> None:
    measurement_of_counts(COUNTS, tokens=TOKENS).save(tmp_path)
    path = tmp_path / "measurement.json"
    content = json.loads(path.read_text())
    del content["sha256_of_the_rest"]
    for garbled in ("16", 0, -3):
        content["hooks"][0]["d_model"] = garbled
        path.write_text(json.dumps(content))
        with pytest.raises(CapacityError, match="lacks or garbles d_model"):
            Measurement.load(tmp_path)


@given(st.integers(1, 2**22), st.integers(1, 2**15), st.data())
def test_the_proportional_law_is_exact(features: int, teacher: int, data: st.DataObject) -> None:
    """⌊F · d_S/d_T⌋ in whole numbers: a student of the teacher's width keeps every feature, and half of it half."""
    width = data.draw(st.integers(1, 2 * teacher))
    at = CapacityContext(0.9, np.zeros(features), 4 * teacher, teacher)
    assert kept_features(plugins().capacity_laws["proportional"], width, at) == min(
        features * width // teacher, features
    )


def test_a_bare_curve_says_the_teachers_width_or_refuses(tmp_path: Path, cli: Cli) -> None:
    curve = {"sorted_importance": [3.0, 2.0, 1.0, 0.5], "alpha": 0.5}
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(curve))
    code, out, err = cli("floor", path, "--widths", "2", "--law", "proportional")
    assert (code, out) == (2, "")
    assert err.startswith("error: the capacity law 'proportional' asks for the widths")
    assert err.count("\n") == 1
    path.write_text(json.dumps({**curve, "d_model": 4}))
    (predicted,) = Curve.load(path).floors([2], law="proportional")
    assert (predicted.features_kept.value, predicted.predicted_floor.value) == (2, 1.5)
    for wrong in ("wide", -4, 4.5, None):
        path.write_text(json.dumps({**curve, "d_model": wrong}))
        with pytest.raises(CapacityError, match="is not an importance curve"):
            Curve.load(path)


def test_old_laws_are_asked_as_ever() -> None:
    at = CapacityContext(0.9, np.ones(100), 16, 16)
    law = plugins().capacity_laws["compressed_sensing"]
    assert budgets(law, [3, 5], at).tolist() == [3 * theory.capacity(0.9), 5 * theory.capacity(0.9)]
    assert law.kept(3, at) == budgets(law, [3], at)[0]
    assert kept_features(law, 3, at) == theory.kept_features(3, 0.9, 100)
    assert exact_width(law, 50, CapacityContext(0.9, np.ones(100))) == 50 / theory.capacity(0.9)


@given(st.integers(1, 5_000), st.floats(1.0, 60.0))
def test_the_narrowest_width_keeps_the_rank(rank: int, per_dimension: float) -> None:
    width = narrowest_width(Even(per_dimension), rank, CapacityContext(0.9, np.ones(1)))
    assert width * per_dimension >= rank - 1e-9
    assert (width - 1) * per_dimension < rank


@given(st.integers(0, 3_000))
def test_the_narrowest_width_of_a_law_that_is_not_linear(features: int) -> None:
    at = CapacityContext(0.9, np.ones(3_000), 64, 64)
    width = narrowest_width(Squared(), features, at)
    assert (width // 2) ** 2 >= features
    assert width == 0 or ((width - 1) // 2) ** 2 < features


@pytest.mark.usefixtures("laws")
def test_what_no_law_may_give_is_one_sentence() -> None:
    measurement = measurement_of_counts(COUNTS, tokens=TOKENS)
    with pytest.raises(
        CapacityError, match=r"^no width up to 2,147,483,648 keeps 100 features by the capacity law 'few'"
    ):
        plan(measurement, keep=0.5, law="few")

    class Wrong(CapacityLaw):
        name = "wrong"

        def kept(self, width: int, at: CapacityContext) -> Any:
            return {4: float("nan"), 5: -1, 6: "many"}[width]

    at = CapacityContext(0.9, np.ones(3), 8, 8)
    for width, says in (
        (4, r"keeps nan features at width 4, but a finite number of at least 0 is needed: fix it$"),
        (5, r"keeps -1 features at width 5"),
        (6, rf"failed in line \d+ of {__file__} \(ValueError: could not convert string to float: 'many'\): fix it"),
        (7, rf"failed in line \d+ of {__file__} \(KeyError: 7\): fix it"),
    ):
        with pytest.raises(PluginError, match=f"^the capacity law 'wrong' {says}"):
            budgets(Wrong(), [width], at)
    with pytest.raises(PluginError, match=r"'nothing' overrides neither features_per_dimension\(\) nor kept\(\)"):
        budgets(type("Nothing", (CapacityLaw,), {"name": "nothing"})(), [1], at)
