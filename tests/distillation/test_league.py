"""The league: its nested choice against a loop with scikit-learn, planted answers, and floors that are noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import comb
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut

from tl_capacity.distillation.candidates import (
    AS_IS,
    FACTOR,
    LINE,
    OFFSET,
    POWER,
    PURE_POWER,
    Candidate,
    Form,
    Points,
    Shape,
    added_rivals,
)
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.league import FEATURES, NEITHER, RIVALS, Group, league
from tl_capacity.distillation.left_out import Errors, best_of_subset, errors_of, floor_noise, text_noise
from tl_capacity.distillation.observed import ObservedFloor
from tl_capacity.runtime.units import NATS

WIDTHS = np.array([16, 24, 32, 48, 64, 96, 128])
NO_NOISE = np.zeros((0, len(WIDTHS)))


def shape(name: str, x: NDArray[np.float64], knows: bool = True, unit: str = "unit", widths: Any = WIDTHS) -> Shape:
    return Shape(name, dict(zip(widths.tolist(), x.tolist(), strict=True)), knows_features=knows, unit=unit)


def feature_shapes(number: int, seed: int = 0, widths: NDArray[np.int64] = WIDTHS) -> list[Shape]:
    """What is lost of random importance curves: falling, convex, and 0 from some width on, as of dictionaries."""
    random = np.random.default_rng(seed)
    tails = []
    for _ in range(number):
        importance = np.sort(random.pareto(random.uniform(0.7, 3), 2_000))[::-1]
        kept = (widths * random.uniform(8, 15)).astype(int)
        tails.append(np.array([importance[min(k, 2_000) :].sum() for k in kept]) / importance.sum())
    return [shape(f"features {place}", tail, widths=widths) for place, tail in enumerate(tails)]


def rival_shapes(widths: NDArray[np.int64] = WIDTHS) -> list[Shape]:
    return [
        shape("1/d", 1 / widths, knows=False, widths=widths),
        shape("1/√d", widths**-0.5, knows=False, widths=widths),
        shape("variance", np.exp(-widths / 30), knows=False, widths=widths),
    ]


def everybody(shapes: list[Shape]) -> list[Candidate]:
    return [candidate for each in shapes for candidate in each.candidates()]


def students(
    floors: NDArray[np.float64], seeds: int, noise: float, seed: int, widths: Any = WIDTHS
) -> list[ObservedFloor]:
    random = np.random.default_rng(seed)
    values = [
        (int(width), number, floor + noise * random.normal())
        for width, floor in zip(widths, floors, strict=True)
        for number in range(seeds)
    ]
    return [ObservedFloor(f"{w}-{s}", w, s, "random", v, None, None, v) for w, s, v in values]


def played(shapes: list[Shape], observed: list[ObservedFloor]) -> dict[int, Group]:
    points = Points(np.array([f.width for f in observed], dtype=float), np.array([f.last_tenth for f in observed]))
    groups = league(everybody(shapes), points, floor_noise(observed, "last_tenth"))
    return {group.constants: group for group in groups}


def points_of(seeds: int = 2, noise: float = 0.03) -> Points:
    observed = students(0.05 + 12 / WIDTHS, seeds, noise, seed=3)
    return Points(np.array([f.width for f in observed], dtype=float), np.array([f.last_tenth for f in observed]))


def predicted(
    form: Form, x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A form's fit to some students, by scikit-learn, at other widths."""
    if form is AS_IS:
        return at
    if form is OFFSET:
        return at + (y - x).mean()
    if not form.free_exponent:
        line = LinearRegression(fit_intercept=form.free_b).fit(x[:, None], y)
        return np.asarray(line.predict(at[:, None]))

    def line(s: float) -> tuple[NDArray[np.float64], float]:
        columns = np.stack([x**s, np.ones_like(x)][: 1 + form.free_b], 1)
        numbers = np.linalg.lstsq(columns, y, rcond=None)[0]
        return numbers, float(np.square(y - columns @ numbers).sum())

    grid = np.geomspace(0.02, 8, 80)
    start = int(np.argmin([line(s)[1] for s in grid]))
    bounds = (grid[max(0, start - 1)], grid[min(len(grid) - 1, start + 1)])
    s = minimize_scalar(lambda s: line(s)[1], bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    numbers = line(s)[0]
    return np.asarray(numbers[0] * at**s + (numbers[1] if form.free_b else 0))


def nested_loop(candidates: list[Candidate], points: Points) -> list[tuple[float, Candidate]]:
    """For each left-out width, the squared error there of the candidate with the smallest leave-one-width-out error
    among the other widths; and that candidate.
    """

    def x_of(candidate: Candidate) -> NDArray[np.float64]:
        return candidate.shape.at(points.widths)

    def miss(candidate: Candidate, train: NDArray[np.int64], test: NDArray[np.int64]) -> float:
        x = x_of(candidate)
        return float(np.mean(points.floors[test] - predicted(candidate.form, x[train], points.floors[train], x[test])))

    folds = []
    for train, test in LeaveOneGroupOut().split(points.widths, groups=points.widths):
        inner = LeaveOneGroupOut().split(train, groups=points.widths[train])
        pairs = [(train[a], train[b]) for a, b in inner]
        best = min(candidates, key=lambda c: np.mean([miss(c, a, b) ** 2 for a, b in pairs]))
        folds.append((miss(best, train, test) ** 2, best))
    return folds


@pytest.mark.parametrize("form", [AS_IS, OFFSET, FACTOR, LINE])
def test_the_nested_error_is_that_of_a_loop_with_scikit_learn(form: Form) -> None:
    candidates = [Candidate(each, form) for each in [*feature_shapes(4), *rival_shapes()]]
    points = points_of()
    errors = errors_of(candidates, points, NO_NOISE)
    assert errors is not None
    loop = nested_loop(candidates, points)
    assert errors.nested()[:, 0] == pytest.approx([square for square, _ in loop])
    assert errors.chosen() == [candidate for _, candidate in loop]


@pytest.mark.parametrize("form", [PURE_POWER, POWER])
def test_the_same_with_a_free_exponent(form: Form) -> None:
    some = WIDTHS[1:6]
    candidates = [Candidate(each, form) for each in (feature_shapes(1)[0], rival_shapes()[0])]
    points = Points(some.astype(float), 0.05 + 12 / some + 0.02 * np.sin(some))
    errors = errors_of(candidates, points, np.zeros((0, len(some))))
    assert errors is not None
    loop = nested_loop(candidates, points)
    assert np.sqrt(errors.nested()[:, 0]) == pytest.approx(np.sqrt([square for square, _ in loop]), abs=2e-4)
    assert errors.chosen() == [candidate for _, candidate in loop]


def test_fewer_tries_are_the_mean_over_all_subsets() -> None:
    candidates = [Candidate(each, LINE) for each in feature_shapes(5)]
    points = points_of()
    whole = errors_of(candidates, points, NO_NOISE)
    assert whole is not None
    for tries in range(1, 6):
        subsets = [errors_of(list(some), points, NO_NOISE) for some in combinations(candidates, tries)]
        mean = np.mean([some.nested()[:, 0] for some in subsets if some is not None], axis=0)
        assert whole.nested(tries)[:, 0] == pytest.approx(mean)
        exact = [comb(5 - place, tries - 1) / comb(5, tries) for place in range(1, 6)]
        assert best_of_subset(5, tries) == pytest.approx(exact)


def test_candidates_that_differ_by_what_is_fitted_are_one_try() -> None:
    (one,) = feature_shapes(1)
    twin = shape("twin", 3 * np.array(list(one.x.values())))
    moved = shape("moved", 2 + np.array(list(one.x.values())))

    def tries(form: Form) -> int:
        errors = errors_of([Candidate(each, form) for each in (one, twin, moved)], points_of(), NO_NOISE)
        assert isinstance(errors, Errors)
        return errors.tries

    assert (tries(LINE), tries(FACTOR), tries(OFFSET), tries(AS_IS)) == (1, 2, 2, 3)


def test_rivals_are_added_until_both_sides_have_as_many_tries() -> None:
    groups = played([*feature_shapes(9), *rival_shapes()], students(0.1 + 9 / WIDTHS, 2, 0.01, 0))
    assert sorted(groups) == [1, 2, 3]
    for group in groups.values():
        assert group.features is not None
        assert group.rivals is not None
        assert (group.tries, group.features.tries) == (9, 9)
        assert group.rivals.tries <= 3
        assert sum(group.features.chosen.values()) == sum(group.rivals.chosen.values()) == len(WIDTHS)
    assert added_rivals(0, 5, WIDTHS.astype(float)) == []
    for constants in (1, 2, 3):
        added = added_rivals(constants, 5, WIDTHS.astype(float))
        assert {candidate.constants for candidate in added} == {constants}
        assert not any(candidate.shape.knows_features for candidate in added)
        assert len({candidate.name for candidate in added}) == 5


@pytest.mark.parametrize("planted", [0, 5, 11])
def test_a_planted_answer_is_named(planted: int) -> None:
    shapes = [*feature_shapes(12), *rival_shapes()]
    x = np.array(list(shapes[planted].x.values()))
    groups = played(shapes, students(0.1 + 1.3 * x, 2, 0.001, seed=planted))
    assert groups[2].ahead == FEATURES
    assert groups[2].features is not None
    assert groups[2].features.best == Candidate(shapes[planted], LINE)
    assert groups[2].leader is groups[2].features
    assert groups[2].places[Candidate(shapes[planted], LINE)].value == 1


@pytest.mark.parametrize("planted", ["1/d", "1/√d"])
def test_a_planted_rival_is_named(planted: str) -> None:
    rivals = rival_shapes()
    (true,) = (each for each in rivals if each.name == planted)
    x = np.array(list(true.x.values()))
    groups = played([*feature_shapes(12), *rivals], students(0.1 + x / x.max(), 2, 0.001, seed=1))
    assert groups[2].ahead == RIVALS
    assert groups[2].rivals is not None
    assert groups[2].rivals.best == Candidate(true, LINE)


def test_a_planted_prediction_in_nats_needs_no_constant() -> None:
    nats = [shape(each.name, np.array(list(each.x.values())), unit=NATS) for each in feature_shapes(6)]
    rivals = [shape(f"{a}", a * np.exp(-WIDTHS / 40), knows=False, unit=NATS) for a in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    observed = students(np.array(list(nats[2].x.values())), 2, 0.001, seed=5)
    group = played([*nats, *rivals], observed)[0]
    assert group.ahead == FEATURES
    assert group.features is not None
    assert group.features.best == Candidate(nats[2], AS_IS)
    assert group.features.chosen == {f"{nats[2].name}, as it is": len(WIDTHS)}
    # One rival has one try, and nothing can be added to it in nats: one of the six at random is no better.
    alone = played([*nats, rivals[0]], observed)[0]
    assert (alone.ahead, alone.tries) == (NEITHER, 1)
    assert alone.difference is not None
    assert alone.difference[1].low is not None
    assert alone.difference[1].low > 0


@pytest.mark.parametrize("draws", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_noise_is_not_distinguishable(draws: int) -> None:
    """Floors that have nothing to do with any candidate: no side is ahead in any group, in nearly all draws."""
    shapes = [*feature_shapes(6), *rival_shapes()]
    claims = 0
    for seed in range(draws):
        floors = np.random.default_rng(seed).uniform(0.2, 1.0, len(WIDTHS))
        groups = played(shapes, students(floors, 2, 0.02, seed))
        claims += any(group.ahead != NEITHER for group in groups.values())
    assert claims <= 0.13 * draws


def test_too_few_widths_make_no_league() -> None:
    few = WIDTHS[:4]
    shapes = [*feature_shapes(3, widths=few), *rival_shapes(few)]
    assert played(shapes, students(1 / few, 2, 0.01, 0, few)) == {}


def test_one_side_alone_is_not_ahead() -> None:
    groups = played(feature_shapes(3), students(9 / WIDTHS, 2, 0.01, 0))
    for group in groups.values():
        assert (group.rivals, group.difference, group.ahead, group.leader) == (None, None, None, None)


def test_noise_is_pooled_over_the_widths_with_several_seeds() -> None:
    two, one = (students(np.zeros(len(WIDTHS)), seeds, 0.05, 7) for seeds in (2, 1))
    mixed = [*[floor for floor in two if floor.width <= 24], *[floor for floor in one if floor.width > 24]]
    noise = floor_noise(mixed, "last_tenth")
    several = {width: [floor.last_tenth for floor in mixed if floor.width == width] for width in (16, 24)}
    pool = np.concatenate([np.sqrt(2) * (np.array(values) - np.mean(values)) for values in several.values()])
    assert set(np.round(noise[:, -1], 12)) <= set(np.round(pool, 12))
    assert len(floor_noise(one, "last_tenth")) == 0
    told = [
        ObservedFloor("a", 8, 0, "random", 1.0, 0.8, 1.2, 1.1),
        ObservedFloor("b", 16, 0, "random", 1.0, 1.0, 1.0, 1.1),
    ]
    spread = floor_noise(told, "fit").std(0)
    assert spread[0] == pytest.approx(0.4 / (2 * 1.96), rel=0.3)
    assert spread[1] == 0


def test_the_held_out_text_is_resampled_for_all_students_together() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(50, 100, 12)
    observed = students(10 / WIDTHS, 1, 0.0, 0)
    hard = random.uniform(0.5, 1.5, 12)  # the same documents are hard for everybody
    curves = [
        StudentCurve(
            floor.name, floor.width, 0, "random", 1, 1,
            heldout_parts=tuple((int(n), float(n * floor.last_tenth * h)) for n, h in zip(tokens, hard, strict=True)),
        )
        for floor in observed
    ]  # fmt: skip
    noise = text_noise(observed, curves)
    assert noise is not None
    assert noise == pytest.approx(floor_noise(observed, "last_tenth", curves))
    shares = noise / np.array([floor.last_tenth for floor in observed])
    assert shares == pytest.approx(np.repeat(shares[:, :1], len(WIDTHS), 1))
    many = np.random.default_rng(5).integers(0, 12, (20_000, 12))
    expected = ((tokens * hard)[many].sum(1) / tokens[many].sum(1)).std()
    assert shares[:, 0].std() == pytest.approx(expected, rel=0.4)
    assert text_noise(observed, curves[1:]) is None
    other = replace(curves[0], heldout_parts=curves[0].heldout_parts[:-1])
    assert text_noise(observed, [other, *curves[1:]]) is None
    assert text_noise(observed, [replace(curve, heldout_parts=curve.heldout_parts[:7]) for curve in curves]) is None
