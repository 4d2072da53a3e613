"""Feature recoverability against scikit-learn on the same scores, and on models in which it is planted which features a
student keeps.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import students_of
from hypothesis import given, settings
from hypothesis import strategies as st
from place import device, placed
from safetensors.numpy import load_file
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score
from tl_capacity.recipes.recover import main
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from tl_capacity import hookimpl, recipe
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError, MeasurementError, TokenSourceError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.measure.attach import add_capacity_hooks
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import load_model
from tl_capacity.plugins import register_plugin, unregister_plugin
from tl_capacity.probing import ridge as ridge_module
from tl_capacity.probing.ranking import BINS, Firings, Ranking, auroc_of, average_precision_of, bins_of_
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery import Recovery, most_important, recovery_figure
from tl_capacity.probing.ridge import (
    RIDGES,
    FitSums,
    Latents,
    Moments,
    Readout,
    choose_ridge,
    fit,
    principal_axes,
    solve,
)
from tl_capacity.probing.scores import Scores
from tl_capacity.probing.splitting import FIT, HELD_OUT, VALIDATION, parts_of, split
from tl_capacity.results.estimate import document_resamples
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.storage import checkpoints
from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import PADDING, TokenStream

HOOK = "blocks.0.hook_resid_post"
TOKENS, WIDTH, FEATURES, GROUPS = 3000, 12, 30, 64


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [token, width] far from zero, latents [token, feature] that fire on 0.5% to 50% of the tokens, and
    the document group of each token.
    """
    generator = torch.Generator().manual_seed(0)
    firing = torch.rand(TOKENS, FEATURES, generator=generator) < torch.linspace(0.005, 0.5, FEATURES)
    z = torch.where(firing, torch.rand(TOKENS, FEATURES, generator=generator), 0.0).double()
    noise = 0.3 * torch.randn(TOKENS, WIDTH, generator=generator)
    x = (z @ torch.randn(FEATURES, WIDTH, generator=generator).double() + noise + 100).float()
    return x, z, torch.arange(TOKENS) // 20 % GROUPS


def latents_of(z: torch.Tensor) -> Latents:
    tokens, features = torch.nonzero(z, as_tuple=True)
    return Latents.from_entries((tokens, features, z[tokens, features]), torch.arange(z.shape[1]), z.shape[1], len(z))


def moments_of(x: torch.Tensor, z: torch.Tensor, chunk: int = 1000) -> Moments:
    moments = Moments.zeros(x.shape[1], z.shape[1])
    for start in range(0, len(x), chunk):
        moments.update(x[start : start + chunk], latents_of(z[start : start + chunk]))
    return moments


def sums_of(x: torch.Tensor, z: torch.Tensor, others: torch.Tensor, z_others: torch.Tensor) -> FitSums:
    """Of tokens that fit, and others that choose the penalty."""
    sums = FitSums.zeros(x.shape[1], z.shape[1])
    sums.update(x, latents_of(z), chooses=False)
    sums.update(others, latents_of(z_others), chooses=True)
    return sums


def predicted(readout: Readout, x: torch.Tensor) -> np.ndarray[Any, Any]:
    x = x.double() if readout.basis is None else x.double() @ readout.basis
    return ((x - readout.x_mean) @ readout.weight.T + readout.z_mean).numpy(force=True)


