"""Plans in nats: every method says its width, says how far it was off, and is corrected by students as a loop over all
widths has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import curve_at, measurement_of_counts, students_with

from tl_capacity import theory
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import FloorContext, FloorPredictor
from tl_capacity.plan import MethodPlan, Plan, plan
from tl_capacity.plan.answers import BOUND, UNCHECKED
from tl_capacity.plugins import plugins, register_plugin, unregister_plugin
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.predict.record import all_checks, record_of
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.estimate import Estimate

pytestmark = pytest.mark.usefixtures("few_replicates")

ROOT = Path(__file__).parent.parent.parent
MEASURED = measurement_of_counts((64 * np.ceil(120 / np.arange(1, 201))).astype(np.int64))
HOOK = MEASURED.hooks[0]
ERROR = 0.05
GRID = range(1, 2 * HOOK.width + 1)


def kl(kept: float) -> float:
    return ERROR + 3 * (1 - np.log1p(kept) / np.log1p(200))


SPLICED = Spliced((curve_at(HOOK, kl),))


def spliced_floor(width: int, law: str = "compressed_sensing") -> float:
    at = context_at(HOOK, HOOK.importance(), HOOK.summary.alpha.value)
    return SPLICED.curves[0].at(kept_features(plugins().capacity_laws[law], width, at)).value


def first(floors: Callable[[int], float], target: float) -> int | None:
    return next((width for width in GRID if floors(width) <= target), None)


def said_by(answer: Plan, method: str) -> MethodPlan:
    [found] = [each for each in answer.methods if each.method == method]
    return found


@given(st.floats(0.1, 2.5))
@settings(max_examples=3, deadline=None)
def test_every_law_is_read_from_the_splice(target: float) -> None:
    answer = plan(MEASURED, target_loss=target, spliced=SPLICED)
    for law in plugins().capacity_laws:
        said = said_by(answer, f"splice of second_moment, {law.name}")
        expected = first(lambda width, law=law: spliced_floor(width, law.name), target)  # type: ignore[misc]
        if expected is not None:
            assert said.width is not None
            assert said.width.value == expected
            assert said.asked == (law.name == "compressed_sensing")
    assert answer.width == said_by(answer, "splice of second_moment, compressed_sensing").width.value  # type: ignore[union-attr]
    assert "nats per token" in answer.answer()
    assert "pass them with --calibrate" in answer.answer()
    assert "nats per token per token" not in json.dumps(answer.to_json())
    assert answer.plot().layout.yaxis.title.text == "predicted floor (nats per token)"


def test_how_far_it_was_off_makes_a_range() -> None:
    record = record_of("splice", "second_moment", "compressed_sensing")
    assert record is not None
    said = said_by(plan(MEASURED, target_loss=0.9, spliced=SPLICED), "splice of second_moment, compressed_sensing")
    assert (said.low, said.high) == (first(spliced_floor, 0.9 / record.low), first(spliced_floor, 0.9 / record.high))
    assert said.low is not None
    assert said.width is not None
    assert said.low < said.width.value
    assert said.checked == record.sentence()
    unchecked = said_by(plan(MEASURED, target_loss=0.9, spliced=SPLICED), "splice of second_moment, equilibrium")
    assert (unchecked.low, unchecked.high, unchecked.checked) == (None, None, UNCHECKED)


def test_the_record_is_what_the_results_say() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "splice.json").read_text())
    observed = [row for row in rows if row["teacher"] == "embedded" and row["observed"] is not None]
    of_law = [row for row in observed if row["law"] == "d·g(α)" and row["error"] < row["observed"]]
    record = record_of("splice", "second_moment", "compressed_sensing")
    assert record is not None
    assert len(record.checks) == len(of_law) > 40
    ratios = [row["observed"] / row["predicted"] for row in of_law]
    assert (record.low, record.median, record.high) == pytest.approx(
        (min(ratios), np.median(ratios), max(ratios)), rel=1e-2
    )
    assert f"{len({row['sae'] for row in of_law})} dictionaries" in record.sentence()
    assert {check.predictor for check in all_checks()} >= {"splice", "importance"}


@given(st.floats(0.5, 2.0), st.floats(0.3, 1.5))
@settings(max_examples=3, deadline=None)
def test_a_constant_factor_is_corrected(factor: float, target: float) -> None:
    students = students_with({width: [factor * spliced_floor(width)] for width in (2, 4, 7, 11, 16)})
    answer = plan(MEASURED, target_loss=target, spliced=SPLICED, students=students)
    said = said_by(answer, "splice of second_moment, compressed_sensing")
    expected = first(lambda width: factor * spliced_floor(width), target * (1 + 1e-9))
    assert said.corrected is not None
    assert said.corrected.value == expected
    assert said.missed_by == pytest.approx(1)


@given(st.floats(0.5, 2.0), st.floats(0.2, 1.0))
@settings(max_examples=3, deadline=None)
def test_students_on_a_power_law_decide_by_interpolation(s: float, target: float) -> None:
    students = students_with({width: [2.0 * width**-s] for width in (1, 2, 4, 8, 16)})
    answer = plan(MEASURED, target_loss=target, spliced=SPLICED, students=students)
    own = answer.methods[0]
    if not 2.0 * 16**-s <= target <= 2.0:
        assert own.corrected is None
        assert "outside of what widths 1 to 16 reached" in own.checked
        return
    assert own.corrected is not None
    assert own.corrected.value == np.ceil((2.0 / target) ** (1 / s) - 1e-9)
    assert own.missed_by == pytest.approx(1)
    assert answer.width == own.corrected.value
    assert f"say width {own.corrected.value:.0f}" in answer.answer()
    assert "by interpolation" in answer.answer()
    for cost in answer.costs:
        assert cost.corrected == (None if cost.width > 16 else pytest.approx(2.0 * cost.width**-s))


def test_the_interval_is_how_far_left_out_widths_were_missed() -> None:
    floors = {2: 1.9, 4: 1.1, 8: 0.7, 16: 0.2}
    answer = plan(
        MEASURED, target_loss=0.5, spliced=SPLICED, students=students_with({w: [f] for w, f in floors.items()})
    )
    said = said_by(answer, "splice of second_moment, compressed_sensing")
    ratios = {width: floor / spliced_floor(width) for width, floor in floors.items()}

    def between(width: float, of: dict[int, float]) -> float:
        return float(np.exp(np.interp(np.log(width), np.log(list(of)), np.log(list(of.values())))))

    missed = max(
        abs(np.log(ratios[width] / between(width, {w: r for w, r in ratios.items() if w != width}))) for width in (4, 8)
    )
    assert said.missed_by == pytest.approx(np.exp(missed))
    assert said.corrected is not None
    for end, target in (
        (said.corrected.value, 0.5),
        (said.corrected.low, 0.5 * np.exp(missed)),
        (said.corrected.high, 0.5 / np.exp(missed)),
    ):
        assert end == first(lambda width: between(width, ratios) * spliced_floor(width), target)


def test_beyond_the_students_the_best_corrected_method_extrapolates() -> None:
    students = students_with({width: [1.5 * spliced_floor(width)] for width in (2, 4, 6)})
    target = 1.5 * spliced_floor(12)
    answer = plan(MEASURED, target_loss=target, spliced=SPLICED, students=students)
    assert answer.methods[0].corrected is None
    assert answer.width == first(lambda width: 1.5 * spliced_floor(width), target)
    assert "None of them reached that loss, so this is an extrapolation." in answer.answer()


def test_an_importance_of_another_unit_is_corrected_and_says_no_width_of_its_own() -> None:
    alpha = HOOK.summary.alpha.value
    lost = {width: float(theory.refined_floor(HOOK.importance(), width, alpha)) for width in (1, 2, 4, 8)}
    factor = 1 / lost[1]
    students = students_with({width: [factor * floor] for width, floor in lost.items()})
    answer = plan(MEASURED, target_loss=0.4, students=students)
    said = said_by(answer, "second_moment, compressed_sensing")
    assert said.width is None
    assert said.checked == "predicts latent², which is not a loss"
    assert said.corrected is not None
    assert said.corrected.value == first(
        lambda width: factor * float(theory.refined_floor(HOOK.importance(), width, alpha)), 0.4
    )
    assert answer.hooks == ()
    with pytest.raises(CapacityError, match="says nothing in nats, so no hook point decided"):
        _ = answer.deciding
    assert answer.answer().startswith("For a floor of at most 0.4 nats per token, students of widths 1 to 8 say width")


def forecasts(name: str, floors: dict[int, float], spread: float = 0.0, **about: Any) -> Forecasts:
    records = [
        Forecast(name, width, Estimate(floor, floor - spread, floor + spread) if spread else Estimate(floor))
        for width, floor in floors.items()
    ]
    return Forecasts(tuple(records), about)


def test_forecasts_stand_beside_it() -> None:
    floors = {2: 2.0, 4: 1.0, 8: 0.5, 16: 0.25}
    answer = plan(MEASURED, target_loss=0.6, spliced=SPLICED, forecasts=[forecasts("pca_splice", floors, 0.1)])
    said = said_by(answer, "pca_splice")
    assert said.width == Estimate(7.0, first_of(floors, -0.1), first_of(floors, 0.1))
    for target in (3.0, 0.2):  # outside of what was forecast
        answer = plan(MEASURED, target_loss=target, spliced=SPLICED, forecasts=[forecasts("pca_splice", floors)])
        assert said_by(answer, "pca_splice").width is None


class Halves(FloorPredictor):
    """A predictor of somebody else's, in nats with nothing fitted."""

    name = "halves"
    knows_features = False

    def floors(self, widths: Sequence[int], at: FloorContext) -> list[float]:
        return [4 / width for width in widths]


