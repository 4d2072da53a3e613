"""Effective capacity against a search through every number of features, and on students of a planted capacity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from measurements import KEPT, curve_at, measurement_of_counts, students_with
from rich.console import Console
from scipy.interpolate import PchipInterpolator

from tl_capacity import CapacityError, Measurement, effective_capacity
from tl_capacity.distillation.by_width import drawn_means, floors_by_width
from tl_capacity.distillation.observed import observed_floors
from tl_capacity.errors import MeasurementError
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.estimate import Estimate

pytestmark = pytest.mark.usefixtures("few_replicates")

MEASURED = measurement_of_counts((64 * np.ceil(120 / np.arange(1, 201))).astype(np.int64))
HOOK = MEASURED.hooks[0]
ERROR = 0.05


def kl(kept: float) -> float:
    """Falls as features stay, down to the dictionary's own error."""
    return ERROR + 3 * (1 - np.log1p(kept) / np.log1p(200))


SPLICED = Spliced((curve_at(HOOK, kl),))
WIDTHS = (2, 4, 8, 12)


def planted(per_dimension: float, seeds: int = 1, spread: float = 0.0) -> dict[int, list[float]]:
    """Floors of students that are worth so many features for each dimension."""
    [curve] = SPLICED
    return {
        width: [curve.at(per_dimension * width).value * (1 + spread * seed) for seed in range(seeds)]
        for width in WIDTHS
    }


@given(st.floats(1.0, 16.0))
@settings(max_examples=8, deadline=None)
def test_a_planted_capacity_is_found(per_dimension: float) -> None:
    found = effective_capacity(MEASURED, SPLICED, students_with(planted(per_dimension)))
    assert [row.width for row in found.rows] == list(WIDTHS)
    for row in found.rows:
        assert row.features is not None
        assert row.per_dimension is not None
        # The first whole number of features that is enough.
        assert per_dimension * row.width <= row.features.value + 1e-6
        assert row.features.value < per_dimension * row.width + 1 + 0.01 * row.features.value
        assert row.per_dimension.value == row.features.value / row.width


def test_features_are_the_fewest_that_a_search_finds() -> None:
    run = students_with({3: [1.2], 7: [0.7, 0.74]})
    curve = PchipInterpolator(np.log1p(KEPT), [kl(number) for number in KEPT])
    for row, floor in zip(effective_capacity(MEASURED, SPLICED, run).rows, (1.2, 0.72), strict=True):
        fewest = next(n for n in range(201) if curve(np.log1p(n)) <= floor)
        assert row.observed.value == pytest.approx(floor)
        assert row.features is not None
        assert row.features.value == fewest


def test_the_capacity_function_stands_beside_it() -> None:
    found = effective_capacity(MEASURED, SPLICED, students_with(planted(5.0)))
    alpha = 1 - HOOK.summary.l0.value / HOOK.summary.n_alive.value
    for row in found.rows:
        assert row.expected.value == pytest.approx(1 / ((1 - alpha) * np.log(1 / (1 - alpha))))
        assert row.expected.value == pytest.approx(HOOK.summary.capacity.value)
        assert (row.expected.low, row.expected.high) == pytest.approx(
            (HOOK.summary.capacity.low, HOOK.summary.capacity.high)
        )
    figure = found.plot()
    worth, law = figure.data
    assert list(worth.x) == list(law.x) == list(WIDTHS)
    assert list(worth.y) == [row.per_dimension.value for row in found.rows if row.per_dimension]
    assert list(law.y) == [row.expected.value for row in found.rows]
    assert "compressed_sensing" in law.name


def test_seeds_that_differ_and_documents_widen_the_interval() -> None:
    def width_of(estimate: Estimate | None) -> float:
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high
        return estimate.high - estimate.low

    alike, apart = (
        effective_capacity(MEASURED, SPLICED, students_with(planted(6.0, 3, spread))).rows for spread in (0.0, 0.1)
    )
    assert all(width_of(row.features) > 0 for row in alike)  # documents of the splice
    assert all(width_of(b.features) > width_of(a.features) for a, b in zip(alike, apart, strict=True))
    assert [row.students for row in apart] == [3] * len(WIDTHS)


def test_drawn_means_are_those_of_a_bootstrap() -> None:
    students = [Estimate(0.4), Estimate(0.5), Estimate(0.9)]
    drawn = drawn_means(students, 20_000)
    values = np.array([student.value for student in students])
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.005)
    assert drawn.std() == pytest.approx(values.std() / np.sqrt(3), rel=0.03)
    noisy = drawn_means([Estimate(0.5, 0.5 - 0.196, 0.5 + 0.196)], 20_000)
    assert noisy.std() == pytest.approx(0.1, rel=0.03)
    assert drawn_means([Estimate(0.0, 0.0, 0.5)], 1_000).min() == 0