@pytest.mark.parametrize("ridge", RIDGES[::3])
def test_a_streamed_readout_is_a_dense_ridge_regression(data: Any, ridge: float) -> None:
    x, z, _ = data
    readout = solve(moments_of(x, z, chunk=700), ridge)
    wide = x.double().numpy(force=True)
    dense = Ridge(alpha=ridge * ((wide - wide.mean(0)) ** 2).sum(0).mean()).fit(wide, z.numpy(force=True))
    np.testing.assert_allclose(readout.weight.numpy(force=True), dense.coef_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(predicted(readout, x), dense.predict(wide), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(readout.spread.numpy(force=True), dense.predict(wide).std(0), rtol=1e-7)


def test_sums_merge_to_those_of_all_tokens(data: Any) -> None:
    x, z, _ = data
    whole, merged = moments_of(x, z), moments_of(x[:900], z[:900]).merge(moments_of(x[900:], z[900:]))
    assert merged.tokens == TOKENS
    for name in ("x", "z", "xx", "zx", "zz"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.zx, z.T @ x.double())


def test_the_ridge_is_that_which_predicts_other_tokens_best(data: Any) -> None:
    x, z, _ = data
    x = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    few, others = slice(0, 40), slice(2000, 3000)

    def error(ridge: float) -> float:
        readout = solve(moments_of(x[few], z[few]), ridge)
        fires = (z[few] != 0).any(0).numpy(force=True)
        left = ((z[others].numpy(force=True) - predicted(readout, x[others])) ** 2).sum(0) / (
            z[others].var(0, correction=0) * 1000
        ).numpy(force=True)
        return float(left[fires].mean())

    best = choose_ridge(moments_of(x[few], z[few]), moments_of(x[others], z[others]))
    errors = {ridge: error(ridge) for ridge in RIDGES}
    assert best == min(errors, key=errors.__getitem__)
    assert RIDGES.index(best) > 0
    both = fit(sums_of(x[few], z[few], x[others], z[others]))
    torch.testing.assert_close(
        both.weight, solve(moments_of(torch.cat([x[few], x[others]]), torch.cat([z[few], z[others]])), best).weight
    )


def test_every_third_feature_may_choose_the_ridge(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, z, _ = data
    monkeypatch.setattr(ridge_module, "CANDIDATES", FEATURES // 3)
    monkeypatch.setattr(ridge_module, "SOLVED_AT_ONCE", 5)
    sums = sums_of(x[:2000], z[:2000], x[2000:], z[2000:])
    assert sums.step == 3
    for found, tokens in ((sums.training(), slice(2000)), (sums.validation, slice(2000, None))):
        expected = moments_of(x[tokens], z[tokens, ::3])
        assert found.tokens == expected.tokens
        for name in ("x", "z", "xx", "zx", "zz"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    readout = fit(sums)
    assert readout.ridge == choose_ridge(sums.training(), sums.validation)
    whole = solve(moments_of(x, z), readout.ridge)
    torch.testing.assert_close(readout.weight, whole.weight)
    torch.testing.assert_close(readout.spread, whole.spread)


def test_principal_components_are_read_as_if_activations_had_been_projected(data: Any) -> None:
    x, z, _ = data
    moments = moments_of(x, z)
    basis = principal_axes(moments, 4)
    centred = x.double() - x.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(basis @ basis.T, axes[:4].T @ axes[:4], rtol=1e-6, atol=1e-9)
    readout = fit(sums_of(x[:2000], z[:2000], x[2000:], z[2000:]), basis)
    np.testing.assert_allclose(
        predicted(readout, x),
        predicted(solve(moments_of((x.double() @ basis), z), readout.ridge), x.double() @ basis),
        atol=1e-7,
    )
    assert principal_axes(moments, 99).shape == (WIDTH, WIDTH)


def test_no_readout_of_activations_that_do_not_vary(data: Any) -> None:
    _, z, _ = data
    with pytest.raises(CapacityError, match="3,000 tokens all have the same activation"):
        solve(moments_of(torch.zeros(TOKENS, WIDTH), z), 1e-3)
    with pytest.raises(CapacityError, match="no feature fires both on"):
        choose_ridge(
            moments_of(torch.rand(5, WIDTH), torch.zeros(5, FEATURES).double()), moments_of(torch.rand(5, WIDTH), z[:5])
        )


@pytest.fixture(scope="module")
def judged(data: Any) -> tuple[Scores, np.ndarray[Any, Any], torch.Tensor]:
    """Scores of a readout, streamed; what it predicts; and the latents, of which the first never fires."""
    x, z, groups = data
    z = z.clone()
    z[2000:, 0] = 0
    readout = solve(moments_of(x[:2000], z[:2000]), 1e-4)
    ranking, held = Ranking(readout), Firings(FEATURES, x.device)
    for start in range(2000, TOKENS, 90):
        some = slice(start, min(start + 90, TOKENS))
        held.update(latents_of(z[some]), groups[some])
        ranking.update(x[some], latents_of(z[some]), groups[some])
    return ranking.scores(held), predicted(readout, x[2000:]), z[2000:]


def test_streamed_scores_are_scikit_learns_within_the_stated_error(judged: Any) -> None:
    scores, predictions, z = judged
    assert np.isnan(scores.auroc[0])
    assert np.isnan(scores.average_precision[0])
    assert scores.auroc_error[1:].max() < 0.01
    for feature in range(1, FEATURES):
        fires, score, own = (
            z[:, feature].numpy(force=True) > 0,
            predictions[:, feature],
            z[:, feature].numpy(force=True),
        )
        assert abs(scores.auroc[feature] - roc_auc_score(fires, score)) <= scores.auroc_error[feature] + 1e-6
        assert (
            abs(scores.average_precision[feature] - average_precision_score(fires, score))
            <= scores.average_precision_error[feature] + 1e-6
        )
        assert scores.r2[feature] == pytest.approx(r2_score(own, score.clip(min=0)), abs=1e-5)


@given(st.integers(0, 2**31), st.integers(2, 60), st.sampled_from([0.1, 1.0, 50.0, 1e20]))
@settings(max_examples=60, deadline=None)
def test_the_stated_error_bounds_any_scores(seed: int, tokens: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    score = (spread * random.standard_normal(tokens)).astype(np.float32)
    fires = np.zeros(tokens, dtype=bool)
    fires[random.permutation(tokens)[: random.integers(1, tokens)]] = True
    bins = bins_of_(torch.from_numpy(score.copy()), torch.empty(len(score))).numpy(force=True)
    assert bins.min() >= 0
    assert bins.max() < BINS
    assert (np.diff(bins[np.argsort(score)]) >= 0).all()
    firing, silent = (
        torch.from_numpy(np.bincount(bins[which], minlength=BINS).astype(np.float64))[None] for which in (fires, ~fires)
    )
    area, area_error = (float(v) for v in auroc_of(firing, silent))
    precision, precision_error = (float(v) for v in average_precision_of(firing, silent))
    assert area == pytest.approx(roc_auc_score(fires, bins))
    assert precision == pytest.approx(average_precision_score(fires, bins))
    assert abs(area - roc_auc_score(fires, score)) <= area_error + 1e-9
    assert abs(precision - average_precision_score(fires, score)) <= precision_error + 1e-9


def test_intervals_are_those_of_resampled_documents(judged: Any, data: Any) -> None:
    scores, predictions, z = judged
    groups = data[2][2000:].numpy(force=True)
    weights = document_resamples(np.bincount(groups, minlength=GROUPS))
    assert weights is not None
    assert scores.resampled_auroc is not None
    for feature in (2, 5, 8):  # which fire on 4% to 12% of the tokens
        exact = [
            roc_auc_score(z[:, feature] > 0, predictions[:, feature], sample_weight=w[groups]) for w in weights[:100]
        ]
        found = scores.resampled_auroc[:100, feature]
        assert np.corrcoef(exact, found)[0, 1] > 0.95
        assert np.std(found) == pytest.approx(np.std(exact), rel=0.15)
    count = scores.count(0.7, np.ones(FEATURES, dtype=bool))
    assert count.value == (scores.auroc >= 0.7).sum()
    assert count.low is not None
    assert count.high is not None
    assert count.low < count.value < count.high


VOCABULARY, TEACHER_WIDTH, STUDENT_WIDTH, PLANTED = 800, 32, 8, np.arange(20, 28)
KINDS = ("HookedTransformer", "TransformerBridge", "gpt_neox")


@pytest.fixture(scope="module")
def embedding() -> torch.Tensor:
    """[token, feature]: which features each token has, each a coordinate of the teacher's stream, the first eight of
    the largest variance.
    """
    random = torch.Generator().manual_seed(0)
    fires = torch.rand(VOCABULARY, TEACHER_WIDTH, generator=random) < 0.1
    size = torch.where(torch.arange(TEACHER_WIDTH) < STUDENT_WIDTH, 3.0, 1.0)
    return torch.where(fires, size + torch.rand(VOCABULARY, TEACHER_WIDTH, generator=random), 0.0)


@torch.no_grad()
def model_of(kind: str, vectors: torch.Tensor, tokenizer: Any = None) -> Any:
    """A model whose residual stream is its embedding: attention and MLP write nothing."""
    torch.manual_seed(0)
    if kind == "HookedTransformer":
        config = HookedTransformerConfig(
            n_layers=1,
            d_model=vectors.shape[1],
            n_ctx=32,
            d_head=4,
            d_vocab=VOCABULARY,
            act_fn="gelu",
            normalization_type="LN",
            attn_only=True,
            device="cpu",
        )
        model: Any = HookedTransformer(config)
        for parameter in (model.W_pos, model.blocks[0].attn.W_O, model.blocks[0].attn.b_O):
            parameter.zero_()
        model.W_E.copy_(vectors)
        return placed(model.eval())
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=vectors.shape[1],
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    model = GPTNeoXForCausalLM(config).eval()
    for module in (model.gpt_neox.layers[0].attention.dense, model.gpt_neox.layers[0].mlp.dense_4h_to_h):
        module.weight.zero_()
        module.bias.zero_()
    model.gpt_neox.embed_in.weight.copy_(vectors)
    model = placed(model)
    if kind == "TransformerBridge":
        return TransformerBridge.boot_transformers(
            "local/planted", hf_model=model, tokenizer=tokenizer, device=device()
        ).eval()
    return model


@pytest.fixture(scope="module")
def coordinates(make_sae: Callable[..., Any]) -> Any:
    """An SAE whose latents are the coordinates of the stream."""
    sae = make_sae("standard", HOOK, d_sae=TEACHER_WIDTH)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.eye(TEACHER_WIDTH))
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    return sae


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """240 documents of 32 tokens each."""
    return torch.randint(0, VOCABULARY, (240, 32), generator=torch.Generator().manual_seed(1))


def measurement_of(teacher: Any, sae: Any, rows: torch.Tensor) -> HookMeasurement:
    with add_capacity_hooks(teacher, {HOOK: sae}, mask_token_ids=()) as capacity:
        return capacity.run(rows, progress=False).measurement()[HOOK]


def recovered(
    teacher: Any, sae: Any, students: dict[str, Any], stream: Any, measured: HookMeasurement, **options: Any
) -> Recovery:
    stream = list(torch.split(stream, 8)) if isinstance(stream, torch.Tensor) else stream
    found: Recovery = recover_features(
        teacher, sae, students, stream, measured=measured, progress=False, **{"rule": CountingRule(), **options}
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_keeps_exactly_the_features_that_its_projection_keeps(
    kind: str, embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor, tokenizer: Any
) -> None:
    random = torch.Generator().manual_seed(2)
    mixed = torch.linalg.qr(torch.randn(STUDENT_WIDTH, STUDENT_WIDTH, generator=random)).Q
    teacher, student, blank = (
        model_of(kind, vectors, tokenizer)
        for vectors in (
            embedding,
            embedding[:, PLANTED] @ mixed,
            torch.randn(VOCABULARY, STUDENT_WIDTH, generator=random),
        )
    )
    measured = measurement_of(teacher, coordinates, rows)
    found = recovered(teacher, coordinates, {"planted": student}, rows, measured, random={"planted": blank})
    of_student = found.students[0]
    assert found.judged.all()
    assert np.flatnonzero(found.kept(of_student.student)).tolist() == PLANTED.tolist()
    assert of_student.student.auroc[PLANTED].min() > 0.999
    assert of_student.student.r2[PLANTED].min() > 0.99
    assert np.delete(of_student.student.auroc, PLANTED).max() < 0.8
    assert found.kept(found.teacher).all()
    assert np.flatnonzero(found.kept(of_student.pca)).tolist() == list(
        range(STUDENT_WIDTH)
    )  # those of the largest variance
    assert of_student.random is not None
    assert not found.kept(of_student.random).any()

    [row] = found.to_json()
    assert (row["width"], row["hook"], row["n_features"], row["n_judged"], row["tau"]) == (8, HOOK, 32, 32, 0.95)
    assert (row["kept"], row["kept_random"], row["kept_teacher"], row["kept_pca"]) == (8, 0, 32, 8)
    assert row["budget"] == pytest.approx(8 * measured.summary.capacity.value)
    assert row["by_tau"]["0.80"] == {"student": 8, "random": 0, "pca": 8, "teacher": 32}
    assert sum(found.tokens.values()) == rows.numel()
    predicted = set(np.argsort(-found.importances)[: row["predicted"]].tolist())
    assert row["overlap"]["predicted"] == len(predicted)
    assert row["overlap"]["kept_of_predicted"] == len(predicted & set(PLANTED.tolist())) / len(predicted)
    assert row["overlap"]["kept_of_all"] == row["overlap"]["ordered_by_chance"] == 8 / 32
    assert (
        row["overlap"]["ordered"] == len(set(np.argsort(-found.importances)[:8].tolist()) & set(PLANTED.tolist())) / 8
    )


@pytest.fixture(scope="module")
def planted(embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor) -> tuple[Any, Any, HookMeasurement]:
    """A teacher, its student and its measurement."""
    teacher = model_of("gpt_neox", embedding)
    return teacher, model_of("gpt_neox", embedding[:, PLANTED]), measurement_of(teacher, coordinates, rows)


def test_readouts_are_those_of_a_dense_regression_on_saved_activations(
    planted: Any, embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor
) -> None:
    """The whole path, done by hand: documents by part, scikit-learn's regression on all but the held-out ones, and its
    area under the curve.
    """
    teacher, student, measured = planted
    found = recovered(teacher, coordinates, {"a": student}, rows, measured).students[0].student
    parts = np.array(parts_of(np.arange(len(rows))))
    tokens = {part: rows[torch.from_numpy(np.isin(parts, part))].flatten() for part in ((FIT, VALIDATION), (HELD_OUT,))}
    x, z = (
        {part: vectors[ids].double().numpy(force=True) for part, ids in tokens.items()}
        for vectors in (embedding[:, PLANTED], embedding)
    )
    fitted, judged_on = (FIT, VALIDATION), (HELD_OUT,)
    alpha = found.ridge * ((x[fitted] - x[fitted].mean(0)) ** 2).sum(0).mean()
    predictions = Ridge(alpha=alpha).fit(x[fitted], z[fitted]).predict(x[judged_on])
    expected = [
        roc_auc_score(z[judged_on][:, feature] > 0, predictions[:, feature]) for feature in range(TEACHER_WIDTH)
    ]
    assert (abs(found.auroc - expected) <= found.auroc_error + 1e-4).all()


def test_only_positions_that_the_sae_was_trained_on_are_read(
    planted: Any, coordinates: Any, rows: torch.Tensor
) -> None:
    teacher, student, _ = planted
    sae = copy.deepcopy(coordinates)
    sae.cfg.metadata.seqpos_slice = (4, -8)
    with add_capacity_hooks(teacher, {HOOK: sae}) as capacity:
        measured = capacity.run(rows, progress=False).measurement()[HOOK]
    found = recovered(teacher, sae, {"a": student}, rows, measured, rule=None)
    special = CountingRule.for_model(teacher, None).special_ids
    counted = ~np.isin(rows[:, slice(4, -8)].numpy(force=True), special)
    assert sum(found.tokens.values()) == measured.summary.n_tokens == counted.sum()


@pytest.mark.slow
def test_several_students_come_out_as_each_alone(
    planted: Any, embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor
) -> None:
    teacher, student, measured = planted
    other = model_of("gpt_neox", embedding[:, :16])
    together = recovered(teacher, coordinates, {"wide": other, "narrow": student}, rows, measured)
    assert [(s.name, s.width) for s in together.students] == [("narrow", 8), ("wide", 16)]
    alone = recovered(teacher, coordinates, {"narrow": student}, rows, measured)
    for name in ("auroc", "average_precision", "r2"):
        np.testing.assert_array_equal(
            getattr(together.students[0].student, name), getattr(alone.students[0].student, name)
        )
        np.testing.assert_array_equal(getattr(together.teacher, name), getattr(alone.teacher, name))


def test_checkpoints_of_every_version_go_on_to_the_same_scores(
    planted: Any, coordinates: Any, rows: torch.Tensor, tmp_path: Path
) -> None:
    """Version 0.1 kept the sums of the latents with every readout, in float64."""
    teacher, student, measured = planted

    def once(folder: str) -> tuple[Recovery, list[Checkpoint]]:
        both = [Checkpoint(tmp_path / folder / f"{which}.safetensors", {}) for which in ("fit", "judge")]
        found = recovered(teacher, coordinates, {"a": student}, rows, measured, checkpoints=tuple(both))
        return found, [Checkpoint(checkpoint.path, {}) for checkpoint in both]

    whole, (fitted, judged) = once("new")
    sums = judged.part("held-out latents")
    readouts = {name.rpartition("/")[0] for name in judged.tensors} - {"held-out latents"}
    earlier = {name: tensor for name, tensor in judged.tensors.items() if not name.startswith("held-out latents/")}
    for readout in readouts:
        earlier |= {f"{readout}/{name}": tensor.double().clone() for name, tensor in sums.items()}
    for part, tensors in ((fitted, fitted.tensors), (judged, earlier)):
        Checkpoint(tmp_path / "old" / str(part.path and part.path.name), {}).save(tensors, part.about)
    again, _ = once("old")
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    assert again.rows == whole.rows


def test_it_shows_itself(planted: Any, coordinates: Any, rows: torch.Tensor) -> None:
    from rich.console import Console

    teacher, student, measured = planted
    found = recovered(teacher, coordinates, {"narrow": student}, rows, measured, tau=0.9)
    console = Console(width=200, record=True, file=StringIO())
    console.print(found)
    text = console.export_text()
    assert "Features with AUROC ≥ 0.9" in text
    assert "narrow (d=8)" in text
    figure = recovery_figure([found])
    assert [trace.name for trace in figure.data][:1] == ["student"]
    assert list(figure.data[0].y) == [8]
    assert figure.layout.yaxis.title.text == "features with AUROC ≥ τ = 0.9"
    assert figure.layout.xaxis.title.text == "student width d_S (dimensions)"
    limits = [trace for trace in figure.data if "d·g" in trace.name or "equilibrium" in trace.name]
    assert [(len(trace.x), trace.mode) for trace in limits] == [(1, "lines+markers")] * 2
    assert [trace.name for trace in found.plot().data] == [trace.name for trace in figure.data]
    assert "note:" not in text
    page, frame, (row,) = found._repr_html_(), found.to_frame(), found.to_json()
    assert "<table>" in page
    assert "Features with AUROC ≥ 0.9" in page
    assert len(frame) == 1
    assert (frame.kept[0], frame["overlap kept_of_all"][0]) == (8, row["overlap"]["kept_of_all"])
    assert [frame["kept low"][0], frame["kept high"][0]] == row["intervals"]["student"]
    assert frame["r2 teacher"][0] == row["readouts"]["teacher"]["r2"]
    assert {"teacher/auroc", "narrow/student/auroc", "narrow/pca/r2", "features"} <= found.arrays().keys()


class Halves(CapacityLaw):
    """Half a feature per dimension, under the name of a field of the file."""

    def __init__(self, name: str) -> None:
        self.name, self.summary = name, "½"

    def features_per_dimension(self, alpha: float, importance: np.ndarray[Any, Any]) -> float:
        return 0.5


@pytest.mark.parametrize("name", ["halves", "kept"])
def test_the_budget_of_any_registered_law_is_kept(
    name: str, planted: Any, coordinates: Any, rows: torch.Tensor, tmp_path: Path
) -> None:
    class Plugin:
        @hookimpl
        def register_capacity_laws(self, register: Callable[[CapacityLaw], None]) -> None:
            register(Halves(name))

    teacher, student, measured = planted
    register_plugin(Plugin(), name="halves")
    try:
        found = recovered(teacher, coordinates, {"narrow": student}, rows, measured)
        Recoverability(found.rows).save(tmp_path)
    finally:
        unregister_plugin("halves")
    (row,) = Recoverability.load(tmp_path).rows
    assert list(row.budgets) == ["compressed_sensing", "equilibrium", "proportional", name]
    assert row.budgets[name].value == 0.5 * STUDENT_WIDTH
    assert row.counts["kept"].value == 8
    assert row.labelled[f"budget by the {name} law"] == row.budgets[name]
    assert f"{name} law" in [trace.name for trace in found.plot().data]
    assert len(Recoverability.load(tmp_path).to_frame()) == 1


def test_a_file_of_the_first_version_is_the_same_when_saved_again(tmp_path: Path) -> None:
    published = Path(__file__).parents[2] / "docs" / "results" / "recoverability.json"
    recoverability = Recoverability.load(published)
    recoverability.save(tmp_path)
    assert (tmp_path / "recoverability.json").read_bytes() == published.read_bytes()
    assert recoverability.plot().layout.yaxis.title.text == "features with AUROC ≥ τ = 0.95"


def test_precision_stands_between_the_floor_and_the_ceiling(
    planted: Any, coordinates: Any, rows: torch.Tensor, embedding: torch.Tensor
) -> None:
    teacher, student, measured = planted
    blank = model_of("gpt_neox", torch.randn(VOCABULARY, STUDENT_WIDTH, generator=torch.Generator().manual_seed(5)))
    found = recovered(teacher, coordinates, {"narrow": student}, rows, measured, random={"narrow": blank})
    header, ((*_, precision, r2),) = found.cells()
    readouts = found.to_json()[0]["readouts"]
    for name, shown in (("average_precision", precision), ("r2", r2)):
        own, floor, ceiling = (
            f"{readouts[readout][name]:.2f}".replace("-0.00", "0.00") for readout in ("student", "random", "teacher")
        )
        assert shown == f"{own} ({floor} – {ceiling})"
    assert header[-2:] == ["median AP", "median R²"]


def test_few_documents_are_said_to_give_no_intervals(planted: Any, coordinates: Any, rows: torch.Tensor) -> None:
    from rich.console import Console

    teacher, student, measured = planted
    found = recovered(teacher, coordinates, {"narrow": student}, rows[:20], measured)
    assert found.count(found.teacher).low is None
    console = Console(width=200, record=True, file=StringIO())
    console.print(found)
    for shown in (console.export_text(), found._repr_html_()):
        assert re.search(
            r"note: features fire in [1-7] of 64 groups of held-out documents, too few for intervals", shown
        )


def test_seeds_of_a_width_are_not_joined(
    planted: Any, embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor
) -> None:
    teacher, student, measured = planted
    other = model_of("gpt_neox", embedding[:, 14:22])
    figure = recovered(teacher, coordinates, {"seed0": student, "seed1": other}, rows, measured, tau=0.8).plot()
    assert [(trace.name, len(trace.x)) for trace in figure.data if trace.name == "teacher"] == [("teacher", 1)]
    own = [trace for trace in figure.data if trace.name == "student"]
    assert all(len(set(trace.x)) == len(trace.x) or trace.mode == "markers" for trace in own)


@pytest.mark.usefixtures("few_replicates", "unchecked")
def test_the_best_layer_is_that_of_dense_regressions_on_the_documents_that_fit(
    planted: Any, embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor
) -> None:
    """scikit-learn's errors at each layer, without a look at the documents that judge."""
    teacher, _, measured = planted
    torch.manual_seed(4)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    deep = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **sizes, initializer_range=0.7))
    rows = rows[:120]
    found = recovered(teacher, coordinates, {"deep": deep.eval(), "alike": planted[1]}, rows, measured)
    parts = np.array(parts_of(np.arange(len(rows))))
    with torch.no_grad():
        states = deep.model(rows, output_hidden_states=True).hidden_states[1:]
        # Behind the last layer transformers gives the normed state.
        seen: list[torch.Tensor] = []
        remove = deep.model.layers[2].register_forward_hook(lambda *_: seen.append(_[2]))
        deep.model(rows)
        remove.remove()
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    z = {
        part: embedding[rows[torch.from_numpy(parts == part)].flatten()].double().numpy(force=True)
        for part in (FIT, VALIDATION)
    }
    expected = {}
    for layer, state in enumerate([*states[:2], last]):
        x = {
            part: state[torch.from_numpy(parts == part)].flatten(0, 1).double().numpy(force=True)
            for part in (FIT, VALIDATION)
        }
        errors = []
        for ridge in RIDGES:
            alpha = ridge * ((x[FIT] - x[FIT].mean(0)) ** 2).sum(0).mean()
            left = z[VALIDATION] - Ridge(alpha=alpha).fit(x[FIT], z[FIT]).predict(x[VALIDATION])
            spread = ((z[VALIDATION] - z[VALIDATION].mean(0)) ** 2).sum(0)
            errors.append(((left**2).sum(0) / spread).mean())
        expected[f"blocks.{layer}.hook_resid_post"] = min(errors)
    row = {row.student: row for row in found.rows}["deep"]
    assert row.tried == pytest.approx(expected, rel=1e-4)
    assert row.student_hook == min(expected, key=expected.__getitem__)
    assert f"deep was read at {row.student_hook}, the best of 3 on the documents that fit" in found.notes()
    assert f"deep (d=8, {row.student_hook}, chosen)" in [cells[0] for cells in found.cells()[1]]
    saved = Recoverability.from_json(json.loads(json.dumps(found.to_json()))).rows
    assert {row.student: (row.student_hook, row.tried) for row in saved}["deep"] == (row.student_hook, row.tried)
    assert "student_hook" not in {row["student"]: row for row in found.to_json()}["alike"]
    named = recovered(
        teacher, coordinates, {"deep": deep}, rows, measured, student_hooks={"deep": "blocks.1.hook_resid_post"}
    )
    assert (named.rows[0].student_hook, named.rows[0].tried) == ("blocks.1.hook_resid_post", {})


def test_models_are_left_as_they_were(planted: Any, coordinates: Any, rows: torch.Tensor) -> None:
    teacher, student, measured = planted
    student.train()
    recovered(teacher, coordinates, {"narrow": student}, rows, measured)
    assert student.training
    student.eval()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for model in (teacher, student) for module in model.modules()
    )


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"tau": 0.3}, CapacityError, "tau = 0.3 is not an AUROC"),
        ({"students": {}}, CapacityError, "there is no student"),
        ({"random": {"b": None}}, CapacityError, "random weights are given for b, which is not a student"),
        ({"max_tokens": 0}, CapacityError, "0 tokens are too few to read features from"),
        ({"max_tokens": -5}, CapacityError, "-5 tokens are too few to read"),
        (
            {"max_tokens": 100},
            TokenSourceError,
            r"^no document is left for validation \(--tokens 100 reads 8 documents; of every ten, 6 fit, 1 chooses"
            r" the ridge and 3 judge\): ask for --tokens 512 or more$",
        ),
        (
            {"stream": torch.zeros(3, 8).long()},
            TokenSourceError,
            "the text has 3 documents; .*: pass more documents$",
        ),
    ],
)
def test_bad_input(
    planted: Any, coordinates: Any, rows: torch.Tensor, change: dict[str, Any], kind: type[Exception], says: str
) -> None:
    teacher, student, measured = planted
    given = {"students": {"a": student}, "stream": rows, **change}
    with pytest.raises(kind, match=says):
        recovered(teacher, coordinates, measured=measured, **given)


