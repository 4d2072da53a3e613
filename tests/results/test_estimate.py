"""The bootstraps: intervals and standard errors against closed forms, and where none is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tl_capacity.results.estimate import (
    Estimate,
    block_resample,
    cluster_bootstrap,
    group_resamples,
    pair_interval,
    standard_errors,
)

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


def test_replicates_of_groups_take_whole_groups_and_points_within_them() -> None:
    groups = np.array([1.0, 1, 1, 2, 3, 3])
    counts = group_resamples(groups)
    assert np.array_equal(counts, group_resamples(groups))
    by_group = np.stack([counts[:, groups == group].sum(1) / (groups == group).sum() for group in (1, 2, 3)], 1)
    assert np.array_equal(by_group, by_group.round())
    assert np.all(by_group.sum(1) == 3)
    assert np.all((by_group > 0).sum(1) >= 2), "nothing can be fitted to one group"
    assert np.all(group_resamples(np.ones(4)).sum(1) == 4)


def test_blocks_of_neighbours_make_a_series_as_long_as_the_given_one() -> None:
    drawn = block_resample(np.arange(10.0), 4, np.random.default_rng(0))
    assert len(drawn) == 10
    assert np.all(np.diff(drawn[:4]) == 1)
    assert np.all(np.diff(drawn[4:8]) == 1)


def test_the_interval_of_pairs_leaves_out_where_the_statistic_is_not_defined() -> None:
    a = np.array([0.0, 0, 0, 1])
    low, high = pair_interval(a, 2 * a, lambda x, y: float(y.mean() / x.mean()) if x.any() else float("nan"))
    assert (low, high) == (2, 2)
