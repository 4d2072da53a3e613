"""Toy models against closed forms, PyTorch's own autograd and Adam, a published replication, and themselves trained
alone.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score
from tl_capacity.recipes.toy_sweep import main

from tl_capacity import CapacityLaw, hookimpl, recipe, theory
from tl_capacity.errors import CapacityError
from tl_capacity.plugins import register_plugin, unregister_plugin
from tl_capacity.storage.files import previous
from tl_capacity.toy import (
    Case,
    FeatureDistribution,
    SweepResult,
    SweepSettings,
    accuracy,
    at_every_sparsity,
    cells,
    containment,
    fit_packing_law,
    fractional_capacity,
    overlap,
    predictions,
    predictors,
    run,
    smooth_band_floor,
    zipf_importance,
)
from tl_capacity.toy.claims import claims
from tl_capacity.toy.figures import floors_figure, predictors_figure
from tl_capacity.toy.page import markdown
from tl_capacity.toy.report import student_list
from tl_capacity.toy.sweep import Family, Stream
from tl_capacity.toy.training import Objective, Stack, initial_stack, train

brisk = settings(max_examples=40, deadline=None)
TINY = SweepSettings(
    features=(6,), alphas=(0.7, 0.9), teacher_widths=(2, 3), seeds=2, steps=40, batch=16, evaluation_rows=512
)


class TestData:
    @pytest.mark.parametrize("correlation", ["independent", "correlated", "anticorrelated"])
    @pytest.mark.parametrize("alpha", [0.6, 0.9])
    def test_rows_that_are_not_zero_are_plain_ones_without_the_zeros(self, alpha: float, correlation: str) -> None:
        distribution = FeatureDistribution(6, alpha, correlation)
        plain, chosen = (
            distribution.sample(200_000, np.random.default_rng(0)),
            distribution.sample_nonzero(200_000, np.random.default_rng(1)),
        )
        zero = ~(plain > 0).any(0)
        assert zero.mean() == pytest.approx(distribution.zero_probability, abs=0.005)
        assert (chosen > 0).any(0).all()
        rest = plain[:, ~zero]
        np.testing.assert_allclose(
            np.bincount((chosen > 0).sum(0), minlength=7) / 2e5,
            np.bincount((rest > 0).sum(0), minlength=7) / rest.shape[1],
            atol=0.01,
        )
        np.testing.assert_allclose(np.corrcoef(chosen), np.corrcoef(rest), atol=0.02)
        np.testing.assert_allclose((chosen**2).mean(1), (rest**2).mean(1), rtol=0.05)

    @given(n=st.integers(1, 30), alpha=st.floats(0.05, 0.99))
    @brisk
    def test_moments(self, n: int, alpha: float) -> None:
        distribution = FeatureDistribution(n, alpha)
        x = distribution.sample(40_000, np.random.default_rng(2))
        assert distribution.second_moment == pytest.approx((1 - alpha) / 3)
        assert (x**2).mean() == pytest.approx(distribution.second_moment, abs=0.03)
        assert x.var() == pytest.approx(distribution.variance, abs=0.03)
        assert distribution.zero_probability == pytest.approx(alpha**n)

    def test_out_of_domain(self) -> None:
        for arguments, says in (
            ((5, 1.0), "alpha = 1"),
            ((5, 0.0), "alpha = 0"),
            ((0, 0.5), "n = 0"),
            ((5, 0.9, "correlated"), "paired"),
            ((5, 0.9, "odd"), "'odd'"),
        ):
            with pytest.raises(ValueError, match=says):
                FeatureDistribution(*arguments)


def plain_loss(
    weights: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, target: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """Mean over rows of Σ Iᵢ (ReLU(WᵀWx + b)ᵢ − yᵢ)², as it is written in the paper; x [row, feature]."""
    return (importance * (torch.relu(x @ weights.T @ weights + bias) - target).square()).sum(1).mean()


class TestTraining:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_gradient_is_autograd_of_the_loss_over_zero_and_other_rows(self, distilled: bool) -> None:
        streams = [Stream(FeatureDistribution(5, alpha), 0) for alpha in (0.5, 0.9)]
        family = Family(5, (1, 3), 4 if distilled else None)
        stack = initial_stack(family, streams, torch.float64)
        stack.bias.add_(
            torch.randn(stack.bias.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
        )
        teacher = (
            Stack(torch.randn(2, 1, 4, 5, dtype=torch.float64), torch.randn(2, 1, 5, dtype=torch.float64))
            if distilled
            else None
        )
        x = torch.from_numpy(
            np.stack([s.distribution.sample_nonzero(64, np.random.default_rng(i)) for i, s in enumerate(streams)])
        ).double()
        objective = Objective.for_streams(5, streams, 1.0, torch.float64)
        target = x if teacher is None else teacher.output(x)[:, 0]
        at_zero = torch.zeros(2, 5, dtype=torch.float64) if teacher is None else teacher.at_zero[:, 0]
        found = objective.gradients(stack, x, target, at_zero)
        for i, stream in enumerate(streams):
            for j in range(2):
                w, b = stack.weights[i, j].clone().requires_grad_(), stack.bias[i, j].clone().requires_grad_()
                zero = stream.distribution.zero_probability
                whole = (1 - zero) * plain_loss(w, b, x[i].T, target[i].T, objective.importance)
                whole = whole + zero * plain_loss(
                    w, b, torch.zeros(1, 5, dtype=torch.float64), at_zero[i][None], objective.importance
                )
                for mine, theirs in zip(found, torch.autograd.grad(whole, (w, b)), strict=True):
                    torch.testing.assert_close(mine[i, j], theirs, rtol=1e-9, atol=1e-12)

    def test_a_batch_is_as_good_as_one_alone(self) -> None:
        together, _ = train(TINY, dtype=torch.float64)
        for alpha, seed in ((0.7, 1), (0.9, 0)):
            alone, _ = train(
                replace(TINY, alphas=(alpha,), teacher_widths=(3,), widths=(2,), seeds=1, first_seed=seed),
                dtype=torch.float64,
            )
            stream = TINY.alphas.index(alpha) * TINY.seeds + seed
            for name in ("n6.direct", "n6.teacher3"):
                torch.testing.assert_close(
                    together[name].weights[stream, 1, :2], alone[name].weights[0, 0, :2], rtol=1e-9, atol=1e-12
                )
                torch.testing.assert_close(
                    together[name].bias[stream, 1], alone[name].bias[0, 0], rtol=1e-9, atol=1e-12
                )

    def test_missing_rows_stay_zero(self) -> None:
        stacks, _ = train(TINY)
        for width in (1, 2):
            assert not stacks["n6.direct"].weights[:, width - 1, width:].any()

    def test_the_same_for_the_same_seed_and_any_number_of_threads(self) -> None:
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(train(TINY)[0])
        finally:
            torch.set_num_threads(before)
        for name, stack in found[0].items():
            assert torch.equal(stack.weights, found[1][name].weights)
        other = train(replace(TINY, first_seed=5))[0]
        assert not torch.equal(other["n6.direct"].weights, found[0]["n6.direct"].weights)

    def test_one_feature_alone_is_learnt_exactly(self) -> None:
        """n = d = 1: WᵀW = 1 and b = 0 reconstruct everything."""
        result = run(
            SweepSettings(
                features=(1,),
                alphas=(0.5,),
                teacher_widths=(1,),
                seeds=2,
                steps=1500,
                batch=64,
                distilled=False,
                evaluation_rows=2048,
            )
        )
        assert (result.students.achieved_floor < 1e-5).all()
        np.testing.assert_allclose(result.tensors["n1.direct.weights"].abs().flatten(), 1, atol=0.01)

    @pytest.mark.slow
    def test_two_sparse_features_share_a_dimension_as_antipodes(self) -> None:
        """n = 2, d = 1: W = (1, −1), b = 0 fails only where both are active: E[x₂²]-like terms of
        probability (1−α)².
        """
        alpha = 0.95
        result = run(
            SweepSettings(
                features=(2,),
                alphas=(alpha,),
                teacher_widths=(1,),
                seeds=3,
                steps=3000,
                batch=128,
                slope=0.0,
                distilled=False,
            )
        )
        best = result.students.loc[result.students.achieved_floor.idxmin()]
        weights = result.tensors["n2.direct.weights"][int(best.seed), 0, 0]
        # Both active: x̂ = (ReLU(x₁−x₂), ReLU(x₂−x₁)): the larger is off by the smaller, the smaller by itself; E[min²]
        # = 1/6.
        antipodal = (1 - alpha) ** 2 * 2 / 6
        assert best.achieved_floor <= antipodal * 1.05
        assert best.achieved_floor == pytest.approx(antipodal, rel=0.2)
        assert float(weights[0] * weights[1]) < -0.8
        assert int(best.kept) == 2

    def test_of_two_dense_features_one_is_kept_and_the_other_put_out_as_its_mean(self) -> None:
        """n = 2, d = 1, α = 0.1: sharing costs more than losing, and a bias of E[x₂] leaves I₂·Var[x₂]."""
        result = run(
            SweepSettings(
                features=(2,), alphas=(0.1,), teacher_widths=(1,), seeds=3, steps=2000, slope=3.0, distilled=False
            )
        )
        distribution = FeatureDistribution(2, 0.1)
        assert result.students.achieved_floor.min() == pytest.approx(
            zipf_importance(2, 3.0)[1] * distribution.variance, rel=0.02
        )
        assert (result.students.kept == 1).any()

    @pytest.mark.slow
    def test_as_wide_as_there_are_features_nothing_is_lost(self) -> None:
        settings = SweepSettings(
            features=(3,),
            alphas=(0.9,),
            teacher_widths=(3, 5),
            widths=(3, 5),
            seeds=2,
            steps=1000,
            evaluation_rows=2048,
        )
        students = predictions(run(settings))
        assert (students.refined == 0).all()
        assert (students.achieved_floor < 0.01 * students.nothing).all()

    @pytest.mark.slow
    def test_floors_of_a_published_replication(self) -> None:
        """5 seeds, Zipf importances i⁻¹, 10,000 steps of Adam: within 3%, and within 5% at d = 1."""
        common = {"teacher_widths": (9,), "seeds": 5, "distilled": False}
        wide = (
            run(SweepSettings(features=(40,), alphas=(0.90,), widths=(1, 5, 9), **common))
            .students.groupby("width")[["achieved_floor", "kept"]]
            .mean()
        )
        assert wide.achieved_floor[1] == pytest.approx(0.0915, rel=0.05)
        assert wide.achieved_floor[5] == pytest.approx(0.0462, rel=0.03)
        assert wide.achieved_floor[9] == pytest.approx(0.0293, rel=0.03)
        assert wide.kept[5] == pytest.approx(11.6, abs=1.2)
        narrow = run(
            SweepSettings(features=(20,), alphas=(0.80,), **{**common, "teacher_widths": (4,), "widths": (4,)})
        ).students
        assert narrow.achieved_floor.mean() == pytest.approx(0.0687, rel=0.03)


class TestMeasures:
    @given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10_000))
    @brisk
    def test_capacities_add_up_to_no_more_than_the_width(self, width: int, n: int, seed: int) -> None:
        weights = torch.randn(width, n, generator=torch.Generator().manual_seed(seed))
        weights[:, ::3] = 0
        capacity = fractional_capacity(weights)
        assert float(capacity.sum()) <= width + 1e-9
        assert ((capacity >= 0) & (capacity <= 1 + 1e-12)).all()

    def test_known_capacities(self) -> None:
        np.testing.assert_allclose(
            fractional_capacity(torch.tensor([[1.0, -1.0, 0, 0], [0, 0, 2.0, 0]])), [0.5, 0.5, 1, 0]
        )

    def test_overlap_and_containment(self) -> None:
        kept, teacher = np.array([True, False, True, False]), np.array([True, True, False, False])
        assert overlap(kept, 2) == pytest.approx(1 / 3)
        assert containment(kept, teacher) == 0.5
        assert np.isnan(containment(np.zeros(4, dtype=bool), teacher))

    def test_floors_of_a_sweep_are_those_of_plain_samples(self) -> None:
        result = run(replace(TINY, evaluation_rows=2**15))
        importance = torch.from_numpy(zipf_importance(6)).float()
        x = torch.from_numpy(FeatureDistribution(6, 0.7).sample(2**17, np.random.default_rng(8))).T
        row = result.students.query("kind == 'direct' and alpha == 0.7 and width == 3 and seed == 1").iloc[0]
        plain = plain_loss(
            result.tensors["n6.direct.weights"][1, 2], result.tensors["n6.direct.bias"][1, 2], x, x, importance
        )
        assert row.achieved_floor == pytest.approx(float(plain), rel=0.03)
        assert 0 < row.floor_error < 0.03 * row.achieved_floor


class TestPredictors:
    def test_the_closed_forms_are_the_theorys(self) -> None:
        importance = zipf_importance(40) * (0.1 / 3)
        case = Case(importance, importance * 0.9, 0.9, 5, np.arange(40) < 11)
        found = {p.name: p.predict(case) for p in predictors()}
        assert found["refined"] == pytest.approx(float(theory.refined_floor(importance, 5, 0.9)))
        assert found["naive"] == pytest.approx(float(theory.naive_floor(importance, 5, 0.9)))
        assert found["measured set"] == pytest.approx(importance[11:].sum())
        assert found["measured set, Var"] == pytest.approx(0.9 * importance[11:].sum())

    @given(st.integers(1, 9), st.sampled_from([0.8, 0.9, 0.95]))
    @brisk
    def test_a_smooth_band_is_the_average_of_sharp_cuts(self, width: int, alpha: float) -> None:
        importance = zipf_importance(60)
        budgets = theory.budget(width, alpha) * np.linspace(0.85, 1.15, 2001)
        cumulated = np.concatenate([[0], np.cumsum(importance)])
        expected = np.mean([cumulated[-1] - np.interp(min(b, 60), np.arange(61), cumulated) for b in budgets])
        assert smooth_band_floor(importance, width, alpha) == pytest.approx(expected, rel=0.03)

    def test_wider_than_the_features_costs_nothing(self) -> None:
        importance = zipf_importance(5)
        assert float(theory.refined_floor(importance, 50, 0.9)) == 0

    def test_a_law_of_a_plugin_is_judged_too(self) -> None:
        class Two(CapacityLaw):
            name = "two_each"

            def features_per_dimension(self, alpha: float, importance: NDArray[np.float64]) -> float:
                return 2.0

        class Laws:
            @hookimpl
            def register_capacity_laws(self, register: Callable[[CapacityLaw], None]) -> None:
                register(Two())

        importance = zipf_importance(10)
        case = Case(importance, importance / 2, 0.9, 3, np.ones(10, dtype=bool))
        register_plugin(Laws(), name="laws of a test")
        try:
            found = {p.name: p.predict(case) for p in predictors()}
        finally:
            unregister_plugin("laws of a test")
        assert found["two_each"] == pytest.approx(importance[6:].sum())
        assert found["two_each, Var"] == pytest.approx(importance[6:].sum() / 2)

    def test_accuracy_is_that_of_scikit_learn_and_scipy(self) -> None:
        random = np.random.default_rng(4)
        observed = random.uniform(1, 2, 40)
        rows = pandas.DataFrame(
            {
                "n": 10,
                "alpha": 0.9,
                "width": 1 + np.arange(40) % 5,
                "achieved_floor": observed,
                "nothing": 5.0,
                "mine": observed + random.normal(0, 0.1, 40),
            }
        )
        table = accuracy(rows, ["mine", "achieved_floor"]).set_index(["predictor", "stratum"])
        mine, perfect = table.loc[("mine", "all")], table.loc[("achieved_floor", "all")]
        assert mine.r2 == pytest.approx(r2_score(rows.achieved_floor, rows.mine))
        assert mine.mae == pytest.approx(mean_absolute_error(rows.achieved_floor, rows.mine))
        assert mine.pearson_r == pytest.approx(pearsonr(rows.mine, rows.achieved_floor).statistic)
        assert (perfect.relative, perfect.relative_to_nothing, perfect.r2, perfect.mae) == (1, 1, 1, 0)
        # d* = 10/g(0.9) = 2.30: widths 1, then 2, then 3 to 5, which are 8 each
        assert table.loc["mine"]["count"].to_dict() == {
            "all": 40,
            "α = 0.9": 40,
            "d/d* < 0.8": 8,
            "0.8 ≤ d/d* ≤ 1.2": 8,
            "d/d* > 1.2": 24,
        }

    def test_accuracy_by_its_definitions(self) -> None:
        students = predictions(run(TINY))
        table = accuracy(cells(students))
        rows = cells(students)
        row = table[(table.predictor == "refined") & (table.stratum == "all")].iloc[0]
        error = (rows.refined - rows.achieved_floor).abs()
        assert row.relative == pytest.approx((1 - error / rows.achieved_floor).median())
        assert row.relative_to_nothing == pytest.approx((1 - error / rows.nothing).median())
        assert row.mae == pytest.approx(error.mean())
        by_alpha = table[(table.predictor == "refined") & table.stratum.str.startswith("α")].relative_to_nothing.min()
        listed = {(name, definition) for name, definition, _ in at_every_sparsity(table, by_alpha - 1e-9)}
        assert ("refined", "relative_to_nothing") in listed

    def test_packing_law_finds_what_was_put_in(self) -> None:
        alpha = np.repeat([0.8, 0.9, 0.95, 0.99], 3)
        g = np.array([theory.capacity(float(a)) for a in alpha])
        law = fit_packing_law(alpha, np.tile(1.1 * g**0.6, (4, 1)))
        assert (law.a, law.b) == (pytest.approx(1.1), pytest.approx(0.6))
        assert law.a_error == pytest.approx(0, abs=1e-9)
        one_missing = np.tile(1.1 * g**0.6, (4, 1)) * np.array([1, 1, 1, np.nan])[:, None]
        assert fit_packing_law(alpha, one_missing).b == pytest.approx(0.6)

    @pytest.mark.parametrize(
        ("alpha", "packing", "says"),
        [
            ([0.9], [[1.0], [1.0]], "needs at least two"),
            ([0.8, 0.9], [[1.0, np.nan]], "no seed converged"),
            ([0.8, 0.9], [[1.0, 0.0]], "keep no feature"),
        ],
    )
    def test_packing_that_says_nothing(self, alpha: list[float], packing: list[list[float]], says: str) -> None:
        with pytest.raises(CapacityError, match=says):
            fit_packing_law(np.array(alpha), np.array(packing))

    def test_errors_of_the_packing_law_are_the_spread_of_seeds(self) -> None:
        """Seeds that all scale one law: a's standard error is that of a mean, and b does not vary."""
        alpha, scales = np.array([0.8, 0.9, 0.95, 0.99]), np.random.default_rng(3).uniform(0.8, 1.2, 30)
        g = np.array([theory.capacity(float(a)) for a in alpha])
        law = fit_packing_law(alpha, scales[:, None] * g**0.5)
        assert law.a == pytest.approx(scales.mean())
        assert law.a_error == pytest.approx(scales.std() / len(scales) ** 0.5, rel=0.1)
        assert law.b_error == pytest.approx(0, abs=1e-9)


