"""The closed forms: published figures to the printed digits, identities as properties, the same kind out as in, and a
clear sentence outside the domain.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_capacity import theory

# arXiv:2604.04037, layers 8, 12 and 16 of Pythia-410M: F, L0, α, g(α), d*, as printed.
PUBLISHED_LAYERS = [
    (31_006, 234.9, "0.9924", "27.04", "1147"),
    (28_665, 218.29, "0.99238495", "26.9227", "1064.7"),
    (29_169, 248.96, "0.99146487", "24.5956", "1185.9"),
]

sparse = st.floats(min_value=0.5, max_value=0.9999)
many_features = st.integers(min_value=2, max_value=300_000)
importances = st.lists(st.floats(min_value=0, max_value=1e6), min_size=1, max_size=200)


def as_printed(value: float, printed: str) -> str:
    return f"{value:.{len(printed.partition('.')[2])}f}"


def last_digit(printed: object) -> float:
    return float(10 ** -len(str(printed).partition(".")[2]))


class TestPublishedFigures:
    @pytest.mark.parametrize(("features", "l0", "alpha", "capacity", "width"), PUBLISHED_LAYERS[1:])
    def test_g_and_critical_width_follow_from_alpha_to_every_digit(
        self, features: int, l0: float, alpha: str, capacity: str, width: str
    ) -> None:
        assert theory.sparsity(l0, features) == pytest.approx(float(alpha), abs=5e-7)
        assert as_printed(theory.capacity(float(alpha)), capacity) == capacity
        assert as_printed(theory.critical_width(features, float(alpha)), width) == width

    @pytest.mark.parametrize(("features", "l0", "alpha", "capacity", "width"), PUBLISHED_LAYERS)
    def test_the_printed_l0_admits_every_printed_figure(
        self, features: int, l0: float, alpha: str, capacity: str, width: str
    ) -> None:
        # L0 is printed rounded: each other figure must be what some L0 that rounds so gives, to its own last digit.
        half = last_digit(l0) / 2
        alphas = [theory.sparsity(l0 + shift, features) for shift in (half, -half)]
        for low, high, printed in (
            (*alphas, alpha),
            (*(theory.capacity(a) for a in alphas), capacity),
            (*(theory.critical_width(features, a) for a in reversed(alphas)), width),
        ):
            slack = last_digit(printed) / 2 * (1 + 1e-6)
            assert low - slack <= float(printed) <= high + slack


class TestIdentities:
    @given(st.floats(min_value=1e-3, max_value=0.99), many_features)
    def test_critical_width_is_l0_times_log(self, share: float, features: int) -> None:
        l0 = share * features
        alpha = theory.sparsity(l0, features)
        assert theory.critical_width(features, alpha) == pytest.approx(l0 * math.log(features / l0), rel=1e-9)

    @given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=100))
    def test_heterogeneous_width_is_never_larger(self, rates: list[float]) -> None:
        l0, features = sum(rates), len(rates)
        bound = l0 * math.log(features / l0) if l0 > 0 else 0.0
        assert theory.heterogeneous_critical_width(rates) <= bound * (1 + 1e-9) + 1e-9

    @given(st.floats(min_value=1e-6, max_value=1), st.integers(min_value=1, max_value=1000))
    def test_heterogeneous_width_equals_it_at_equal_rates(self, rate: float, features: int) -> None:
        assert theory.heterogeneous_critical_width([rate] * features) == pytest.approx(
            features * rate * math.log(1 / rate), rel=1e-9, abs=1e-12
        )

    @given(sparse, st.integers(min_value=0, max_value=5000), many_features)
    def test_kept_features_never_exceed_budget_or_all(self, alpha: float, width: int, features: int) -> None:
        kept = theory.kept_features(width, alpha, features)
        assert isinstance(kept, int)
        assert 0 <= kept <= features
        assert kept <= theory.budget(width, alpha)
        assert kept == features or kept + 1 > theory.budget(width, alpha)

    @given(importances, sparse, st.integers(min_value=0, max_value=40))
    def test_floor_is_the_tail_and_falls_with_width(self, importance: list[float], alpha: float, width: int) -> None:
        floor = theory.refined_floor(importance, width, alpha)
        kept = theory.kept_features(width, alpha, len(importance))
        assert floor == pytest.approx(math.fsum(sorted(importance, reverse=True)[kept:]), rel=1e-9, abs=1e-9)
        assert theory.refined_floor(importance, width + 1, alpha) <= floor
        assert theory.refined_floor(importance, 0, alpha) == pytest.approx(math.fsum(importance), rel=1e-9, abs=1e-9)

    @given(
        st.floats(min_value=1e-3, max_value=1e3),
        st.integers(min_value=2, max_value=50),
        sparse,
        st.integers(min_value=0, max_value=20),
    )
    def test_naive_floor_is_linear_in_width(self, each: float, features: int, alpha: float, width: int) -> None:
        expected = each * features * max(0.0, 1 - width * theory.capacity(alpha) / features)
        assert theory.naive_floor([each] * features, width, alpha) == pytest.approx(expected, rel=1e-6, abs=1e-9)

    @given(st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True))
    def test_capacity_is_finite_in_the_whole_domain(self, alpha: float) -> None:
        assert math.e * (1 - 1e-9) <= theory.capacity(alpha) < math.inf  # g is smallest at α = 1 − 1/e
        assert theory.budget(0, alpha) == 0
        assert theory.kept_features(0, alpha, 7) == 0

    @given(st.floats(min_value=1e-300, max_value=1e-9))
    def test_capacity_of_a_small_alpha_is_its_reciprocal(self, alpha: float) -> None:
        assert theory.capacity(alpha) * alpha == pytest.approx(1, rel=1e-8)  # −ln(1 − α) = α + α²/2 + …

    @given(st.floats(min_value=0.1, max_value=0.999999))
    def test_capacity_is_its_formula(self, alpha: float) -> None:
        assert theory.capacity(alpha) == pytest.approx(1 / ((1 - alpha) * math.log(1 / (1 - alpha))), rel=1e-9)

    @given(st.integers(min_value=0, max_value=100), st.floats(min_value=-1, max_value=2))
    def test_no_features_have_no_floor_and_the_same_domain(self, width: int, alpha: float) -> None:
        for floor in (theory.refined_floor, theory.naive_floor):
            if 0 < alpha < 1:
                assert floor([], width, alpha) == 0
            else:
                with pytest.raises(ValueError, match=r"alpha = .* outside its domain 0 < α < 1"):
                    floor([], width, alpha)

    def test_dense_latents_are_those_above_one_over_e(self) -> None:
        assert theory.dense_latents([0.36, 0.37, 1.0, 0.0]) == 2


class TestKinds:
    def test_float_in_float_out(self) -> None:
        assert type(theory.capacity(0.9)) is float
        assert type(theory.refined_floor([1.0, 2.0], 1, 0.5)) is float
        assert type(theory.naive_floor(np.ones(3), 1, 0.5)) is float

    def test_array_in_array_out(self) -> None:
        found = theory.capacity(np.array([0.9, 0.99], dtype=np.float32))
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [theory.capacity(0.9), theory.capacity(0.99)], rtol=1e-5)
        floors = theory.refined_floor(np.arange(10.0), np.array([1, 2]), 0.5)
        assert floors.shape == (2,)

    def test_tensor_in_tensor_out(self) -> None:
        found = theory.critical_width(1000, torch.tensor([0.9, 0.99]))
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.float32
        assert isinstance(theory.kept_features(torch.tensor([4, 8]), 0.9, 1000), torch.Tensor)
        assert isinstance(theory.heterogeneous_critical_width(torch.rand(5)), torch.Tensor)
        # g(½) = 2.885, so a width of 1 keeps the two largest of 0, 1, 2, 3.
        torch.testing.assert_close(theory.refined_floor(torch.arange(4.0), torch.tensor(1), 0.5), torch.tensor(1.0))


OUTSIDE = [
    (lambda: theory.capacity(0.0), r"alpha = 0 .*0 < α < 1"),
    (lambda: theory.capacity(1.0), r"alpha = 1 "),
    (lambda: theory.capacity(float("nan")), r"alpha = nan"),
    (lambda: theory.capacity(np.array([0.5, 1.5])), r"alpha = 1\.5"),
    (lambda: theory.budget(-1, 0.5), r"width = -1 .*0 ≤ d < ∞"),
    (lambda: theory.budget(float("inf"), 0.5), r"width = inf"),
    (lambda: theory.critical_width(-3, 0.5), r"n_features = -3"),
    (lambda: theory.sparsity(11.0, 10), r"l0 = 11 .*L0 ≤ F = 10"),
    (lambda: theory.critical_width(float("inf"), 0.9), r"n_features = inf .*0 ≤ F < ∞"),
    (lambda: theory.kept_features(3, 0.9, float("inf")), r"n_features = inf .*0 ≤ F < ∞"),
    (lambda: theory.sparsity(1.0, 0), r"n_features = 0"),
    (lambda: theory.sparsity(float("inf"), float("inf")), r"n_features = inf .*0 < F < ∞"),
    (lambda: theory.heterogeneous_critical_width([0.5, 1.1]), r"firing_rates = 1\.1"),
    (lambda: theory.refined_floor([1.0, -2.0], 3, 0.5), r"importance = -2"),
    (lambda: theory.refined_floor([1.0, float("inf")], 3, 0.5), r"importance = inf"),
    (lambda: theory.refined_floor(np.ones((2, 2)), 3, 0.5), r"shape \(2, 2\)"),
    (lambda: theory.naive_floor([1.0], 3, 1.0), r"alpha = 1 "),
    (lambda: theory.naive_floor([], 8, 2.0), r"alpha = 2 .*0 < α < 1"),
    (lambda: theory.naive_floor([], -8, 0.5), r"width = -8 .*0 ≤ d < ∞"),
    (lambda: theory.kept_features(3, 2.0, 5), r"alpha = 2 "),
]


@pytest.mark.parametrize(("call", "message"), OUTSIDE)
def test_outside_the_domain_is_a_value_error_with_value_and_domain(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