def test_a_stream_that_can_be_read_once(planted: Any, coordinates: Any, rows: torch.Tensor) -> None:
    teacher, student, measured = planted
    with pytest.raises(TokenSourceError, match="read only once"):
        recovered(teacher, coordinates, {"a": student}, iter([rows]), measured)


def test_another_sae(planted: Any, make_sae: Callable[..., Any], rows: torch.Tensor) -> None:
    teacher, student, measured = planted
    with pytest.raises(DictionaryError, match=r"not the one that was measured at blocks\.0"):
        recovered(teacher, make_sae("standard", HOOK, d_sae=TEACHER_WIDTH, seed=5), {"a": student}, rows, measured)


def test_a_student_without_the_hook(
    make_model: Callable[..., Any], make_sae: Callable[..., Any], tokens: torch.Tensor
) -> None:
    teacher, sae = make_model("gpt_neox"), make_sae("standard", "blocks.2.hook_resid_post")
    shallow = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )
    with add_capacity_hooks(teacher, sae) as capacity:
        measured = capacity.run(tokens, progress=False).measurement()["blocks.2.hook_resid_post"]
    hook = "blocks.2.hook_resid_post"
    with pytest.raises(
        HookPointError,
        match=r"the student 'shallow' cannot be read at blocks\.2\.hook_resid_post: .* is not a hook point",
    ):
        recover_features(teacher, sae, {"shallow": shallow}, tokens, measured=measured, student_hooks={"shallow": hook})
    with pytest.raises(CapacityError, match="a hook point is named for other, which is not a student"):
        recover_features(teacher, sae, {"shallow": shallow}, tokens, measured=measured, student_hooks={"other": hook})


