"""The sums of latents: found sparse, added exactly, and merged in any order to the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_capacity.dictionaries.encoding import active_entries
from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.interfaces import LatentBatch
from tl_capacity.measure.statistics import FeatureStatistics
from tl_capacity.results.sums import SUMS, merge_sums
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups

COUNTS = [name for name, (dtype, _) in SUMS.items() if dtype == "int64"]
MOMENTS = [name for name, (dtype, _) in SUMS.items() if dtype == "float64" and name != "decoder_norm"]

brisk = settings(max_examples=60, deadline=None)


def together(mine: FeatureStatistics, theirs: FeatureStatistics) -> FeatureStatistics:
    """The sums of two disjoint sets of documents."""
    return FeatureStatistics.from_tensors(merge_sums(mine.tensors(), theirs.tensors()))


def sparse_latents(rows: int, width: int, density: float, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=random)
    return torch.where(torch.rand(rows, width, generator=random) < density, values, 0.0)


class TestActiveEntries:
    @brisk
    @given(
        rows=st.integers(0, 40),
        width=st.integers(1, 70),
        density=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        seed=st.integers(0, 99),
    )
    def test_equals_nonzero(self, rows: int, width: int, density: float, seed: int) -> None:
        latents = sparse_latents(rows, width, density, seed)
        tokens, features, values = active_entries(latents)
        wanted = torch.nonzero(latents)
        assert torch.equal(torch.stack([tokens, features], 1), wanted)
        assert torch.equal(values, latents[wanted[:, 0], wanted[:, 1]])

    @pytest.mark.parametrize("width", [8, 13, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_special_values(self, width: int, dtype: torch.dtype) -> None:
        latents = torch.zeros(5, width, dtype=dtype)
        latents[0, 3], latents[1, 0], latents[2, width - 1], latents[4, 5] = (
            -2.5,
            float("nan"),
            float("inf"),
            torch.finfo(dtype).smallest_normal,
        )
        latents[3] = -0.0
        tokens, features, values = active_entries(latents)
        assert tokens.tolist() == [0, 1, 2, 4]
        assert features.tolist() == [3, 0, width - 1, 5]
        assert values.dtype == dtype
        assert values[0] == -2.5
        assert values.isnan().tolist() == [False, True, False, False]

    @pytest.mark.parametrize("width", [13, 24])
    def test_any_layout(self, width: int) -> None:
        latents = sparse_latents(16, width, 0.2, 0)
        layouts = {
            "transposed": latents.T.contiguous().T,
            "every other column": torch.stack([latents, torch.ones_like(latents)], -1).flatten(1)[:, ::2],
            "part of a larger one": torch.nn.functional.pad(latents, (3, 5, 1, 1), value=1.0)[1:-1, 3:-5],
            "sparse": latents.to_sparse(),
            "expanded": latents[:1].expand(16, width),
        }
        for name, layout in layouts.items():
            wanted = latents[:1].repeat(16, 1) if name == "expanded" else latents
            tokens, features, values = active_entries(layout)
            assert torch.equal(torch.stack([tokens, features], 1), torch.nonzero(wanted)), name
            assert torch.equal(values, wanted[tokens, features]), name


class TestDocumentGroups:
    def test_stable(self) -> None:
        """Changing these numbers changes which shards merge and what a saved measurement's intervals mean."""
        assert document_groups(np.arange(12)).tolist() == [47, 1, 14, 45, 10, 26, 0, 23, 54, 36, 10, 29]
        assert document_groups(np.array([10**6, 2**40, 2**62])).tolist() == [39, 9, 43]

    def test_is_splitmix64(self) -> None:
        def splitmix64(seed: int) -> int:
            x = (seed + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            return x ^ x >> 31

        assert splitmix64(0) == 0xE220A8397B1DCDAF, "the generator's published first output"
        documents = [0, 1, 2, 63, 64, 10**9, 2**40, 2**63 - 1]
        assert document_groups(np.array(documents)).tolist() == [splitmix64(d) % 64 for d in documents]

    @pytest.mark.parametrize(("first", "step"), [(0, 1), (0, 64), (3, 4), (10**9, 1)])
    def test_uniform(self, first: int, step: int) -> None:
        """Also for the documents of a shard, which are every n-th."""
        sizes = np.bincount(document_groups(first + step * np.arange(64 * 200)), minlength=DOCUMENT_GROUPS)
        assert len(sizes) == DOCUMENT_GROUPS
        assert ((sizes - 200) ** 2 / 200).sum() < 114, "χ² of 63 degrees of freedom exceeds 114 with probability 1e-4"

    def test_depends_on_the_number_alone(self) -> None:
        documents = np.random.default_rng(0).permutation(1000)
        assert (document_groups(documents) == document_groups(np.arange(1000))[documents]).all()

    def test_other_numbers_of_groups(self) -> None:
        assert set(document_groups(np.arange(500), 8).tolist()) == set(range(8))


def batch_of(latents: torch.Tensor, documents: torch.Tensor, activations: torch.Tensor) -> LatentBatch:
    tokens, features, values = active_entries(latents)
    groups = torch.from_numpy(document_groups(documents.numpy(force=True)))
    sae = SimpleNamespace(cfg=SimpleNamespace(d_sae=latents.shape[1]))
    place = torch.arange(len(latents))
    counted = torch.ones(len(latents), 1, dtype=torch.bool)
    return LatentBatch(
        features,
        tokens,
        groups[tokens],
        values.double(),
        activations,
        documents,
        groups,
        place,
        torch.zeros_like(place),
        counted,
        sae,
    )


def add(statistics: FeatureStatistics, batch: LatentBatch) -> None:
    statistics.update_tokens(batch.token_groups)
    statistics.update_latents(batch.features, batch.values, batch.groups)


def statistics_of(
    latents: torch.Tensor, documents: torch.Tensor, rows: Sequence[int] | slice = slice(None), width: int = 4
) -> FeatureStatistics:
    """What the tokens `rows` sum to."""
    activations = torch.randn(len(latents), width, generator=torch.Generator().manual_seed(7))
    latents, documents, activations = latents[rows], documents[rows], activations[rows]
    statistics = FeatureStatistics.empty(
        latents.shape[1], width, torch.linspace(1, 2, latents.shape[1]), torch.device("cpu")
    )
    batch = batch_of(latents, documents, activations)
    add(statistics, batch)
    statistics.update_reconstruction(activations, activations * 0.9, batch.token_groups)
    statistics.state["probe/weighted"] = torch.zeros(DOCUMENT_GROUPS, latents.shape[1], dtype=torch.float64)
    statistics.state["probe/weighted"].view(-1).index_add_(
        0, batch.groups * latents.shape[1] + batch.features, batch.values.abs()
    )
    return statistics


def assert_same(one: FeatureStatistics, other: FeatureStatistics) -> None:
    """Counts bit for bit, moments to 1e-12."""
    assert one.tensors().keys() == other.tensors().keys()
    for name, value in one.tensors().items():
        if value.dtype == torch.int64:
            assert torch.equal(value, other.tensors()[name]), name
        else:
            torch.testing.assert_close(value, other.tensors()[name], rtol=1e-12, atol=1e-12, msg=name)


class TestFeatureStatistics:
    @brisk
    @given(seed=st.integers(0, 999), shards=st.integers(1, 5), order=st.randoms(use_true_random=False))
    def test_any_split_merges_to_the_whole(self, seed: int, shards: int, order: Any) -> None:
        latents = sparse_latents(90, 19, 0.2, seed)
        documents = torch.arange(90) // 4
        whole = statistics_of(latents, documents)
        parts = [
            statistics_of(latents, documents, [i for i in range(90) if int(documents[i]) % shards == part])
            for part in range(shards)
        ]
        order.shuffle(parts)
        merged = parts[0]
        for part in parts[1:]:
            merged = together(merged, part)
        assert_same(merged, whole)

    @brisk
    @given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 90), max_size=6))
    def test_any_batches_sum_to_the_whole(self, seed: int, cuts: list[int]) -> None:
        latents, documents = sparse_latents(90, 16, 0.2, seed), torch.arange(90) // 4
        statistics = FeatureStatistics.empty(16, 4, torch.ones(16), torch.device("cpu"))
        edges = [0, *sorted(cuts), 90]
        for start, stop in pairwise(edges):
            add(statistics, batch_of(latents[start:stop], documents[start:stop], torch.zeros(stop - start, 4)))
        groups = torch.from_numpy(document_groups(documents.numpy(force=True)))
        dense = latents.double()
        for group in range(DOCUMENT_GROUPS):
            own = dense[groups == group]
            assert torch.equal(statistics.counts[group], (own != 0).sum(0))
            assert int(statistics.tokens[group]) == len(own)
            torch.testing.assert_close(statistics.sums[group], own.sum(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(statistics.squares[group], own.square().sum(0), rtol=1e-12, atol=1e-12)

    def test_threads_change_nothing(self) -> None:
        latents, documents = sparse_latents(3000, 128, 0.05, 0), torch.arange(3000) // 7
        threads = torch.get_num_threads()
        try:
            found = []
            for number in (1, 2):
                torch.set_num_threads(number)
                found.append(statistics_of(latents, documents))
        finally:
            torch.set_num_threads(threads)
        assert_same(found[0], found[1])

    def test_counts_beyond_float32(self) -> None:
        """float32 stops counting at 2²⁴ = 16,777,216, and float64 would at 2⁵³."""
        statistics = statistics_of(torch.ones(3, 8), torch.zeros(3, dtype=torch.int64))
        statistics.counts += 2**53
        statistics.tokens += 2**53
        add(statistics, batch_of(torch.ones(1, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)))
        assert int(statistics.counts.max()) == 2**53 + 4
        assert int(together(statistics, statistics).counts.max()) == 2**54 + 8
        assert statistics.compute().arrays["counts"].max() == 2**53 + 4

    def test_one_batch_counts_beyond_float32_steps(self) -> None:
        statistics = FeatureStatistics.empty(1, 4, torch.ones(1), torch.device("cpu"))
        statistics.counts[47] = 2**24
        for _ in range(3):
            add(statistics, batch_of(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)))
        assert int(statistics.counts.sum()) == 2**24 + 3

    def test_types(self) -> None:
        statistics = statistics_of(sparse_latents(9, 8, 0.5, 0), torch.arange(9))
        for name, (dtype, axes) in SUMS.items():
            tensor = getattr(statistics, name)
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tensor.ndim == len(axes)

    def test_clone_is_apart(self) -> None:
        latents, documents = sparse_latents(9, 8, 0.5, 0), torch.arange(9)
        statistics = statistics_of(latents, documents)
        before = statistics.clone()
        add(statistics, batch_of(latents, documents, torch.zeros(9, 4)))
        assert_same(before, statistics_of(latents, documents))
        assert_same(FeatureStatistics.from_tensors(before.tensors()), before)

    def test_dense_is_the_inverse_of_active_entries(self) -> None:
        latents = sparse_latents(9, 13, 0.5, 0)
        assert torch.equal(batch_of(latents, torch.arange(9), torch.zeros(9, 4)).dense(), latents.double())

    def test_nothing_counted(self) -> None:
        empty = FeatureStatistics.empty(8, 4, torch.ones(8), torch.device("cpu"))
        with pytest.raises(CapacityError, match="nothing was counted: no tokens were seen"):
            empty.compute()
        empty.masked[1] = 1234
        with pytest.raises(CapacityError, match="nothing was counted: all 1,234 tokens were masked"):
            empty.compute()

    def test_merge_refuses_what_does_not_fit(self) -> None:
        mine = statistics_of(sparse_latents(9, 8, 0.5, 0), torch.arange(9))
        with pytest.raises(MeasurementError, match=r"counts has shape .* with the same SAE"):
            together(mine, statistics_of(sparse_latents(9, 16, 0.5, 0), torch.arange(9)))
        other = mine.clone()
        other.decoder_norm += 1e-9
        with pytest.raises(MeasurementError, match="decoder norms differ"):
            together(mine, other)
        other = mine.clone()
        del other.state["probe/weighted"]
        with pytest.raises(MeasurementError, match=r"different sums \(state/probe/weighted\)"):
            together(mine, other)