class Fitted(Halves):
    """One that needs a factor, and so says nothing of a loss."""

    name = "fitted"
    constants = 1


def test_a_registered_predictor_in_nats_is_a_method() -> None:
    class Plugin:
        @hookimpl
        def register_floor_predictors(self, register: Callable[[FloorPredictor], None]) -> None:
            register(Halves())
            register(Fitted())

    register_plugin(Plugin(), "halves")
    try:
        answer = plan(MEASURED, target_loss=0.6, spliced=SPLICED)
    finally:
        unregister_plugin("halves")
    assert said_by(answer, "halves").width == Estimate(7.0)
    assert "fitted" not in {each.method for each in answer.methods}
    assert "halves" not in {each.method for each in plan(MEASURED, target_loss=0.6, spliced=SPLICED).methods}


def first_of(floors: dict[int, float], shift: float) -> float:
    """The first width at which a forecast, shifted, is within 0.6."""
    known, values = np.log(list(floors)), np.log(np.array(list(floors.values())) + shift)
    return next(float(w) for w in range(2, 17) if np.exp(np.interp(np.log(w), known, values)) <= 0.6)


def test_a_bound_is_said_to_be_one_and_decides_nothing() -> None:
    bound = next(predictor.name for predictor in plugins().floor_predictors if predictor.is_bound)
    answer = plan(
        MEASURED, target_loss=0.6, forecasts=[forecasts(bound, {2: 0.9, 4: 0.5}), forecasts("a", {2: 2.0, 8: 0.5})]
    )
    said = said_by(answer, bound)
    assert said.checked == BOUND
    assert said.width is not None
    assert answer.width == said_by(answer, "a").width.value  # type: ignore[union-attr]
    assert "the widest is planned" in answer.answer()
    students = students_with({2: [1.5], 8: [0.5]})
    corrected = plan(MEASURED, target_loss=0.6, forecasts=[forecasts(bound, {2: 0.9, 4: 0.5})], students=students)
    assert said_by(corrected, bound).corrected is None


