"""The bootstraps: intervals and standard errors against closed forms, and where none is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tl_capacity.results.estimate import Estimate, cluster_bootstrap, standard_errors

RANDOM = np.random.default_rng(0)


def mean_of(values: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """The mean of some values in each replicate of their weights."""
    return lambda weights: np.asarray(weights @ values / weights.sum(1))


class TestClusters:
    def test_the_interval_of_a_mean_is_that_of_its_clusters(self) -> None:
        clusters = np.repeat(np.arange(400), 5)
        values = np.repeat(RANDOM.standard_normal(400), 5)
        mean = cluster_bootstrap(mean_of(values), clusters)
        assert mean.value == pytest.approx(values.mean())
        assert mean.low is not None
        assert mean.high is not None
        assert mean.high - mean.low == pytest.approx(2 * 1.96 / 20, rel=0.15)

    def test_names_of_clusters_do_not_matter(self) -> None:
        values = RANDOM.standard_normal(60)
        numbers = np.arange(60) // 3
        by_number, by_word = (
            cluster_bootstrap(mean_of(values), clusters)
            for clusters in (numbers, np.array([f"{number:03}" for number in numbers]))
        )
        assert by_number == by_word

    def test_below_eight_clusters_there_is_no_interval(self) -> None:
        rows = np.arange(70)
        assert cluster_bootstrap(lambda weights: weights.sum(1), rows % 7) == Estimate(70.0)
        assert cluster_bootstrap(lambda weights: weights.sum(1), rows % 10) == Estimate(70.0, 70.0, 70.0)

    def test_a_statistic_that_is_seldom_defined_has_no_interval(self) -> None:
        def seldom(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.where(weights[:, 0] == 1, 1.0, np.nan)

        assert cluster_bootstrap(seldom, np.arange(9)) == Estimate(1.0)

    def test_few_weights_at_once_give_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values, clusters = RANDOM.integers(0, 1000, 60).astype(np.float64), np.arange(60) // 3  # sums are exact
        whole = cluster_bootstrap(mean_of(values), clusters)
        monkeypatch.setattr("tl_capacity.results.estimate.WEIGHTS_AT_ONCE", 600)
        parts = cluster_bootstrap(mean_of(values), clusters)
        assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_standard_errors_of_a_mean() -> None:
    values = RANDOM.standard_normal(200)
    errors = standard_errors(lambda places: np.array([values[places].mean(), 7.0]), len(values), replicates=2_000)
    np.testing.assert_allclose(errors, [values.std() / np.sqrt(200), 0.0], rtol=0.05)
    assert np.isnan(standard_errors(lambda places: values[places][:1], 1, replicates=9)).all()