def test_below_the_dictionary_s_own_error_nothing_is_worth_as_much() -> None:
    found = effective_capacity(MEASURED, SPLICED, students_with({**planted(5.0), 16: [ERROR / 2]}))
    *others, last = found.rows
    assert last.features is None
    assert last.per_dimension is None
    assert all(row.features is not None for row in others)
    assert any(note.startswith("students of width 16 reached 0.025") for note in found.notes())
    assert "not reached" in found._repr_html_()
    none = effective_capacity(MEASURED, SPLICED, students_with({16: [ERROR / 2]}))
    assert "students of every width are worth more than all" in none.verdict()[0]
    with pytest.raises(CapacityError, match="splice one that reconstructs better"):
        none.plot()


def test_too_few_documents_give_no_interval_and_say_so() -> None:
    few = Spliced((curve_at(HOOK, kl, groups=4),))
    found = effective_capacity(MEASURED, few, students_with(planted(5.0)))
    assert all(row.features is not None and row.features.low is None for row in found.rows)
    assert "some numbers have no interval: splice on more text" in found.notes()


def test_what_it_says() -> None:
    found = effective_capacity(MEASURED, SPLICED, students_with(planted(5.0, 2)), law="equilibrium")
    assert found.law == "equilibrium"
    [verdict] = found.verdict()
    assert "students of widths 2 to 12 are worth 5" in verdict
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["verdict"] == [verdict]
    assert [row["width"] for row in content["widths"]] == list(WIDTHS)
    frame = found.to_frame()
    assert list(frame.per_dimension_low) == [row.per_dimension.low for row in found.rows if row.per_dimension]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(found)
    assert "students of widths 2 to 12 are worth 5" in shown.get()
    assert not [note for note in found.notes() if "one student" in note]
    alone = effective_capacity(MEASURED, SPLICED, students_with(planted(5.0)))
    assert any("widths 2, 4, 8, 12 had one student" in note for note in alone.notes())


def test_several_curves_are_told_apart() -> None:
    other = curve_at(HOOK, lambda kept: kl(kept) + 0.1, order="random")
    both = Spliced((*SPLICED, other))
    found = effective_capacity(MEASURED, both, students_with(planted(5.0)))
    assert list(found.series()) == [
        (HOOK.hook, HOOK.sae, "second_moment"),
        (HOOK.hook, HOOK.sae, "random"),
    ]
    assert [trace.name for trace in found.plot().data][::2] == ["second_moment", "random"]
    asked = effective_capacity(MEASURED, both, students_with(planted(5.0)), importance="random")
    assert asked.rows == found.rows[len(WIDTHS) :]


def test_what_does_not_belong_together_is_refused() -> None:
    run = students_with(planted(5.0))
    with pytest.raises(
        MeasurementError, match="the measurement is of 'unnamed model', but the distillation is of 'other'"
    ):
        effective_capacity(MEASURED, SPLICED, replace(run, teacher="other"))
    with pytest.raises(MeasurementError, match="has not ended"):
        effective_capacity(MEASURED, SPLICED, replace(run, complete=False))
    with pytest.raises(CapacityError, match="'best' is not a way to read the observed floor"):
        effective_capacity(MEASURED, SPLICED, run, observed="best")
    with pytest.raises(CapacityError, match="was not measured"):
        effective_capacity(MEASURED, SPLICED, run, hook="blocks.7.hook_resid_post")
    with pytest.raises(CapacityError, match="the splice has no curve for this hook point"):
        effective_capacity(MEASURED, SPLICED, run, importance="random")
    other = Spliced((replace(curve_at(HOOK, kl), sae_digest="1" * 64),))
    with pytest.raises(CapacityError, match="the splice has no curve for this hook point"):
        effective_capacity(MEASURED, other, run)
    control = replace(run, students=tuple(replace(student, start="teacher") for student in run))
    with pytest.raises(MeasurementError, match="only the control student"):
        effective_capacity(MEASURED, SPLICED, control)


def test_the_control_is_no_student_of_its_width() -> None:
    run = students_with({4: [0.5], 16: [0.1]})
    run = replace(run, students=(run.students[0], replace(run.students[1], start="teacher")))
    assert floors_by_width(observed_floors(run), "last_tenth") == {4: (observed_floors(run)[0].taken_as("last_tenth"),)}


def test_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    MEASURED.save(tmp_path / "m")
    SPLICED.save(tmp_path / "s")
    run = students_with(planted(5.0))
    run.save(tmp_path / "d")
    code, out, err = cli("effective", tmp_path / "m", tmp_path / "d", "--splice", tmp_path / "s", "--json")
    assert (code, err) == (0, "")
    expected = effective_capacity(Measurement.load(tmp_path / "m"), SPLICED, run)
    assert json.loads(out) == json.loads(json.dumps(expected.to_json()))
    code, out, _ = cli("effective", tmp_path / "m", tmp_path / "d", "--splice", tmp_path / "s")
    assert code == 0
    assert "worth" in out
    # The splice does not name the measurement's file, so that it is not taken for one of it.
    code, out, err = cli("effective", tmp_path / "m", tmp_path / "d")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no splice of this measurement lies beside it" in err
