"""Figures and their intervals: closed forms against plain numpy, the estimate of unseen features against the
literature, coverage by simulation.
"""

from __future__ import annotations

from dataclasses import replace
from math import e, exp, log, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.results import estimate as estimates
from tl_capacity.results import summary as summaries
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.summary import THRESHOLDS, FeatureSummary
from tl_capacity.results.sums import SUMS, check_sums, merge_sums
from tl_capacity.text.counting import MASK_REASONS
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups

Counts = NDArray[np.int64]


def arrays_of(counts: Counts, tokens: Counts, **others: Any) -> dict[str, NDArray[Any]]:
    """The sums of documents 0, 1, … from counts [document, feature] and tokens [document]."""
    features = counts.shape[1]
    sizes = {"group": DOCUMENT_GROUPS, "feature": features, "reason": len(MASK_REASONS), "one": 1, "width": 3}
    arrays = {name: np.zeros([sizes[axis] for axis in axes], dtype=dtype) for name, (dtype, axes) in SUMS.items()}
    groups = document_groups(np.arange(len(counts)))
    np.add.at(arrays["counts"], groups, counts)
    np.add.at(arrays["tokens"], groups, tokens)
    np.add.at(arrays["documents"], groups, (tokens > 0).astype(np.int64))
    arrays["incidence"] = (counts > 0).sum(0)
    arrays["decoder_norm"] = np.ones(features)
    return arrays | {name: np.asarray(value, dtype=SUMS[name][0]) for name, value in others.items()}


def rates_summary(rates: list[float], tokens: int = 10**6, threshold: float = 1e-5) -> FeatureSummary:
    """One document whose features fire at the given rates."""
    return FeatureSummary(arrays_of(np.array([[round(r * tokens) for r in rates]]), np.array([tokens])), threshold)


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "REPLICATES", 20)