class TestSweep:
    def test_floors_fall_with_width(self) -> None:
        students = run(
            SweepSettings(
                features=(10,),
                alphas=(0.9,),
                teacher_widths=(5,),
                seeds=3,
                steps=1500,
                distilled=False,
                evaluation_rows=4096,
            )
        ).students
        floors = students.groupby("width").achieved_floor.min()
        assert all(wide < narrow for narrow, wide in pairwise(floors))

    def test_save_and_load(self, tmp_path: Path) -> None:
        result = run(TINY)
        loaded = SweepResult.load(str(result.save(tmp_path / "sweep")))
        assert loaded.to_frame() is loaded.students
        assert (loaded.settings, loaded.seconds, loaded.versions, loaded.machine) == (
            result.settings,
            result.seconds,
            result.versions,
            result.machine,
        )
        assert loaded.students.drop(columns="kept_set").equals(result.students.drop(columns="kept_set"))
        with pytest.raises(CapacityError, match="exists already"):
            result.save(tmp_path / "sweep")
        direct = result.students[result.students.kind == "direct"]
        achieved = [trace for trace in result.plot().data if trace.mode == "markers"]
        drawn = sorted(float(y) for trace in achieved for y in trace.y)
        assert drawn == pytest.approx(sorted(direct.groupby(["n", "alpha", "width"]).achieved_floor.mean()))

    @pytest.mark.parametrize(
        "damage", [lambda p: p.write_bytes(p.read_bytes()[:-40]), lambda p: p.unlink(), lambda p: p.write_text("{")]
    )
    @pytest.mark.parametrize("name", ["sweep.json", "students.safetensors"])
    def test_a_damaged_sweep_is_one_sentence(self, tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
        run(TINY).save(tmp_path / "sweep")
        damage(tmp_path / "sweep" / name)
        with pytest.raises(CapacityError, match="does not hold a whole toy sweep"):
            SweepResult.load(tmp_path / "sweep")

    @pytest.mark.parametrize("lr", [1e4, 1e30])
    def test_what_diverges_is_reported_and_left_out(self, lr: float) -> None:
        result = run(replace(TINY, lr=lr))
        assert len(result.diverged) > 0
        students = predictions(result)
        assert (
            len(students) == len(result.students) - len(result.diverged) == 0
            or np.isfinite(students.achieved_floor).all()
        )
        assert len(student_list(result)) == len(students.query("kind == 'direct'"))
        assert any(f"{len(result.diverged)} students diverged" in claim for claim in claims(result, students))

    @pytest.mark.slow
    def test_the_report(self) -> None:
        result = run(replace(TINY, steps=200))
        students = predictions(result)
        page = markdown(result, students, predictors(), "tl-capacity run toy-sweep")
        assert page.startswith("# Toy models: 4 configurations")
        for heading in (
            "Where the theorem holds",
            "Accuracy",
            "What the students keep",
            "Distilled students",
            "Floors",
        ):
            assert f"\n## {heading}" in page
        listed = student_list(result)
        assert len(listed) == (result.students.kind == "direct").sum() == 12
        assert listed[0].keys() == {"n", "alpha", "width", "seed", "achieved_floor", "kept"}
        for figure in (floors_figure(students), predictors_figure(students)):
            assert len(figure.data) > 4

    @pytest.mark.parametrize("content", [b"", b"nothing of the sort", b"\x08" + bytes(7) + b'{"a": 1}'])
    def test_a_damaged_checkpoint_is_one_sentence(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(CapacityError, match="is not a complete checkpoint"):
            train(TINY, tmp_path / "state")

    @pytest.mark.slow
    def test_killed_and_continued(self, tmp_path: Path) -> None:
        """SIGKILL after a checkpoint; the same call goes on to the same last bit."""
        checkpoint, longer = tmp_path / "state.safetensors", replace(TINY, steps=1200)
        code = (
            "from pathlib import Path; from tl_capacity.storage import checkpoints;"
            " from tl_capacity.toy import training, SweepSettings;"
            f" checkpoints.SECONDS = 0.0\ntraining.train(SweepSettings.from_json({longer.to_json()!r}),"
            f" Path({str(checkpoint)!r}))"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        resumed, whole = train(longer, checkpoint)[0], train(longer)[0]
        for name, stack in whole.items():
            assert torch.equal(stack.weights, resumed[name].weights)
            assert torch.equal(stack.bias, resumed[name].bias)
        with pytest.raises(CapacityError, match="belongs to other settings"):
            train(TINY, checkpoint)

    @pytest.mark.slow
    def test_the_recipe(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            "--features",
            "6",
            "--alphas",
            "0.7,0.9",
            "--teacher-widths",
            "2,3",
            "--steps",
            "40",
            "--out",
            str(tmp_path / "sweep"),
        ]
        recipe.run(main, arguments)
        said = " ".join(capsys.readouterr().out.split())
        assert "refined" in said
        assert "Median accuracy above 93% at every sparsity" in said
        assert not (tmp_path / "sweep.checkpoint.safetensors").exists()
        before = (tmp_path / "sweep" / "sweep.json").stat().st_mtime_ns
        # A run that was killed once the sweep was written leaves these.
        checkpoint = tmp_path / "sweep.checkpoint.safetensors"
        for path in (checkpoint, previous(checkpoint)):
            path.write_bytes(b"the state")
        recipe.run(main, arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
        assert (tmp_path / "sweep" / "sweep.json").stat().st_mtime_ns == before
        with pytest.raises(CapacityError, match="holds a sweep with other settings"):
            recipe.run(main, [*arguments, "--seeds", "3"])

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--seeds", "0"], "seeds = 0 is too few"),
            (["--alphas", "0.9,1.0"], "alpha = 1 is outside its domain"),
            (["--preset", "huge"], "'huge' is not a preset: choose one of quick, paper"),
            (["--lr", "-1"], "is not a learning rate"),
            (["--features", "10,10"], "each once"),
        ],
    )
    def test_bad_input(self, tmp_path: Path, options: list[str], says: str) -> None:
        with pytest.raises(CapacityError, match=says):
            recipe.run(main, [*options, "--out", str(tmp_path / "sweep")])
        assert not any(tmp_path.iterdir())
