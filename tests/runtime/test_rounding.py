"""Whole numbers that went through floats come out as they were meant, checked against fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.predict.laws import kept_features, narrowest_width
from tl_capacity.runtime.rounding import whole_above, whole_below


def test_products_and_quotients_of_every_width() -> None:
    widths = np.arange(1, 2049)
    for thousandths in range(1, 3000):
        held = thousandths / 1000
        assert np.array_equal(whole_below(widths * held), widths * thousandths // 1000)
        assert np.array_equal(whole_above(widths / held), -(-widths * 1000 // thousandths))


@given(st.fractions(0, 10**6, max_denominator=10**4))
def test_a_whole_number_is_only_reached_from_nearby(value: Fraction) -> None:
    assert whole_below(float(value)) == value.numerator // value.denominator
    assert whole_above(float(value)) == -(-value.numerator // value.denominator)


def test_huge_and_infinite_numbers_stay_as_they_are() -> None:
    assert whole_below(np.inf) == np.inf
    assert whole_above(1e300) >= 1e299


class Even(CapacityLaw):
    """As many features in every dimension, whatever the sparsity."""

    name = "even"

    def __init__(self, held: float) -> None:
        self.held = held

    def features_per_dimension(self, alpha: float, importance: np.ndarray[Any, Any]) -> float:
        return self.held


def test_the_narrowest_width_that_keeps_a_feature_keeps_it() -> None:
    for hundredths in range(1, 300, 7):
        law, at = Even(hundredths / 100), CapacityContext(0.5, np.ones(200))
        for rank in (1, 29, 58, 70, 100):
            width = narrowest_width(law, rank, at)
            assert kept_features(law, width, at) >= rank
            assert kept_features(law, width - 1, at) < rank