def test_a_dictionary_that_costs_more_than_the_loss_is_refused_unless_students_answer() -> None:
    with pytest.raises(CapacityError, match="the dictionary is the limit and not the width"):
        plan(MEASURED, target_loss=ERROR / 2, spliced=SPLICED)
    students = students_with({4: [1.0], 16: [ERROR / 4]})
    answer = plan(MEASURED, target_loss=ERROR / 2, spliced=SPLICED, students=students)
    assert said_by(answer, "splice of second_moment, compressed_sensing").width is None
    assert 4 < answer.width <= 16


def test_widths_that_keep_every_feature_are_named() -> None:
    star = HOOK.summary.critical_width.value
    above = int(np.ceil(star)) + 1
    answer = plan(MEASURED, target_loss=1.0, spliced=SPLICED, widths=[4, above])
    [note] = [note for note in answer.notes() if "every feature fits into width" in note]
    assert f"{above:,}" in note
    assert not any(" 4," in note for note in [note])
    assert said_by(answer, "splice of second_moment, compressed_sensing").width is not None


def test_what_does_not_belong_together_is_refused() -> None:
    students = students_with({4: [1.0], 16: [0.1]})
    other = Spliced((replace(SPLICED.curves[0], sae_digest="1" * 64),))
    for options, says in (
        ({"spliced": other}, "the splice is of other dictionaries"),
        ({"students": replace(students, teacher="other")}, "the measurement is of 'unnamed model'"),
        ({"students": replace(students, complete=False)}, "has not ended"),
        ({"students": students, "observed": "best"}, "'best' is not a way to read the observed floor"),
        ({"students": students_with({4: [0.0]})}, "are 0 at every width"),
        ({"forecasts": [forecasts("a", {2: 1.0}, model="other")]}, "the forecasts are of the teacher 'other'"),
        ({"spliced": SPLICED, "importance": "decoder_weighted"}, "of the importance 'decoder_weighted'"),
    ):
        with pytest.raises(CapacityError, match=says):
            plan(MEASURED, target_loss=0.5, **options)
    with pytest.raises(CapacityError, match="not what share of the features they keep"):
        plan(MEASURED, keep=0.5, students=students)
    with pytest.raises(CapacityError, match="no method here gives a width"):
        plan(MEASURED, target_loss=0.1, forecasts=[forecasts("a", {2: 1.0})])