class TestClosedForms:
    def test_all_figures_against_numpy(self) -> None:
        random = np.random.default_rng(0)
        rates = 10 ** random.uniform(-5.5, -1, size=300)
        counts = random.binomial(40_000, rates, size=(50, 300))
        tokens = np.full(50, 40_000)
        summary = FeatureSummary(arrays_of(counts, tokens), 1e-5)
        p = counts.sum(0) / tokens.sum()
        n_alive, l0 = (p > 1e-5).sum(), p.sum()
        assert summary.n_tokens == 2_000_000
        assert summary.n_documents == 50
        assert summary.d_sae == 300
        assert summary.n_alive.value == n_alive < 300
        assert summary.alive.sum() == n_alive
        assert {t: estimate.value for t, estimate in summary.alive_at.items()} == {t: (p > t).sum() for t in THRESHOLDS}
        assert summary.l0.value == pytest.approx(l0, rel=1e-12)
        alpha = 1 - l0 / n_alive
        assert summary.alpha.value == pytest.approx(alpha, rel=1e-12)
        g = 1 / ((1 - alpha) * np.log(1 / (1 - alpha)))
        assert summary.capacity.value == pytest.approx(g, rel=1e-9)
        assert summary.critical_width.value == pytest.approx(n_alive / g, rel=1e-9)
        fired = p[p > 0]
        assert summary.heterogeneous_critical_width.value == pytest.approx((fired * np.log(1 / fired)).sum(), rel=1e-12)

    def test_published_layer_12(self) -> None:
        """Pythia-410M, layer 12 (arXiv:2604.04037): F = 28,665 and L0 = 218.29 give α = 0.992385, g = 26.92, d* =
        1,064.7.
        """
        tokens = 10**7
        each = round(218.29 * tokens / 28665)
        summary = FeatureSummary(arrays_of(np.full((1, 28665), each), np.array([tokens])))
        assert summary.l0.value == pytest.approx(218.29, rel=1e-4)
        assert summary.capacity.value == pytest.approx(26.9227, rel=1e-4)
        assert summary.critical_width.value == pytest.approx(1064.7, rel=1e-4)

    @settings(max_examples=50, deadline=None)
    @given(rates=st.lists(st.floats(1e-4, 0.3), min_size=2, max_size=40))
    @pytest.mark.usefixtures("few_replicates")
    def test_identities(self, rates: list[float]) -> None:
        summary = rates_summary(rates)
        n_alive, l0 = summary.n_alive.value, summary.l0.value
        assume(0 < l0 < n_alive)
        assert summary.critical_width.value == pytest.approx(l0 * log(n_alive / l0), rel=1e-9)
        assert summary.heterogeneous_critical_width.value <= summary.critical_width.value * (1 + 1e-12)

    @pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3])
    def test_equal_rates_need_the_same_width_by_either_formula(self, rate: float) -> None:
        summary = rates_summary([rate] * 50)
        assert summary.heterogeneous_critical_width.value == pytest.approx(summary.critical_width.value, rel=1e-9)

    def test_features_below_the_threshold_still_count_in_l0(self) -> None:
        summary = rates_summary([0.5, 2e-6, 0.0], threshold=1e-5)
        assert summary.n_alive.value == 1
        assert summary.alive.tolist() == [True, False, False]
        assert summary.l0.value == pytest.approx(0.500002)

    def test_a_threshold_is_exceeded_and_not_reached(self) -> None:
        assert rates_summary([1e-4, 1.01e-4], threshold=1e-4).alive.tolist() == [False, True]
        assert rates_summary([0.0, 1e-6], threshold=0.0).alive.tolist() == [False, True]

    def test_dense_latents(self) -> None:
        assert rates_summary([1 / e - 0.001, 1 / e + 0.001, 1.0, 0.0]).dense_latents.value == 2

    @pytest.mark.parametrize("rates", [[0.0, 0.0], [1.0, 1.0]])
    def test_undefined_figures_are_said_to_be(self, rates: list[float]) -> None:
        """Without a silent feature α = 0, and without a firing one there is no α: neither has a capacity."""
        summary = rates_summary(rates)
        assert not np.isfinite(summary.capacity.value)
        assert summary.capacity.show() == "undefined"
        assert summary.capacity.to_json() == {"value": None, "low": None, "high": None}

    def test_fvu(self) -> None:
        random = np.random.default_rng(0)
        x, noise = random.normal(2, 1, size=(500, 3)), random.normal(0, 0.3, size=(500, 3))
        groups = document_groups(np.arange(500))
        sums = {name: np.zeros(DOCUMENT_GROUPS) for name in ("residual", "energy")} | {
            "mean_sum": np.zeros((DOCUMENT_GROUPS, 3))
        }
        np.add.at(sums["residual"], groups, (noise**2).sum(1))
        np.add.at(sums["energy"], groups, (x**2).sum(1))
        np.add.at(sums["mean_sum"], groups, x)
        checked = np.bincount(groups, minlength=DOCUMENT_GROUPS)
        summary = FeatureSummary(
            arrays_of(np.ones((500, 2), dtype=np.int64), np.ones(500, dtype=np.int64), fvu_tokens=checked, **sums)
        )
        wanted = (noise**2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert summary.fvu is not None
        assert summary.fvu.value == pytest.approx(wanted, rel=1e-9)
        assert summary.explained_variance is not None
        assert summary.explained_variance.value == pytest.approx(1 - wanted, rel=1e-9)
        assert summary.reconstruction_error is not None
        assert summary.reconstruction_error.value == pytest.approx((noise**2).sum(1).mean(), rel=1e-9)
        assert (
            summary.reconstruction_error.low < 0.27 < summary.reconstruction_error.high
        )  # 3 · 0.3², as they were drawn
        assert summary.fvu.low < wanted < summary.fvu.high
        unchecked = rates_summary([0.1])
        assert (unchecked.fvu, unchecked.explained_variance, unchecked.reconstruction_error) == (None, None, None)

    def test_masks(self) -> None:
        summary = FeatureSummary(
            arrays_of(
                np.ones((1, 1), dtype=np.int64),
                np.ones(1, dtype=np.int64),
                masked=[3, 4, 5],
                masked_norm=[30.0],
                counted_norm=[10.0],
            )
        )
        assert summary.masked == {"padding": 3, "special": 4, "position": 5}
        assert summary.masked_norm_share == 0.75

    @pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan"), float("inf")])
    def test_no_threshold(self, threshold: float) -> None:
        with pytest.raises(CapacityError, match="is not a firing rate"):
            rates_summary([0.1], threshold=threshold)


class TestHistogram:
    @settings(max_examples=50, deadline=None)
    @given(
        counts=st.lists(st.one_of(st.just(0), st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=60),
        tokens=st.integers(1, 10**7),
        bins=st.integers(1, 9),
    )
    def test_every_feature_is_in_one_place(self, counts: list[float], tokens: int, bins: int) -> None:
        found = [min(c, tokens) if isinstance(c, int) else round(c * tokens) for c in counts]
        summary = FeatureSummary(arrays_of(np.array([found]), np.array([tokens])))
        edges, histogram, silent = summary.firing_rate_histogram(bins)
        assert len(edges) == len(histogram) + 1
        assert silent == found.count(0)
        assert histogram.sum() + silent == summary.d_sae == len(counts)
        assert edges[-1] == 1
        assert edges[0] <= 1 / tokens * (1 + 1e-9)

    def test_places(self) -> None:
        edges, histogram, silent = rates_summary([0.5, 0.05, 0.05, 0.005, 0.0], tokens=1000).firing_rate_histogram(1)
        np.testing.assert_allclose(edges, [0.001, 0.01, 0.1, 1])
        assert histogram.tolist() == [1, 2, 1]
        assert silent == 1


def incidence_summary(incidence: list[int], documents: int) -> FeatureSummary:
    """Features seen in the given numbers of documents."""
    counts = np.zeros((documents, len(incidence)), dtype=np.int64)
    for feature, seen in enumerate(incidence):
        counts[:seen, feature] = 1
    return FeatureSummary(arrays_of(counts, np.full(documents, 10)))


class TestUnseenFeatures:
    def test_barro_colorado_trees(self) -> None:
        """Tree species on Barro Colorado Island, the example of R's vegan: specpool(BCI) prints 225 species in 50
        plots, jack1 245.58, chao 236.3732.
        """
        m, seen, once, twice = 50, 225, 21, 19
        assert seen + once * (m - 1) / m == pytest.approx(245.58)
        assert seen + (m - 1) / m * once**2 / (2 * twice) == pytest.approx(236.3732, abs=5e-5), (
            "the classic form, so these are vegan's counts"
        )
        found = incidence_summary([1] * once + [2] * twice + [7] * (seen - once - twice) + [0] * 75, m).features_chao2
        assert found.value == pytest.approx(225 + 0.98 * 21 * 20 / (2 * 20))  # 235.29
        # by hand: variance 10.29 + 0.9604·21·41²/1600 + 0.9604·441·19·400/640000 = 36.509
        spread = exp(1.959964 * sqrt(log(1 + 36.50892 / 10.29**2)))
        assert found.low == pytest.approx(225 + 10.29 / spread, rel=1e-9) == pytest.approx(228.5409, abs=1e-4)
        assert found.high == pytest.approx(225 + 10.29 * spread, rel=1e-9) == pytest.approx(254.9028, abs=1e-4)

    def test_no_duplicates(self) -> None:
        """Q₁ = 4, Q₂ = 0, m = 10: 0.9·4·3/2 = 5.4 unseen."""
        assert incidence_summary([1, 1, 1, 1, 5] + [0] * 20, 10).features_chao2.value == pytest.approx(5 + 5.4)

    def test_never_more_than_the_dictionary_holds(self) -> None:
        found = incidence_summary([1] * 30 + [0] * 2, 10).features_chao2
        assert (found.value, found.high) == (32, 32)

    def test_nothing_rare(self) -> None:
        assert incidence_summary([5, 6, 7, 0], 10).features_chao2 == Estimate(3.0, 3.0, 3.0)

    def test_one_document_says_nothing_about_the_others(self) -> None:
        assert incidence_summary([1, 1, 0], 1).features_chao2 == Estimate(2.0)

    def test_estimates_what_more_documents_show(self) -> None:
        random = np.random.default_rng(0)
        rates = 10 ** random.uniform(-3, 0, size=400)
        seen = random.random((60, 400)) < rates
        found = incidence_summary(seen.sum(0).tolist(), 60).features_chao2
        assert (seen.any(0)).sum() < found.low < found.value < 400
        assert found.high < 500


def bursty(
    random: np.random.Generator, documents: int, share: NDArray[np.float64], rate: NDArray[np.float64]
) -> tuple[Counts, Counts]:
    """Counts [document, feature] and tokens [document]: a feature is on in some documents only,
    and fires often there.
    """
    tokens = random.integers(20, 200, size=documents)
    on = random.random((documents, len(share))) < share
    return random.binomial(tokens[:, None], rate * on), tokens


class TestIntervals:
    @pytest.mark.parametrize("documents", [40, 300])
    def test_coverage_on_bursty_documents(self, unchecked: None, documents: int) -> None:
        """The interval of L0 holds the population's in at least 85 of 100 repetitions, where one that took tokens for
        independent would fail.
        """
        random = np.random.default_rng(documents)
        share, rate = random.uniform(0.01, 0.2, size=60), random.uniform(0.05, 0.5, size=60)
        truth = float((share * rate).sum())
        covered = covered_by_tokens = 0
        estimates, widths, token_widths = [], [], []
        for _ in range(100):
            counts, tokens = bursty(random, documents, share, rate)
            summary = FeatureSummary(arrays_of(counts, tokens))
            (l0,) = summary.estimates(lambda sums: [float(sums.rates.sum())])
            assert l0.low is not None
            assert l0.high is not None
            assert l0.low <= l0.value <= l0.high
            covered += l0.low <= truth <= l0.high
            p = summary.firing_rates
            token_half_width = 1.96 * sqrt(float((p * (1 - p)).sum()) / summary.n_tokens)
            covered_by_tokens += abs(l0.value - truth) <= token_half_width
            estimates.append(l0.value)
            widths.append((l0.high - l0.low) / 2)
            token_widths.append(token_half_width)
        assert covered >= 85
        assert covered_by_tokens < 70
        assert np.mean(widths) > 1.5 * np.mean(token_widths)
        assert 0.75 < np.mean(widths) / (1.96 * np.std(estimates)) < 1.3, "neither too narrow nor wide to be safe"

    def test_intervals_are_those_of_one_replicate_after_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many replicates are summed at once."""
        random = np.random.default_rng(1)
        counts = random.poisson(random.gamma(0.3, size=(40, 700)) * 20)
        summary = FeatureSummary(arrays_of(counts, np.full(40, 2_000)), 1e-3)
        draws = estimates.document_resamples(summary.arrays["tokens"])
        assert draws is not None
        p = np.array([draw @ summary.arrays["counts"] / (draw @ summary.arrays["tokens"]) for draw in draws])
        alive = (p > 1e-3).sum(1).astype(float)
        for at_once in (1, 700 * 7, 10**9):
            monkeypatch.setattr(summaries, "SUMS_AT_ONCE", at_once)
            again = replace(summary)
            assert again.n_alive == estimates.estimate_around(again.n_alive.value, alive).within(0.0, 700.0)
            assert again.l0.low == pytest.approx(estimates.estimate_around(again.l0.value, p.sum(1)).low, rel=1e-12)

    def test_figures_carry_the_same_interval(self) -> None:
        random = np.random.default_rng(0)
        counts, tokens = bursty(random, 100, random.uniform(0.01, 0.2, size=30), np.full(30, 0.2))
        summary = FeatureSummary(arrays_of(counts, tokens))
        assert summary.l0 == summary.estimates(lambda sums: [float(sums.rates.sum())])[0]
        again = FeatureSummary(arrays_of(counts, tokens))
        assert again.l0 == summary.l0, "the bootstrap is seeded"

    @pytest.mark.parametrize("documents", [1, 3, 7])
    def test_too_few_documents(self, documents: int) -> None:
        random = np.random.default_rng(0)
        counts, tokens = bursty(random, documents, np.full(10, 0.9), np.full(10, 0.3))
        for estimate in (
            FeatureSummary(arrays_of(counts, tokens)).l0,
            FeatureSummary(arrays_of(counts, tokens)).n_alive,
        ):
            assert (estimate.low, estimate.high) == (None, None)
            assert "[" not in estimate.show()

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10**6), documents=st.integers(8, 80), often=st.floats(0.001, 1.0))
    @pytest.mark.usefixtures("few_replicates")
    def test_an_interval_holds_its_own_estimate(self, seed: int, documents: int, often: float) -> None:
        random = np.random.default_rng(seed)
        counts, tokens = bursty(random, documents, np.full(12, often), random.uniform(0.01, 0.9, size=12))
        summary = FeatureSummary(arrays_of(counts, tokens))
        for estimate in (
            summary.n_alive,
            summary.l0,
            summary.alpha,
            summary.capacity,
            summary.critical_width,
            *summary.alive_at.values(),
        ):
            if estimate.low is not None and estimate.high is not None:
                assert estimate.low <= estimate.value <= estimate.high
        for estimate in (summary.n_alive, *summary.alive_at.values()):
            assert estimate.high is None or estimate.high <= summary.d_sae
            assert estimate.low is None or estimate.low >= 0

    def test_show(self) -> None:
        assert Estimate(1234.56, 1000.0, 2000.04).show() == "1,234.6 [1,000.0, 2,000.0]"
        assert Estimate(0.5).show(".2f") == "0.50"
        assert Estimate(float("nan"), 1.0, 2.0).show() == "undefined"


class TestSums:
    def test_merge_adds_all_but_the_decoder(self) -> None:
        mine = arrays_of(np.array([[1, 2]]), np.array([5]), decoder_norm=[1.0, 2.0])
        merged = merge_sums(mine, mine)
        assert merged["counts"].sum(0).tolist() == [2, 4]
        assert merged["decoder_norm"].tolist() == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("counts", None, "lacks the statistics 'counts'"),
            ("counts", np.zeros((DOCUMENT_GROUPS, 2), dtype=np.int32), "int32"),
            ("counts", np.full((DOCUMENT_GROUPS, 2), -1), "negative counts"),
            ("counts", np.zeros((DOCUMENT_GROUPS, 3), dtype=np.int64), "altered"),
            ("sums", np.full((DOCUMENT_GROUPS, 2), np.nan), "non-finite"),
            ("tokens", np.zeros((2, 2), dtype=np.int64), "altered"),
            ("masked", np.zeros(4, dtype=np.int64), "altered"),
        ],
    )
    def test_check(self, name: str, value: Any, says: str) -> None:
        arrays = arrays_of(np.array([[1, 2]]), np.array([5]))
        check_sums(arrays, "here")
        del arrays[name]
        with pytest.raises(MeasurementError, match=says):
            check_sums(arrays if value is None else {**arrays, name: value}, "here")
