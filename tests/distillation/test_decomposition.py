"""Decomposition: fits against independent ones, the honest verdict, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from tl_capacity.distillation.candidates import OFFSET, Points, shapes_of
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.decomposition import Decomposition, decompose, decompose_floors
from tl_capacity.distillation.fitting import Fit, fit_candidates
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.distillation.standings import candidate_cells
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import FloorContext, FloorPredictor
from tl_capacity.measure.attach import add_capacity_hooks
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins, register_plugin, unregister_plugin
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.estimate import Estimate, group_resamples

WIDTHS = (16, 24, 32, 48, 64, 96, 128)
PREDICTED = {16: 9.0, 24: 6.5, 32: 4.6, 48: 2.2, 64: 1.0, 96: 0.1, 128: 0.0}
ASKED = ("importance", "hook", "", "law", "second_moment")
NAME = "second_moment, law at hook"
RIVALS = ("constant", "1/d", "1/√d", "power law in d", "power law in parameters")


def floors(
    of: Callable[[int], float], widths: tuple[int, ...] = WIDTHS, seeds: int = 1, noise: float = 0.0
) -> list[ObservedFloor]:
    random = np.random.default_rng(0)
    values = [(w, s, of(w) + noise * random.normal()) for w in widths for s in range(seeds)]
    return [
        ObservedFloor(f"{w}-{s}", w, s, "random", v - 0.02, v - 0.03, v - 0.01, v, 0.1, 1.0, 0.001)
        for w, s, v in values
    ]


def forecasts(widths: tuple[int, ...], predicted: dict[int, float] = PREDICTED, unit: str = "unit") -> Forecasts:
    """One prediction with its naive floor, and the rivals that only the width decides."""
    told = {"hook": "hook", "law": "law", "unit": unit}
    records = [Forecast("importance", w, Estimate(predicted[w]), order="second_moment", **told) for w in widths]
    records += [Forecast("naive", w, Estimate(max(0.0, 10 - 0.1 * w)), **told) for w in widths]
    at = FloorContext(parameters={w: w**2 for w in widths})
    for name in RIVALS:
        rival = plugins().floor_predictors[name]
        said = rival.floors(widths, at)
        assert said is not None
        records += [Forecast(name, w, Estimate(x), unit=rival.unit) for w, x in zip(widths, said, strict=True)]
    return Forecasts(tuple(records))


def decomposed(
    observed: list[ObservedFloor],
    predicted: dict[int, float] = PREDICTED,
    unit: str = "unit",
    which: str = "last_tenth",
) -> Decomposition:
    widths = tuple(sorted({f.width for f in observed if f.start != "teacher"}))
    return decompose_floors(observed, forecasts(widths, predicted, unit), ASKED, which)


def fitted(name: str, of: Points) -> Fit:
    widths = tuple(np.unique(of.widths).astype(int).tolist())
    everybody = [
        c
        for shape in shapes_of(forecasts(widths, dict.fromkeys(widths, 1.0)), widths).values()
        for c in shape.candidates()
    ]
    (candidate,) = (candidate for candidate in everybody if candidate.name == name)
    return fit_candidates([candidate], of, group_resamples(of.widths))[0]


def points(observed: list[ObservedFloor]) -> Points:
    widths = np.array([f.width for f in observed], dtype=np.float64)
    return Points(widths, np.array([f.last_tenth for f in observed]))


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
    assert "better than those that know none, with" in found.verdict()
    assert any(f"the requested prediction, {NAME}, misses a left-out width by" in note for note in found.notes())


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("1/d", lambda w: 0.3 + 20 / w),
        ("power law in d", lambda w: 0.3 + 5 * w**-0.4),
        ("naive, law at hook", lambda w: 0.2 + 0.3 * max(0.0, 10 - 0.1 * w)),
    ],
)
def test_another_candidate_is_named_where_it_holds(name: str, of: Callable[[int], float]) -> None:
    found = decomposed(floors(of, seeds=2, noise=1e-6))
    assert found.winner is not None
    assert found.winner is not found.chosen
    (true,) = (f for f in found.fits if f.candidate.name == name)
    assert true.error is not None
    assert found.chosen.error is not None
    assert true.error < 1e-4 < 1e-2 < found.chosen.error  # a power law with the right exponent may be as good as 1/d
    assert found.winner.error is not None
    assert found.winner.error < 1e-4
    assert found.winner.candidate.shape.knows_features == true.candidate.shape.knows_features
    side = (
        "know no features predict"
        if not true.candidate.shape.knows_features
        else "know features of the teacher predict"
    )
    assert f"candidates that {side} a left-out width better" in found.verdict()


@pytest.mark.parametrize(
    ("c", "b", "says"),
    [
        (1.0, 0.0, "it may be right as it is"),
        (0.8, 0.0, "it is not right as it is (C must be within 0.1 of 1"),
        (1.0, 2.0, "it is not right as it is (B must be within 0.53 of 0, with 0 in its interval"),
    ],
)
def test_a_prediction_in_nats_can_be_wrong_as_it_is(c: float, b: float, says: str) -> None:
    found = decomposed(floors(lambda w: c * PREDICTED[w] + b, seeds=2, noise=0.01), unit="nats per token")
    (offset,) = (
        f for f in found.fits if f.candidate.form is OFFSET and f.candidate.shape is found.chosen.candidate.shape
    )
    assert found.chosen in found.in_nats()
    assert (offset.c, offset.candidate.name) == (Estimate(1.0), f"{NAME}, C = 1")
    assert offset.b.value == pytest.approx(np.mean([f.last_tenth - PREDICTED[f.width] for f in found.observed]))
    assert offset.error is not None
    assert (offset.error < 0.02) == (c == 1)
    assert any(says in note for note in found.notes())
    assert not any("as it is" in note for note in decomposed(floors(lambda w: PREDICTED[w])).notes())


def test_three_undertrained_widths_are_not_called_right() -> None:
    """C = 1 lies inside a wide interval, B is far from 0, and there are three widths: nothing is called right."""
    found = decomposed(floors(lambda w: 1.28 * PREDICTED[w] + 2.7, (16, 32, 64), 2, 3.0), unit="nats per token")
    assert found.chosen.c is not None
    assert found.chosen.c.low is not None
    assert found.chosen.c.low < 1
    told = [note for note in found.notes() if "predicts nats per token" in note]
    assert told
    assert all("3 widths are too few to say whether it is right as it is" in note for note in told)


def test_both_readings_of_the_floor_have_a_verdict() -> None:
    observed = floors(lambda w: 0.3 + 20 / w, seeds=2, noise=1e-6)
    found = decomposed(observed)
    assert list(found.verdicts()) == ["last_tenth", "fit"]
    assert found.notes()[:2] == list(found.verdicts().values())
    assert found.notes()[0].startswith("by the mean of the last tenth, candidates that know no features")
    assert found.notes()[1].startswith("by L∞ of the fit, ")
    assert decomposed(observed, which="fit").verdict() == found.notes()[1]


def test_a_unit_is_written_once() -> None:
    found = decomposed(floors(lambda w: PREDICTED[w], seeds=2), unit="nats per token")
    console = Console(width=400, record=True, file=StringIO())
    console.print(found)
    for text in (console.export_text(), found._repr_html_(), json.dumps(found.to_json())):
        assert "nats per token" in text
        assert "per token per token" not in text


def test_floors_that_are_all_the_same_are_a_constant() -> None:
    found = fitted("constant, B = 0", points(floors(lambda w: 0.7, seeds=2, noise=0.01)))
    assert found.c is not None
    assert found.c.value == pytest.approx(np.mean([f.last_tenth for f in floors(lambda w: 0.7, seeds=2, noise=0.01)]))
    assert found.b == Estimate(0.0)
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
    assert fitted("1/d", Points(x, np.array(list(printed.values())))).r2 == pytest.approx(0.992, abs=5e-4)


def test_few_widths_make_no_winner() -> None:
    found = decomposed(floors(lambda w: PREDICTED[w], widths=(16, 32, 64)))
    assert found.winner is None
    assert found.verdict() == "3 widths are too few to say which law holds: observe at least 5"
    assert {f.candidate.name: f.error is None for f in found.fits}["power law in d"]
    assert (found.groups, found.best) == ((), (None, None))
    assert [fit for _, fit in found.shown()] == [found.chosen]
    assert {place for place, _ in found.shown()} == {""}
    header, (row,) = candidate_cells(found.shown(), found.chosen, lambda candidate: candidate.name)
    assert row[header.index("place")] == "asked for"
    assert [f.candidate.name for f in found.fits] == [
        f.candidate.name for f in decomposed(floors(lambda w: 1 / w, (16, 32, 64))).fits
    ]
    one = decomposed(floors(lambda w: PREDICTED[w], widths=(16,)))
    assert one.verdict() == "1 width is too few to say which law holds: observe at least 5"
    assert all(f.b.low is None for f in one.fits)
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
    for which, says in (
        ("fit", "L∞ is extrapolated"),
        ("last_tenth", "the mean of the last tenth is only an upper bound"),
    ):
        notes = decomposed(far, which=which).notes()
        assert any("7 students ended more than a tenth above their floor" in note and says in note for note in notes)
    unfitted = [replace(f, low=None, high=None) for f in floors(lambda w: 1.0)]
    assert any("7 students have too few evaluations" in note for note in decomposed(unfitted, which="fit").notes())


def test_the_control_is_no_point_of_the_fit() -> None:
    students = floors(lambda w: PREDICTED[w])
    control = replace(students[-1], name="control", start="teacher", last_tenth=0.0)
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
        assert {f"naive, {law.name} at {hook}" for law in plugins().capacity_laws} <= names
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
    assert shown.startswith(found.verdict()[:40].capitalize())  # the answer comes first
    assert "asked for" in shown


@pytest.mark.usefixtures("unchecked")
def test_the_last_tenth_is_taken_and_the_fit_can_be(measured: Measurement, run: DistillationRun) -> None:
    found = decompose(measured, run, max_fvu=None)
    assert [row["observed_floor"] for row in found.table_of_floors()] == pytest.approx(
        [8 / w + (1 / 19 + 1 / 20) / 2 for w in run.widths]
    )
    for row in found.table_of_floors():
        assert row["observed_low"] <= row["observed_floor"] <= row["observed_high"]
    fit = decompose(measured, run, observed="fit", max_fvu=None)
    assert [row["observed_floor"] for row in fit.table_of_floors()] == pytest.approx(
        [8 / w for w in run.widths], abs=1e-3
    )


def test_what_does_not_belong_together_is_refused(measured: Measurement, run: DistillationRun) -> None:
    with pytest.raises(MeasurementError, match="the measurement is of 'teacher', but the distillation is of 'another'"):
        decompose(measured, replace(run, teacher="another"))
    with pytest.raises(MeasurementError, match="has not ended"):
        decompose(measured, replace(run, complete=False))
    with pytest.raises(CapacityError, match="'best' is not a way to read the observed floor"):
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
    with pytest.raises(MeasurementError, match="has only the control student"):
        decompose(measured, replace(run, students=control), max_fvu=None)


@pytest.mark.slow
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
    assert "Error at a left-out width" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["decompose", str(tmp_path / "d"), str(tmp_path / "m")])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.usefixtures("unchecked")
def test_what_the_table_shows() -> None:
    """Of each number of constants the best, the best rival and the shape that is asked for."""
    found = decomposed(floors(lambda width: 3 / width))
    assert sorted(id(fit) for _, fit in found.shown(most=100)) == sorted(map(id, found.fits))
    shown = [fit for _, fit in found.shown(most=0)]
    assert [fit.candidate.constants for fit in shown] == sorted(fit.candidate.constants for fit in shown)
    assert found.chosen in shown
    for constants in (1, 2, 3):
        rivals = [f for f in found.fits if f.candidate.constants == constants and not f.candidate.shape.knows_features]
        assert rivals[0] in shown
        assert not any(rival in shown for rival in rivals[1:])


def test_a_single_width_explains_nothing() -> None:
    found = decomposed(floors(lambda width: 3 / width, widths=(16,), seeds=2))
    assert {(f.r2, f.exponent, f.error) for f in found.fits} == {(None, None, None)}
    assert found.plot() is not None
    with Console(width=200).capture() as _:
        Console(width=200).print(found)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_forecasts_for_which_the_teacher_was_run_are_candidates(
    measured: Measurement, run: DistillationRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tl_capacity.cli import main

    rival = tuple(Forecast("pca_splice", w, Estimate(9 / w), hook="blocks.0.hook_resid_post") for w in run.widths)
    short = Forecast("truncated_start", 4, Estimate(3.0))
    told = Forecasts((*rival, short), about={"model": "teacher"})
    (hook, _) = measured
    kept = (0, 10, int(hook.summary.n_alive.value))
    curve = SplicedCurve(
        hook.hook,
        hook.sae,
        hook.sae_digest,
        hook.architecture,
        hook.width,
        hook.estimator().name,
        "mean",
        False,
        kept,
        np.outer(np.full(16, 100), (3.0, 1.0, 0.2)),
        np.full(16, 100),
    )
    spliced = Spliced((curve,), {"model": "teacher"})
    found = decompose(measured, run, max_fvu=None, forecasts=[spliced, told])
    names = {f.candidate.name: f.candidate for f in found.fits}
    assert {f"pca_splice at {hook.hook}{form}" for form in (", as it is", ", C = 1", ", B = 0", "")} <= set(names)
    splice = names[f"splice, second_moment, compressed_sensing at {hook.hook}, as it is"]
    assert splice.shape.knows_features
    assert not names[f"pca_splice at {hook.hook}"].shape.knows_features
    assert splice.shape.x == {f.width: f.floor.value for f in spliced.floors([hook], run.widths)}
    group = next(group for group in found.groups if group.constants == 0)
    assert group.features is not None
    assert group.rivals is not None
    assert any(
        "truncated_start has no floor at width 8, 12, 16, 24, so it is not a candidate" in n for n in found.notes()
    )
    with pytest.raises(MeasurementError, match=r"the forecasts are of the teacher 'another' and not of"):
        decompose(measured, run, max_fvu=None, forecasts=[replace(told, about={"model": "another"})])
    others = Spliced((replace(curve, sae_digest="1" * 64),), spliced.about)
    for other, says in ((replace(spliced, about={"model": "another"}), "of the model 'another'"), (others, "of other")):
        with pytest.raises(MeasurementError, match=f"the splice is {says}"):
            decompose(measured, run, max_fvu=None, forecasts=[other])
    for folder, result in (("m", measured), ("d", run), ("s", spliced), ("f", told)):
        result.save(tmp_path / folder)
    paths = [str(tmp_path / folder) for folder in "mdsf"]
    arguments = ["decompose", *paths[:2], "--with", paths[2], "--with", paths[3], "--max-fvu", "inf", "--json"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out) == found.to_json()
    with pytest.raises(SystemExit) as done:
        main(["decompose", *paths[:2], "--with", paths[1]])
    assert (done.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


@pytest.mark.usefixtures("unchecked")
def test_a_predictor_of_ones_own_is_a_candidate(measured: Measurement, run: DistillationRun) -> None:
    class Cube(FloorPredictor):
        """1/d_S³."""

        name = "1/d³"
        unit = "1/dimension³"
        constants = 1
        knows_features = False
        varies_with = ()

        def floors(self, widths: Sequence[int], at: FloorContext) -> list[float]:
            return [width**-3 for width in widths]

    class Plugin:
        @hookimpl
        def register_floor_predictors(self, register: Callable[[FloorPredictor], None]) -> None:
            register(Cube())

    register_plugin(Plugin(), "cube")
    try:
        found = decompose(measured, run, max_fvu=None)
    finally:
        unregister_plugin("cube")
    fits = {fit.candidate.name: fit for fit in found.fits}
    assert {"1/d³, B = 0", "1/d³"} <= set(fits)
    assert "1/d³, any power" not in fits  # which is the power law in d
    assert not fits["1/d³"].candidate.shape.knows_features
    assert fits["1/d³"].candidate in next(group for group in found.groups if group.constants == 2).places
