"""Decomposition: fits against independent ones, the honest verdict, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from tl_capacity.distillation import DistillationRun
from tl_capacity.distillation.candidates import RIVALS, Points, Prediction
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.decomposition import Decomposition, decompose, decompose_floors
from tl_capacity.distillation.fitting import Fit, fit_candidate
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.measure.attach import add_capacity_hooks
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.results.estimate import Estimate, group_resamples

WIDTHS = (16, 24, 32, 48, 64, 96, 128)
PREDICTED = {16: 9.0, 24: 6.5, 32: 4.6, 48: 2.2, 64: 1.0, 96: 0.1, 128: 0.0}
ASKED = ("hook", "importance", "law")
RIVAL = {candidate.name: candidate for candidate in RIVALS}


def floors(
    of: Callable[[int], float], widths: tuple[int, ...] = WIDTHS, seeds: int = 1, noise: float = 0.0
) -> list[ObservedFloor]:
    random = np.random.default_rng(0)
    values = [(w, s, of(w) + noise * random.normal()) for w in widths for s in range(seeds)]
    return [
        ObservedFloor(f"{w}-{s}", w, s, "random", v, v - 0.01, v + 0.01, v + 0.02, 0.1, 1.0, 0.001)
        for w, s, v in values
    ]


def decomposed(
    observed: list[ObservedFloor], predicted: dict[int, float] = PREDICTED, unit: str = "unit"
) -> Decomposition:
    widths = {f.width for f in observed if f.start != "teacher"}
    naive = {w: max(0.0, 10 - 0.1 * w) for w in widths}
    prediction = Prediction(*ASKED, unit, {w: Estimate(predicted[w]) for w in widths}, naive)
    return decompose_floors(observed, {f.name: f.width**2 for f in observed}, [prediction], ASKED)


def fitted(name: str, of: Points) -> Fit:
    return fit_candidate(RIVAL[name], of, group_resamples(of.widths))


def points(observed: list[ObservedFloor]) -> Points:
    widths = np.array([f.width for f in observed], dtype=np.float64)
    return Points(widths, np.array([f.value for f in observed]), widths**2)


@given(st.floats(0.01, 5), st.floats(-1, 2))
@settings(max_examples=3, deadline=None)
def test_the_formula_is_found_where_it_holds(c: float, b: float) -> None:
    found = decomposed(floors(lambda w: c * PREDICTED[w] + b))
    assert found.winner is found.chosen
    assert found.chosen.c is not None
    assert found.chosen.c.value == pytest.approx(c)
    assert found.chosen.b.value == pytest.approx(b, abs=1e-9)
    assert found.chosen.r2 == pytest.approx(1)
    assert found.chosen.error == pytest.approx(0, abs=1e-6)
    assert found.verdict().endswith("it is the prediction asked for")


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("1/d", lambda w: 0.3 + 20 / w),
        ("power law in d", lambda w: 0.3 + 5 * w**-0.4),
        ("naive floor, law at hook", lambda w: 0.2 + 0.3 * max(0.0, 10 - 0.1 * w)),
    ],
)
def test_the_verdict_names_a_rival_where_it_holds(name: str, of: Callable[[int], float]) -> None:
    found = decomposed(floors(of, seeds=2, noise=1e-6))
    assert found.winner is not None
    assert found.winner is not found.chosen
    (true,) = (f for f in found.fits if f.candidate.name == name)
    assert true.error is not None
    assert found.chosen.error is not None
    assert true.error < 1e-4 < 1e-2 < found.chosen.error  # a power law with the right exponent may be as good as 1/d
    assert found.winner.error is not None
    assert found.winner.error <= true.error
    assert f"{found.winner.candidate.name} explains the floors best" in found.verdict()
    better = [f for f in found.fits if f.error is not None and f.error < found.chosen.error]
    assert f"importance, law at hook comes {len(better) + 1} of 6" in found.verdict()


@pytest.mark.parametrize(
    ("c", "says"),
    [(1.0, "1 is inside, so it may be right as it is"), (0.8, "1 is outside, so it is not right as it is")],
)
def test_a_prediction_in_nats_can_be_wrong_as_it_is(c: float, says: str) -> None:
    found = decomposed(floors(lambda w: c * PREDICTED[w] + 0.1, seeds=2, noise=0.01), unit="nats per token")
    (as_is,) = (f for f in found.fits if f.candidate.as_is)
    (fitted_c,) = found.in_nats()
    assert fitted_c is found.chosen
    assert (as_is.c, as_is.candidate.name) == (Estimate(1.0), "importance, law at hook, C = 1")
    assert as_is.b.value == pytest.approx(np.mean([f.value - PREDICTED[f.width] for f in found.observed]))
    assert as_is.error is not None
    assert (as_is.error < 0.02) == (c == 1)
    assert any(says in note for note in found.notes())
    assert not any("as it is" in note for note in decomposed(floors(lambda w: PREDICTED[w])).notes())


def test_the_best_that_knows_nothing_of_features_is_named() -> None:
    assert (
        decomposed(floors(lambda w: 0.3 + 20 / w))
        .notes()[1]
        .startswith("the best of 6 candidates was chosen by its error on 7 widths")
    )
    assert "know nothing of features, 1/d is the best" in decomposed(floors(lambda w: PREDICTED[w])).notes()[1]


def test_floors_that_are_all_the_same_are_a_constant() -> None:
    found = fitted("constant", points(floors(lambda w: 0.7, seeds=2, noise=0.01)))
    assert found.c is None
    assert found.b.value == pytest.approx(np.mean([f.value for f in floors(lambda w: 0.7, seeds=2, noise=0.01)]))
    assert found.r2 == pytest.approx(0)


def test_fits_and_errors_are_scikit_learns() -> None:
    observed = floors(lambda w: 0.3 + 10 / w**0.7, seeds=3, noise=0.05)
    of = points(observed)
    found = fitted("1/d", of)
    x = 1 / of.widths[:, None]
    line = LinearRegression().fit(x, of.floors)
    assert found.c is not None
    assert found.c.value == pytest.approx(line.coef_[0])
    assert found.b.value == pytest.approx(line.intercept_)
    assert found.r2 == pytest.approx(line.score(x, of.floors))
    left_out = cross_val_predict(LinearRegression(), x, of.floors, groups=of.widths, cv=LeaveOneGroupOut())
    misses = [np.mean((of.floors - left_out)[of.widths == w]) for w in WIDTHS]
    assert found.error == pytest.approx(np.sqrt(np.mean(np.square(misses))))
    for estimate in (found.c, found.b):
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high


def test_power_laws_find_their_exponent() -> None:
    found = fitted("power law in d", points(floors(lambda w: 0.4 + 7 * w**-0.9)))
    assert found.exponent is not None
    assert found.exponent.value == pytest.approx(0.9, abs=1e-3)
    assert found.b.value == pytest.approx(0.4, abs=1e-3)
    assert found.exponent.low == pytest.approx(0.9, abs=1e-2)  # as floors without noise leave nothing to doubt
    assert found.exponent.high == pytest.approx(0.9, abs=1e-2)
    # The parameters here are d², so the exponent is half of it.
    halved = fitted("power law in parameters", points(floors(lambda w: 0.4 + 7 * w**-0.9))).exponent
    assert halved is not None
    assert halved.value == pytest.approx(0.45, abs=1e-3)


def test_r2_of_one_over_d_on_the_published_floors() -> None:
    """Why R² alone is not reported: the paper's own predicted floors (layer 12 of Pythia-410M, as it prints them) are
    nearly a straight line in 1/d.
    """
    printed = {128: 0.07949, 256: 0.04004, 512: 0.01109, 768: 0.00159, 1024: 0.0000686}
    x = np.array(list(printed), dtype=np.float64)
    assert fitted("1/d", Points(x, np.array(list(printed.values())), x)).r2 == pytest.approx(0.992, abs=5e-4)


def test_few_widths_make_no_winner() -> None:
    found = decomposed(floors(lambda w: PREDICTED[w], widths=(16, 32, 64)))
    assert found.winner is None
    assert found.verdict() == "3 widths are too few to say which law holds: observe at least 5"
    assert {f.candidate.name: f.error is None for f in found.fits}["power law in d"]
    one = decomposed(floors(lambda w: PREDICTED[w], widths=(16,)))
    assert one.verdict() == "1 width is too few to say which law holds: observe at least 5"
    assert all(f.error is None and f.b.low is None for f in one.fits)
    json.dumps(one.to_json(), allow_nan=False)


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_with_the_floors_is_said() -> None:
    rising = decomposed(floors(lambda w: w / 100))
    assert any("do not fall with the width" in note for note in rising.notes())
    assert any("is negative" in note for note in rising.notes())
    flat = decomposed(floors(lambda w: 1 / w), dict.fromkeys(WIDTHS, 0.0))
    assert flat.chosen.c is None
    assert any("so there is no C" in note for note in flat.notes())
    far = [replace(f, last_tenth=2 * f.value) for f in floors(lambda w: 1.0)]
    assert any("7 students have not come near their floor" in note for note in decomposed(far).notes())
    unfitted = [replace(f, low=None, high=None) for f in floors(lambda w: 1.0)]
    assert any("7 students have too few evaluations" in note for note in decomposed(unfitted).notes())


def test_the_control_is_no_point_of_the_fit() -> None:
    students = floors(lambda w: PREDICTED[w])
    control = replace(students[-1], name="control", start="teacher", value=0.0)
    found = decomposed([*students, control])
    assert found.chosen.r2 == pytest.approx(1)
    assert len(found.table_of_floors()) == len(students)
    assert len(found.observed) == len(students) + 1


@pytest.fixture(scope="module")
def measured(make_model: Callable[..., Any], make_sae: Callable[..., Any]) -> Measurement:
    model = make_model("gpt_neox")
    saes = {f"blocks.{layer}.hook_resid_post": make_sae("topk", f"blocks.{layer}.hook_resid_post") for layer in (0, 1)}
    tokens = np.random.default_rng(0).integers(1, 100, size=(60, 20))
    with add_capacity_hooks(model, saes) as capacity:
        capacity.model_name = "teacher"
        capacity.run(tokens, progress=False)
    return capacity.measurement()


@pytest.fixture
def run() -> DistillationRun:
    share = np.arange(1, 21)
    students = [
        StudentCurve(
            f"w{w}",
            w,
            0,
            "random",
            100 * w,
            10 * w * w,
            (0, *map(int, 100 * share)),
            (3.0, *(8 / w + 1 / share)),
            (1.0,) * 20,
        )
        for w in (4, 8, 12, 16, 24)
    ]
    return DistillationRun(tuple(students), teacher="teacher", teacher_width=32)


def test_every_importance_and_law_is_a_candidate(measured: Measurement, run: DistillationRun) -> None:
    found = decompose(measured, run, importance="decoder_weighted", max_fvu=None)
    free = [
        e.name for e in plugins().importance_estimators if e.name not in ("gradient", "fisher", "integrated_gradients")
    ]
    names = {f.candidate.name for f in found.fits}
    for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"):
        assert {f"{e}, {law.name} at {hook}" for e in free for law in plugins().capacity_laws} <= names
        assert {f"naive floor, {law.name} at {hook}" for law in plugins().capacity_laws} <= names
    assert found.chosen.candidate.name == "decoder_weighted, compressed_sensing at blocks.1.hook_resid_post"
    assert found.unit == "activation²"
    predicted = {
        f.width: f.predicted_floor
        for f in measured.floors(run.widths, "decoder_weighted", max_fvu=None)
        if f.hook == "blocks.1.hook_resid_post"
    }
    assert found.predicted == predicted
    assert [row["predicted_floor"] for row in found.table_of_floors()] == [predicted[w].value for w in run.widths]
    content = found.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [c["leave_one_width_out_error"] for c in content["candidates"]] == sorted(
        c["leave_one_width_out_error"] for c in content["candidates"]
    )
    console = Console(width=160, record=True, file=StringIO())
    console.print(found)
    shown = console.export_text()
    assert found.verdict().split(",")[0] in shown.replace("\n", " ")
    assert "asked for" in shown


@pytest.mark.usefixtures("unchecked")
def test_the_last_tenth_can_be_taken_instead(measured: Measurement, run: DistillationRun) -> None:
    found = decompose(measured, run, observed="last_tenth", max_fvu=None)
    assert [row["observed_floor"] for row in found.table_of_floors()] == pytest.approx(
        [8 / w + (1 / 19 + 1 / 20) / 2 for w in run.widths]
    )
    assert all(row["observed_low"] is None for row in found.table_of_floors())


def test_what_does_not_belong_together_is_refused(measured: Measurement, run: DistillationRun) -> None:
    with pytest.raises(MeasurementError, match="the measurement is of 'teacher' and the distillation of 'another'"):
        decompose(measured, replace(run, teacher="another"))
    with pytest.raises(MeasurementError, match="has not ended"):
        decompose(measured, replace(run, complete=False))
    with pytest.raises(CapacityError, match="'best' is no observed floor"):
        decompose(measured, run, observed="best")
    with pytest.raises(CapacityError, match=r"'blocks\.9\.hook_resid_post' was not measured"):
        decompose(measured, run, hook="blocks.9.hook_resid_post")
    with pytest.raises(CapacityError, match="there is no importance estimator"):
        decompose(measured, run, importance="guess", max_fvu=None)
    with pytest.raises(CapacityError, match="there is no capacity law"):
        decompose(measured, run, law="guess", max_fvu=None)
    with pytest.raises(MeasurementError, match="measured without the importance estimator 'gradient'"):
        decompose(measured, run, importance="gradient", max_fvu=None)
    control = tuple(replace(s, start="teacher") for s in run)
    with pytest.raises(MeasurementError, match="has no students but the control"):
        decompose(measured, replace(run, students=control), max_fvu=None)


@pytest.mark.usefixtures("unchecked")
def test_the_command(
    measured: Measurement, run: DistillationRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tl_capacity.cli import main

    measured.save(tmp_path / "m")
    run.save(tmp_path / "d")
    arguments = ["decompose", str(tmp_path / "m"), str(tmp_path / "d"), "--max-fvu", "inf"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--json"])
    assert done.value.code == 0
    content = json.loads(capsys.readouterr().out)
    assert content == decompose(measured, run, max_fvu=None).to_json()
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    assert "leave-one-width-out" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["decompose", str(tmp_path / "d"), str(tmp_path / "m")])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.usefixtures("unchecked")
def test_what_the_table_shows() -> None:
    """The best, every rival, the best naive floor, and every importance at the hook point and by the law that are asked
    for.
    """
    found = decomposed(floors(lambda width: 3 / width))
    assert [f for _, f in found.shown()] == list(found.fits)
    names = {f.candidate.name for _, f in found.shown(most=0)}
    assert names == {*RIVAL, "naive floor, law at hook", found.chosen.candidate.name}


def test_a_single_width_explains_nothing() -> None:
    found = decomposed(floors(lambda width: 3 / width, widths=(16,), seeds=2))
    assert {(f.r2, f.exponent, f.error) for f in found.fits} == {(None, None, None)}
    with Console(width=200).capture() as _:
        Console(width=200).print(found)
