"""Plans: the smallest width is the smallest, its cost is that of the student that is built, and goals out of their
domain are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import HOOK, Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import measurement_of_counts

from tl_capacity import theory
from tl_capacity.distillation.students import new_student, parameters_of
from tl_capacity.errors import CapacityError
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import load_config, load_model
from tl_capacity.plan import Plan, ladder, plan, teacher_config
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import floor_values, hook_floors
from tl_capacity.results.estimate import document_resamples

pytestmark = pytest.mark.usefixtures("few_replicates")

LAW = plugins().capacity_laws["compressed_sensing"]
ZIPF = measurement_of_counts((64 * np.ceil(120 / np.arange(1, 201))).astype(np.int64))


@pytest.fixture(scope="module")
def measured(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "measurement"
    source = str(setup / "text.jsonl")
    measure(
        MeasureSettings(
            str(setup / "model"),
            out,
            (str(setup / "sae"), str(setup / "sae0")),
            tokens=2_000,
            source=source,
            context=20,
            progress=False,
        )
    )
    return out


@given(st.floats(0.01, 1.0))
@settings(max_examples=6, deadline=None)
def test_the_smallest_width_keeps_the_share_and_the_next_smaller_does_not(keep: float) -> None:
    hook, answer = ZIPF.hooks[0], plan(ZIPF, keep=keep, widths=[1])
    alpha, alive = hook.summary.alpha.value, int(hook.summary.n_alive.value)
    width = answer.width
    assert theory.kept_features(width, alpha, alive) >= keep * alive * (1 - 1e-9)
    assert width == 1 or theory.kept_features(width - 1, alpha, alive) < keep * alive


@given(st.floats(0.0, 1.0))
@settings(max_examples=6, deadline=None)
def test_the_smallest_width_stays_below_the_floor_and_the_next_smaller_does_not(share: float) -> None:
    hook = ZIPF.hooks[0]
    importance, alpha = hook.importance(), hook.summary.alpha.value
    target = share * float(importance.sum())
    width = plan(ZIPF, target_loss=target, widths=[1]).width
    assert theory.refined_floor(importance, width, alpha) <= target
    assert width == 1 or theory.refined_floor(importance, width - 1, alpha) > target


def test_keeping_all_takes_the_critical_width() -> None:
    s = ZIPF.hooks[0].summary
    needed = plan(ZIPF, keep=1.0).deciding.width
    assert needed.value == np.ceil(s.l0.value * np.log(s.n_alive.value / s.l0.value))
    assert needed.low is not None
    assert needed.high is not None
    assert needed.low <= needed.value <= needed.high


def test_the_interval_is_the_bootstraps(measured: Path) -> None:
    hook = Measurement.load(measured).hooks[0]
    s, needed = hook.summary, plan(Measurement.load(measured), keep=1.0, hook=HOOK).deciding.width
    assert needed.low == np.ceil(s.critical_width.low or 0)
    assert needed.high == np.ceil(s.critical_width.high or 0)


def test_the_widest_need_decides() -> None:
    rare, frequent = np.full(100, 64), np.full(100, 1280)
    both = measurement_of_counts(rare, frequent)
    answer = plan(both, keep=0.9, widths=[8])
    assert answer.deciding.hook == "blocks.1.hook_resid_post"
    assert answer.width == plan(both, keep=0.9, widths=[8], hook="blocks.1.hook_resid_post").width
    assert plan(both, keep=0.9, widths=[8], hook="blocks.0.hook_resid_post").width < answer.width


def test_what_a_width_costs_is_what_its_student_has(setup: Path, measured: Path) -> None:
    teacher = load_model(str(setup / "model")).model
    answer = plan(Measurement.load(measured), keep=0.5, widths=[8, 16, 32], config=load_config(str(setup / "model")))
    for cost in answer.costs:
        total, body = parameters_of(new_student(teacher, cost.width))
        assert (cost.parameters, cost.body_parameters) == (total, body)
        assert cost.share == pytest.approx(total / parameters_of(teacher)[0])
    assert {8, 16, 32, answer.width} == {cost.width for cost in answer.costs}


@pytest.mark.slow
def test_a_width_that_cannot_be_built_gives_way_to_the_next(setup: Path, measured: Path) -> None:
    config, measurement = load_config(str(setup / "model")), Measurement.load(measured)
    shares = np.linspace(0.2, 1, 5)
    bare = [plan(measurement, keep=float(share), widths=[8]).width for share in shares]
    built = [plan(measurement, keep=float(share), widths=[8], config=config).width for share in shares]
    assert any(b > a for a, b in zip(bare, built, strict=True))
    assert all(b >= a and b % 2 == 0 for a, b in zip(bare, built, strict=True))  # rotary dimensions come in pairs


def test_kept_shares_agree_with_the_closed_form() -> None:
    s = ZIPF.hooks[0].summary
    widths = [1, 3, 9, 27, 1_000]
    kept = theory.kept_features(np.array(widths), s.alpha.value, s.n_alive.value)
    shares = [f.kept_share for f in hook_floors(ZIPF.hooks[0], widths, "second_moment", LAW)]
    np.testing.assert_allclose([e.value for e in shares], kept / s.n_alive.value)
    assert all(0 <= (e.low or 0) <= e.value <= (e.high or 1) <= 1 for e in shares)


def test_floors_without_intervals_are_those_with_them(measured: Path) -> None:
    hook, widths = Measurement.load(measured).hooks[0], [8, 2, 4]
    floors = {f.width: f.predicted_floor.value for f in hook_floors(hook, widths, "second_moment", LAW)}
    assert floor_values(hook, widths, "second_moment", LAW) == floors
    assert list(floors) == widths
    assert floor_values(hook, [], "second_moment", LAW) == {}


def test_every_figure_of_a_floor_has_the_bootstraps_interval(measured: Path) -> None:
    hook, widths = Measurement.load(measured).hooks[0], [2, 4, 8]
    sums, threshold = hook.summary.arrays, hook.summary.alive_threshold
    drawn = document_resamples(sums["tokens"])
    assert drawn is not None
    for width, floor in zip(widths, hook_floors(hook, widths, "second_moment", LAW), strict=True):
        again = []
        for weights in drawn:
            rates, squares = (weights @ sums[name] / (weights @ sums["tokens"]) for name in ("counts", "squares"))
            values = squares[rates > threshold]
            alpha = theory.sparsity(float(rates.sum()), len(values))
            kept, total = theory.kept_features(width, alpha, len(values)), theory.refined_floor(values, width, alpha)
            again.append(
                [
                    kept,
                    len(values) - kept,
                    kept / len(values),
                    total,
                    theory.naive_floor(values, width, alpha),
                    total / values.sum(),
                ]
            )
        figures = [
            floor.features_kept,
            floor.features_lost,
            floor.kept_share,
            floor.predicted_floor,
            floor.naive_floor,
            floor.share,
        ]
        for figure, replicates in zip(figures, np.array(again).T, strict=True):
            low, high = figure.value + np.percentile(replicates, [2.5, 97.5]) - replicates.mean()
            assert (figure.low, figure.high) == pytest.approx(
                (max(0.0, min(low, figure.value)), max(high, figure.value))
            )
        assert floor.predicted_floor.value == pytest.approx(
            theory.refined_floor(hook.importance(), width, hook.summary.alpha.value)
        )
        assert floor.naive_floor.value == pytest.approx(
            theory.naive_floor(hook.importance(), width, hook.summary.alpha.value)
        )


def test_a_plan_is_the_same_when_it_is_loaded(setup: Path, measured: Path, tmp_path: Path) -> None:
    measurement = Measurement.load(measured)
    answer = plan(measurement, keep=0.5, law="equilibrium", config=load_config(str(setup / "model")))
    assert answer.caveat == plugins().capacity_laws["equilibrium"].caveat
    assert answer.save(tmp_path / "new") == tmp_path / "new"
    loaded = Plan.load(tmp_path / "new")
    assert loaded == Plan.load(tmp_path / "new" / "plan.json") == answer
    assert loaded.to_json() == answer.to_json()
    assert loaded.answer() == answer.answer()
    unknown = plan(measurement, target_loss=0.0)
    unknown.save(tmp_path)
    assert Plan.load(tmp_path) == unknown


def test_what_the_command_prints_is_a_plan_to_load(measured: Path, tmp_path: Path, cli: Cli) -> None:
    _, out, _ = cli("plan", measured, "--keep", "0.9", "--json")
    (tmp_path / "printed.json").write_text(out)
    loaded = Plan.load(tmp_path / "printed.json")
    assert loaded.to_json() == json.loads(out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.pop("law"), "lacks or garbles 'law'"),
        (lambda content: content.update(width=0), "lacks or garbles width = 0"),
        (lambda content: content.update(width=True), "lacks or garbles width = True"),
        (lambda content: content.update(hooks=[]), "lacks or garbles hooks or costs"),
        (lambda content: content.update(hooks=3), "lacks or garbles hooks = 3"),
        (lambda content: content["costs"].append(3), "lacks or garbles"),
        (lambda content: content["costs"][0]["floor"].update(value=None), "lacks or garbles value = None"),
        (lambda content: content["hooks"][0]["width"].update(value="8"), "lacks or garbles value = '8'"),
        (lambda content: content.update(schema=2), "has schema 2, and this version reads up to 1: upgrade"),
    ],
)
def test_a_plan_that_was_altered_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    plan(ZIPF, keep=0.5).save(tmp_path)
    file = tmp_path / "plan.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CapacityError, match=r"cannot be read as a plan|has schema"):
        Plan.load(tmp_path)
    del content["sha256_of_the_rest"]
    file.write_text(json.dumps(content))
    with pytest.raises(CapacityError, match=says):
        Plan.load(tmp_path)
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(CapacityError, match="cannot be read as a plan"):
        Plan.load(tmp_path)
    with pytest.raises(CapacityError, match="cannot be read as a plan"):
        Plan.load(tmp_path / "nowhere")


def test_the_ladder_is_two_widths_an_octave() -> None:
    assert ladder(1024) == (64, 96, 128, 192, 256, 384, 512, 768, 1024)
    assert ladder(3) == (1, 2, 3)


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ({}, "needs one goal"),
        ({"keep": 0.5, "target_loss": 1.0}, "needs one goal"),
        ({"keep": 0.0}, "not a share of the features"),
        ({"keep": 1.5}, "not a share of the features"),
        ({"keep": float("nan")}, "not a share of the features"),
        ({"target_loss": -1.0}, "not a loss"),
        ({"target_loss": float("nan")}, "not a loss"),
        ({"target_loss": float("inf")}, "not a loss"),
        ({"keep": 0.5, "hook": "blocks.7.hook_resid_post"}, "was not measured"),
        ({"keep": 0.5, "widths": [0]}, "not a student width"),
    ],
)
def test_goals_out_of_their_domain_are_refused(goal: dict[str, Any], says: str) -> None:
    with pytest.raises(CapacityError, match=says):
        plan(ZIPF, **goal)


def test_nothing_alive_is_refused() -> None:
    with pytest.raises(CapacityError, match="count more tokens"):
        plan(measurement_of_counts(np.zeros(8, dtype=np.int64)), keep=0.5)


def test_an_unknown_teacher_costs_nothing_known(measured: Path) -> None:
    assert teacher_config(ZIPF) is None
    with pytest.raises(CapacityError, match="cannot be loaded"):
        teacher_config(ZIPF, "no-such/model")
    answer = plan(ZIPF, keep=0.5)
    assert all(cost.parameters is None for cost in answer.costs)
    assert "pass --model" in answer.notes()[0]


def test_it_shows_itself(measured: Path) -> None:
    answer = plan(Measurement.load(measured), keep=0.5, widths=[8])
    html = answer._repr_html_()
    assert html.startswith("<p>To keep 50% of the features, the smallest student width is")
    frame = answer.to_frame()
    assert list(frame.width) == [cost.width for cost in answer.costs]
    assert list(frame.kept_low) == [cost.kept.low for cost in answer.costs]
    (drawn,) = answer.plot().data
    lossy = [cost for cost in answer.costs if cost.floor.value > 0]
    assert list(zip(drawn.x, drawn.y, strict=True)) == [(cost.width, cost.floor.value) for cost in lossy]
    assert lossy


def test_on_the_command_line(measured: Path, setup: Path, cli: Cli) -> None:
    code, out, err = cli("plan", measured, "--keep", "0.5", "--widths", "8,16", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["width"] == plan(Measurement.load(measured), keep=0.5, config=load_config(str(setup / "model"))).width
    assert all(cost["parameters"] > 0 for cost in answer["costs"])
    code, out, _ = cli("plan", measured, "--target-loss", "0.0")
    assert code == 0
    assert "For a predicted floor of at most 0 latent² per token" in out
    for arguments, says in (
        ([], "needs one goal"),
        (["--keep", "2"], "not a share"),
        (["--keep", "0.5", "--model", "no/such"], "cannot be loaded"),
    ):
        code, out, err = cli("plan", measured, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
