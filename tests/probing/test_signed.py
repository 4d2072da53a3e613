"""Features that fire with either sign, as those of AbsTopK SAEs and of bases do: both sides are told, each by its own
end of the score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, D_MODEL
from place import placed
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

import tl_capacity as tlc
from tl_capacity.dictionaries.bases import NeuronBasis, PCABasis
from tl_capacity.errors import MeasurementError
from tl_capacity.probing.ranking import Firings, Ranking
from tl_capacity.probing.recover import recover_features
from tl_capacity.probing.ridge import Latents, Moments, Readout, solve
from tl_capacity.probing.scores import Scores
from tl_capacity.text.counting import CountingRule

HOOK = "blocks.1.hook_resid_post"
TOKENS, WIDTH, FEATURES, GROUPS = 2000, 12, 16, 64


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [token, width], latents [token, feature] of either sign, the first only above zero and the second
    only below it, and the document group of each token.
    """
    generator = torch.Generator().manual_seed(0)
    firing = torch.rand(TOKENS, FEATURES, generator=generator) < torch.linspace(0.02, 0.5, FEATURES)
    z = torch.where(firing, torch.randn(TOKENS, FEATURES, generator=generator), 0.0).double()
    z[:, 0], z[:, 1] = z[:, 0].abs(), -z[:, 1].abs()
    noise = 0.3 * torch.randn(TOKENS, WIDTH, generator=generator)
    x = (z @ torch.randn(FEATURES, WIDTH, generator=generator).double() + noise + 100).float()
    return x, z, torch.arange(TOKENS) // 20 % GROUPS


def latents_of(z: torch.Tensor) -> Latents:
    tokens, features = torch.nonzero(z, as_tuple=True)
    return Latents.from_entries((tokens, features, z[tokens, features]), torch.arange(z.shape[1]), z.shape[1], len(z))


def readout_of(x: torch.Tensor, z: torch.Tensor) -> Readout:
    moments = Moments.zeros(x.shape[1], z.shape[1])
    moments.update(x, latents_of(z))
    return solve(moments, 1e-4)


def judged(readout: Readout, x: torch.Tensor, z: torch.Tensor, groups: torch.Tensor, signed: bool) -> Scores:
    """Scores of a readout, streamed and interrupted once."""
    ranking, held = Ranking(readout, signed=signed), Firings(z.shape[1], x.device)
    for start in range(0, len(x), 90):
        some = slice(start, start + 90)
        held.update(latents_of(z[some]), groups[some])
        ranking.update(x[some], latents_of(z[some]), groups[some])
        if start == 450:
            tensors, ranking = ranking.to_tensors(), Ranking(readout, signed=signed)
            ranking.go_on_from(tensors)
            tensors, held = held.to_tensors(), Firings(z.shape[1], x.device)
            held.go_on_from(tensors)
    return ranking.scores(held)


def test_both_sides_are_scikit_learns_within_the_stated_error(data: Any) -> None:
    x, z, groups = data
    readout = readout_of(x, z)
    predicted = ((x.double() - readout.x_mean) @ readout.weight.T + readout.z_mean).numpy(force=True)
    scores = judged(readout, x, z, groups, signed=True)
    for feature in range(FEATURES):
        own, score = z[:, feature].numpy(force=True), predicted[:, feature]
        sides = [(own > 0, score, own >= 0), (own < 0, -score, own <= 0)]
        fires = np.array([side[0].sum() for side in sides])
        for figure, reference in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
            of_sides = [reference(side[among], s[among]) if side.any() else 0 for side, s, among in sides]
            exact, error = np.dot(fires, of_sides) / fires.sum(), getattr(scores, f"{figure}_error")[feature]
            assert abs(getattr(scores, figure)[feature] - exact) <= error + 1e-6
        assert scores.r2[feature] == pytest.approx(r2_score(own, score), abs=1e-5)
        assert scores.firings[:, feature].sum() == fires.sum()
    assert scores.auroc.min() > 0.6
    ranks = scores.ranks.sum(0) / scores.firings.sum(0)  # among the silent tokens scored so far, so only about AUROC
    np.testing.assert_allclose(ranks, scores.auroc, atol=0.02)


def test_a_dictionary_turned_round_is_told_as_well(data: Any) -> None:
    """The scores of latents above zero are those of the same latents below it."""
    x, z, groups = data
    z = z.abs()
    plain = judged(readout_of(x, z), x, z, groups, signed=False)
    turned = judged(readout_of(x, -z), x, -z, groups, signed=True)
    for figure in ("auroc", "average_precision", "auroc_error", "firings"):
        np.testing.assert_allclose(getattr(plain, figure), getattr(turned, figure), rtol=1e-2, atol=1e-3)


def test_a_checkpoint_without_the_sides_is_refused(data: Any) -> None:
    x, z, _ = data
    readout = readout_of(x, z)
    with pytest.raises(MeasurementError, match=r"^the checkpoint lacks negative, .*: delete it, and start again$"):
        Ranking(readout, signed=True).go_on_from(Ranking(readout).to_tensors())


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    ids = torch.randint(1, 100, (160, 20), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    return ids


@pytest.mark.parametrize(
    ("kind", "dictionary"),
    [
        ("HookedTransformer", "pca"),
        ("TransformerBridge", "neurons"),
        ("gpt_neox", "pca"),
        ("gpt_neox", "abstopk"),
    ],
)
def test_the_teacher_itself_tells_its_signed_features(
    kind: str, dictionary: str, models_by_kind: dict[str, Any], make_sae: Callable[..., Any], rows: torch.Tensor
) -> None:
    model = models_by_kind[kind]
    seen: list[torch.Tensor] = []
    if dictionary == "pca":
        _read(model, rows, seen)
        x = torch.cat(seen)
        basis: Any = PCABasis(x.double().mean(0), torch.cov(x.double().T), HOOK, k=6)
    else:
        basis = NeuronBasis(D_MODEL, HOOK, k=6) if dictionary == "neurons" else make_sae("abstopk", HOOK)
    with tlc.add_capacity_hooks(model, {HOOK: basis}, mask_token_ids=[BOS]) as capacity:
        measured = capacity.run(rows, progress=False).measurement()[HOOK]
    found = recover_features(
        model,
        basis,
        {"itself": model},
        list(rows.split(20)),
        measured=measured,
        rule=CountingRule.without([BOS]),
        progress=False,
    )
    kept, judged = int(found.kept(found.teacher).sum()), int(found.judged.sum())
    assert judged > 10
    assert kept >= 0.75 * judged
    if dictionary == "neurons":  # each is a coordinate of what is read
        assert kept == judged
        assert found.teacher.r2[found.judged].min() > 0


@torch.no_grad()
def _read(model: Any, rows: torch.Tensor, seen: list[torch.Tensor]) -> None:
    """The activations of all but BOS."""
    rows = placed(rows)
    if hasattr(model, "run_with_cache"):
        seen.append(model.run_with_cache(rows)[1][HOOK][:, 1:].flatten(0, 1))
    else:
        seen.append(model(rows, output_hidden_states=True).hidden_states[2][:, 1:].flatten(0, 1))