def test_nan_activations(planted: Any, embedding: torch.Tensor, coordinates: Any, rows: torch.Tensor) -> None:
    teacher, _, measured = planted
    broken = model_of("gpt_neox", embedding[:, PLANTED].clone().index_fill_(0, rows[0, :1], float("nan")))
    with pytest.raises(
        CapacityError,
        match=r"the student 'broken' has NaN or infinite activations at blocks\.0\.hook_resid_post in batch \d",
    ):
        recovered(teacher, coordinates, {"broken": broken}, rows, measured)


def test_documents_are_split_whole_and_none_is_lost(texts: list[str], tokenizer: Any) -> None:
    stream = TokenStream(texts * 5, tokenizer, context=32, batch_rows=4)
    batches = list(split(stream, (FIT, VALIDATION, HELD_OUT)))
    documents = {
        part: {d for p, batch in batches if p == part for d in batch.documents.tolist()}
        for part in (FIT, VALIDATION, HELD_OUT)
    }
    assert sorted(d for some in documents.values() for d in some) == list(range(len(texts) * 5))
    assert len(documents[FIT]) > len(documents[HELD_OUT]) > len(documents[VALIDATION]) > 0
    original = sorted(tuple(row[row != PADDING].tolist()) for batch in stream for row in batch.tokens)
    assert sorted(tuple(row[row != PADDING].tolist()) for _, batch in batches for row in batch.tokens) == original
    assert max(len(batch.tokens) for _, batch in batches) == 4
    assert [b.documents.tolist() for _, b in split(stream, (HELD_OUT,))] == [
        b.documents.tolist() for p, b in batches if p == HELD_OUT
    ]