def test_it_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    students = students_with({4: [1.0], 8: [0.4], 16: [0.1]})
    answer = plan(MEASURED, target_loss=0.5, spliced=SPLICED, students=students)
    answer.save(tmp_path)
    assert Plan.load(tmp_path) == answer
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["sha256_of_the_rest"]
    content["methods"][1]["width"]["value"] = "8"
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match="lacks or garbles value = '8'"):
        Plan.load(tmp_path)


def test_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    MEASURED.save(tmp_path / "m")
    SPLICED.save(tmp_path / "s")
    students_with({4: [1.0], 8: [0.4], 16: [0.1]}).save(tmp_path / "d")
    forecasts("pca_splice", {2: 2.0, 16: 0.25}).save(tmp_path / "f")
    command = ["plan", tmp_path / "m", "--target-loss", "0.5", "--splice", tmp_path / "s"]
    code, out, err = cli(*command, "--calibrate", tmp_path / "d", "--with", tmp_path / "f", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    names = [each["method"] for each in answer["methods"]]
    assert {"observed floors, interpolated", "pca_splice", "splice of second_moment, compressed_sensing"} <= set(names)
    assert any("straight line in the logarithms" in note for note in answer["notes"])
    code, out, _ = cli(*command)
    assert code == 0
    assert "What each method says" in out
    assert ". Only trained students can tell which is right: pass them with --calibrate." in " ".join(out.split())
    for more, says in (
        (["--with", tmp_path / "s"], "a plan reads one splice"),
        (["--with", tmp_path / "d"], "holds neither splice.json nor forecasts.json"),
        (["--calibrate", tmp_path / "m"], "is not a distillation"),
        (["--calibrate", tmp_path / "d", "--observed", "best"], "'best' is not a way to read the observed floor"),
    ):
        code, out, err = cli(*command, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