def test_most_important() -> None:
    assert most_important(np.array([1.0, 5.0, 3.0]), 2).tolist() == [False, True, True]
    assert not most_important(np.array([1.0, 5.0]), 0).any()
    assert most_important(np.array([1.0, 5.0]), 9).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A measurement of the embedded teacher and a distillation of it, both too short to be good."""
    from tl_capacity.distillation import DistillSettings, distill
    from tl_capacity.measure.job import measure
    from tl_capacity.measure.settings import MeasureSettings
    from tl_capacity.models.loading import load_model

    folder, teacher = tmp_path_factory.mktemp("recover"), load_model("embedded")
    measure(MeasureSettings("embedded", folder / "measurement", tokens=6_000, context=128, progress=False))
    stream = TokenStream("embedded", teacher.tokenizer, context=64)
    settings = DistillSettings(tokens=1_000, evaluations=2, heldout_tokens=200, control=True)
    distill(
        teacher,
        [16],
        stream,
        heldout=TokenStream("embedded:heldout", teacher.tokenizer, context=64),
        settings=settings,
        out=folder / "students",
        progress=False,
    )
    return folder / "measurement", folder / "students"


@pytest.mark.slow
def test_the_recipe(saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *map(str, saved),
        "--out",
        str(tmp_path / "out"),
        "--tokens",
        "12000",
        "--hook",
        "blocks.1.hook_resid_post,blocks.5.hook_resid_post",
    ]
    recipe.run(main, arguments)
    assert "width16-seed0 (d=16)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "recoverability.json").read_text())
    assert [(row["hook"], row["student"], row["width"]) for row in rows] == [
        (f"blocks.{n}.hook_resid_post", "width16-seed0", 16) for n in (1, 5)
    ]
    for row in rows:
        assert 0 <= row["kept"] <= row["kept_teacher"] <= row["n_judged"] <= row["n_features"]
        features = load_file(tmp_path / "out" / f"features-{row['hook']}.safetensors")
        kept = (features["width16-seed0/student/auroc"] >= 0.95) & features["judged"]
        assert kept.sum() == row["kept"]
        assert len(features["features"]) == row["n_features"]
    assert Recoverability.load(tmp_path / "out").to_json() == rows
    about = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert about["settings"]["source"] == "embedded:heldout"
    assert (tmp_path / "out" / "recoverability.html").stat().st_size > 1_000_000
    before = (tmp_path / "out" / "recoverability.json").stat().st_mtime_ns
    assert recipe.run(main, arguments) is None
    assert (tmp_path / "out" / "recoverability.json").stat().st_mtime_ns == before
    with pytest.raises(CapacityError, match=r"already holds a recoverability\.json of other settings \(tau = 0\.95\)"):
        recipe.run(main, [*arguments, "--tau", "0.9"])


@pytest.mark.slow
def test_the_recipe_wants_both_folders_of_one_teacher(saved: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Missing parameter: distillation"):
        recipe.run(main, [str(saved[0])])
    with pytest.raises(MeasurementError, match="is not a distillation"):
        recipe.run(main, [str(saved[0]), str(tmp_path), "--out", str(tmp_path / "out")])
    measurement = Measurement.load(saved[0])
    replace(measurement, provenance=replace(measurement.provenance, revision="0")).save(tmp_path / "older")
    with pytest.raises(CapacityError, match="was measured with other weights than 'embedded' has now"):
        recipe.run(main, [str(tmp_path / "older"), str(saved[1]), "--out", str(tmp_path / "out")])
    replace(DistillationRun.load(saved[1]), fingerprint="0").save(tmp_path)
    with pytest.raises(CapacityError, match="was distilled from 'embedded' with other weights than 'embedded' has now"):
        recipe.run(main, [str(saved[0]), str(tmp_path), "--out", str(tmp_path / "out")])


def recovering(setup: Path, students: Path, out: Path, *more: object) -> list[str]:
    given = ["--source", setup / "text.jsonl", "--hook", "blocks.1.hook_resid_post", "--tau", 0.8, "--out", out, *more]
    return [str(each) for each in (setup / "measured-for-any-student", students, *given)]


@pytest.fixture(scope="module")
def measured_setup(setup: Path) -> Path:
    """The tiny model of `setup`, measured."""
    from tl_capacity.measure.job import measure
    from tl_capacity.measure.settings import MeasureSettings

    measure(
        MeasureSettings(
            str(setup / "model"),
            setup / "measured-for-any-student",
            (str(setup / "sae"),),
            tokens=2_000,
            source=str(setup / "text.jsonl"),
            progress=False,
        )
    )
    return setup


@pytest.mark.slow
@pytest.mark.usefixtures("few_replicates", "unchecked")
def test_the_tokens_that_count_are_those_that_were_measured(measured_setup: Path, tmp_path: Path) -> None:
    setup = measured_setup
    measured, folder = Measurement.load(setup / "measured-for-any-student"), tmp_path / "measurement"
    settings = {**measured.provenance.settings, "skip_first_positions": 5, "masked_token_ids": [0, 2]}
    replace(measured, provenance=replace(measured.provenance, settings=settings)).save(folder)
    arguments = recovering(setup, students_of(setup), tmp_path / "out", "--tokens", 6_000, "--no-random")
    [found] = recipe.run(main, [str(folder), *arguments[1:]])
    stream = TokenStream(str(setup / "text.jsonl"), load_model(str(setup / "model")).tokenizer, context=32)
    rows = [row for _, batch in split(stream, (FIT, VALIDATION, HELD_OUT), 6_000) for row in batch.tokens]
    assert sum(found.tokens.values()) == sum(int((~np.isin(row[5:], (0, 2, PADDING))).sum()) for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("few_replicates", "unchecked")
def test_any_student_is_read_out_as_a_distilled_one(measured_setup: Path, tmp_path: Path) -> None:
    from tl_capacity.distillation.observation import observe

    setup, distilled = measured_setup, students_of(measured_setup)
    folder = distilled / "students" / "width8-seed0"
    teacher, student = load_model(str(setup / "model")), load_model(str(folder))
    stream = TokenStream(str(setup / "text.jsonl"), teacher.tokenizer, context=32)
    observe(teacher, {"width8-seed0": student}, stream, tokens=100, out=tmp_path / "observed", progress=False)
    found = {}
    for name, students in (("distilled", distilled), ("folder", folder), ("observed", tmp_path / "observed")):
        recipe.run(main, recovering(setup, students, tmp_path / name, "--tokens", 6_000, "--no-random"))
        rows = json.loads((tmp_path / name / "recoverability.json").read_text())
        [found[name]] = [row for row in rows if row["width"] == 8]
        assert not list((tmp_path / name).glob("*checkpoint*"))
    assert found["folder"] == found["observed"] == found["distilled"]
    student.model.get_input_embeddings().weight.data.add_(1)
    student.model.save_pretrained(tmp_path / "changed")
    run = DistillationRun.load(tmp_path / "observed")
    moved = replace(run, students=(replace(run.students[0], place=str(tmp_path / "changed")),))
    student.tokenizer.save_pretrained(tmp_path / "changed")
    moved.save(tmp_path / "moved")
    with pytest.raises(CapacityError, match="changed have changed since `tl-capacity observe` judged it"):
        recipe.run(main, recovering(setup, tmp_path / "moved", tmp_path / "out"))


@pytest.mark.usefixtures("few_replicates", "unchecked")
def test_a_refused_run_leaves_nothing_and_its_advice_works(measured_setup: Path, tmp_path: Path) -> None:
    setup, students, out = measured_setup, students_of(measured_setup), tmp_path / "out"
    long = tmp_path / "long.jsonl"
    words = [json.loads(line)["text"] for line in (setup / "text.jsonl").read_text().splitlines()]
    texts = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]  # 560 tokens each
    long.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = ("--source", long, "--no-random")
    with pytest.raises(TokenSourceError, match=r"no document is left for .*: ask for --tokens \d+ or more$") as refused:
        recipe.run(main, recovering(setup, students, out, *more, "--tokens", 600))
    assert list(tmp_path.iterdir()) == [long]
    enough = re.findall(r"--tokens (\d+) or more", str(refused.value))[0]
    recipe.run(main, recovering(setup, students, out, *more, "--tokens", enough))
    assert (out / "recoverability.json").exists()


@pytest.mark.usefixtures("few_replicates", "unchecked")
def test_a_run_that_is_refused_on_the_way_keeps_no_checkpoint(
    measured_setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, out = measured_setup, tmp_path / "out"
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    student = load_model(str(students_of(setup) / "students" / "width8-seed0"))
    with torch.no_grad():
        student.model.get_input_embeddings().weight[60] = float("nan")  # a rare word
    for part in (student.model, student.tokenizer):
        part.save_pretrained(tmp_path / "broken")
    with pytest.raises(CapacityError, match=r"the student 'broken' has NaN or infinite activations at .* in batch"):
        recipe.run(main, recovering(setup, tmp_path / "broken", out, "--no-random"))
    assert not list(out.glob("*"))
    whole = students_of(setup) / "students" / "width8-seed0"
    recipe.run(main, recovering(setup, whole, out, "--no-random", "--tokens", 6_000))


def test_a_student_of_other_tokens_is_refused_before_the_first_pass(measured_setup: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    student = load_model(str(students_of(measured_setup) / "students" / "width8-seed0"))
    student.model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CapacityError, match="the student 'other' has a different tokenizer from the teacher"):
        recipe.run(main, recovering(measured_setup, folder, tmp_path / "out"))
    with pytest.raises(
        HookPointError, match=r"the student 'width8-seed0' cannot be read .*: name another --student-hook"
    ):
        recipe.run(
            main,
            recovering(
                measured_setup,
                students_of(measured_setup),
                tmp_path / "out",
                "--student-hook",
                "width8-seed0=blocks.7.hook_resid_post",
            ),
        )
    assert not (tmp_path / "out").exists()
