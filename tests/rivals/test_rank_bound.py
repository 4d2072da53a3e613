"""The least KL of low-rank logits against a dense search with SciPy, teachers of known rank, and real students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from tiny_families import teacher
from torch.nn import functional as F

from tl_capacity.distillation import DistillSettings, distill
from tl_capacity.errors import CapacityError
from tl_capacity.models.head import Head
from tl_capacity.rivals import rank_bound
from tl_capacity.rivals.bound import BoundSettings, lowest_so_far
from tl_capacity.rivals.low_rank import LowRank, divergence_sums, fitted, leading_directions
from tl_capacity.rivals.text import TeacherText

TEXT = np.random.default_rng(1).integers(2, 50, size=(30, 12))


def spoken(logits: NDArray[np.float64], cap: float | None = None) -> TeacherText:
    """A text whose teacher has these logits [token, vocabulary] before its cap."""
    hidden = torch.from_numpy(logits).float()
    groups = np.arange(len(logits)) % 16
    return TeacherText((), hidden, Head(torch.eye(logits.shape[1]), None, cap), groups)


def divergence(text: TeacherText, low_rank: LowRank) -> float:
    """Of the definition, in float64 and all at once."""
    head = text.head
    theirs = text.hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    ours = low_rank.states.double() @ low_rank.weight.double().T + low_rank.bias.double()
    p, q = (
        (head.cap * torch.tanh(logits / head.cap) if head.cap else logits).log_softmax(-1) for logits in (theirs, ours)
    )
    return float(F.kl_div(q, p, log_target=True, reduction="sum") / len(text))


def searched(logits: NDArray[np.float64], rank: int, seed: int) -> float:
    """The least that SciPy finds from a random start, in float64."""
    n, vocabulary = logits.shape
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    sizes = np.cumsum([vocabulary * rank, vocabulary])

    def objective(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, bias, states = np.split(x, sizes)
        weight, states = weight.reshape(vocabulary, rank), states.reshape(n, rank)
        ours = states @ weight.T + bias
        log_q = ours - logsumexp(ours, axis=1, keepdims=True)
        slope = (np.exp(log_q) - p) / n
        gradient = (slope.T @ states).ravel(), slope.sum(0), (slope @ weight).ravel()
        return float((p * (log_p - log_q)).sum() / n), np.concatenate(gradient)

    begin = np.random.default_rng(seed).normal(size=sizes[-1] + n * rank)
    return float(minimize(objective, begin, jac=True, method="L-BFGS-B", options={"maxiter": 3000}).fun)


THOROUGH = BoundSettings(1000, 1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_as_low_as_a_dense_search_from_several_starts(rank: int) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 10)) * 2
    text = spoken(logits)
    fit = fitted(text, leading_directions(text), rank, THOROUGH)
    assert fit.gain < THOROUGH.tolerance
    assert fit.low_rank.rank == rank
    least = min(searched(logits, rank, seed) for seed in range(3))
    assert divergence(text, fit.low_rank) == pytest.approx(least, rel=0.03)


def test_two_tokens_of_vocabulary_by_a_closed_form() -> None:
    """With rank 0 all tokens have one distribution: the best is the mean one, and its KL the Jensen-Shannon divergence
    of theirs. With rank 1 any two-token distribution is fitted exactly.
    """
    logits = np.random.default_rng(3).normal(size=(40, 2))
    text = spoken(logits)
    p = np.exp(log_softmax(logits, axis=1))
    expected = float((p * np.log(p / p.mean(0))).sum(1).mean())
    nothing = LowRank(torch.zeros(2, 1), torch.from_numpy(np.log(p.mean(0))).float(), torch.zeros(40, 1))
    assert divergence_sums(text, nothing).sum() / 40 == pytest.approx(expected, rel=1e-5)
    whole = fitted(text, leading_directions(text), 1, THOROUGH)
    assert divergence(text, whole.low_rank) == pytest.approx(0, abs=1e-6)


@given(rank=st.integers(1, 6), cap=st.sampled_from([None, 3.0]), seed=st.integers(0, 1000))
@example_settings(max_examples=6)
def test_a_teacher_of_that_rank_is_matched_and_a_narrower_bound_is_higher(
    rank: int, cap: float | None, seed: int
) -> None:
    random = np.random.default_rng(seed)
    text = spoken(random.normal(size=(60, rank)) @ random.normal(size=(rank, 14)) + random.normal(size=14), cap)
    directions = leading_directions(text)
    assert directions.whole.rank <= rank
    assert divergence(text, directions.whole) == pytest.approx(0, abs=1e-6)
    ranks = sorted({1, rank, rank + 1})
    bounds = [divergence(text, fitted(text, directions, d, BoundSettings(10)).low_rank) for d in ranks]
    starts = [divergence(text, directions.leading(d)) for d in ranks]
    assert all(bound <= start + 1e-6 for bound, start in zip(bounds, starts, strict=True))
    assert bounds[ranks.index(rank)] == pytest.approx(0, abs=1e-6)


def test_a_wider_bound_is_never_higher() -> None:
    """Logits of a lower rank are logits of a higher one too, whatever the search for the higher one found."""
    sums = {8: np.array([3.0, 1.0]), 2: np.array([4.0, 5.0]), 4: np.array([1.0, 1.0])}
    assert {width: found.tolist() for width, found in lowest_so_far(sums).items()} == {
        2: [4.0, 5.0],
        4: [1.0, 1.0],
        8: [1.0, 1.0],
    }


@pytest.mark.parametrize(("family", "rank"), [("gpt-neox", 31), ("llama", 32), ("gemma2", 32), ("gpt2", 31)])
def test_as_wide_as_the_teachers_head_it_is_nothing(family: str, rank: int) -> None:
    """A LayerNorm takes one of the last hidden state's dimensions away."""
    forecasts = rank_bound(teacher(family), TEXT, [rank - 1, rank, 32, 40], BoundSettings(20), progress=False)
    floors = forecasts.floors("rank_bound")
    assert forecasts.about["rank_of_the_teacher"] == rank
    for width in (rank, 32, 40):
        assert 0 <= floors[width].value < 1e-6
    assert floors[rank - 1].value > floors[rank].value


@pytest.mark.slow
def test_no_student_is_below_it() -> None:
    """Students distilled on the very text that they are judged on, of an architecture that caps its logits."""
    of = teacher("gemma2")
    with torch.no_grad():
        of.get_output_embeddings().weight.mul_(8)
    settings = DistillSettings(tokens=4_000, repeat=True, evaluations=2, heldout_tokens=330, lr=1e-2)
    run = distill(of, [4, 8], TEXT, heldout=TEXT, settings=settings, progress=False)
    floors = rank_bound(of, TEXT, [4, 8], progress=False).floors("rank_bound")
    for student in run.students:
        assert 0 < floors[student.width].value < min(student.heldout_kl) < student.heldout_kl[0]


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
def test_of_any_form_of_model(models_by_kind: dict[str, Any], tokens: torch.Tensor, kind: str) -> None:
    model = models_by_kind[kind]
    [record] = rank_bound(model, tokens, [6], progress=False)
    with torch.no_grad():
        output = model(tokens)
    logits = getattr(output, "logits", output)[:, :-1].flatten(0, 1).double().numpy(force=True)
    text = spoken(logits)
    expected = divergence(text, fitted(text, leading_directions(text), 6, BoundSettings()).low_rank)
    assert record.floor.value == pytest.approx(expected, rel=0.02)
    assert record.floor.low < record.floor.value < record.floor.high


def test_more_text_gives_a_higher_bound(neox: Any) -> None:
    ids = torch.from_numpy(np.random.default_rng(2).integers(1, 100, size=(64, 12)))
    few, many = (rank_bound(neox, ids[:n], [8], progress=False) for n in (4, 64))
    assert few.floors("rank_bound")[8].value < many.floors("rank_bound")[8].value
    assert any("44 tokens are few for width 8" in note for note in few.notes)
    assert not any("are few" in note for note in many.notes)


def test_a_search_that_was_cut_short_is_said(neox: Any, tokens: torch.Tensor) -> None:
    forecasts = rank_bound(neox, tokens, [3, 6], BoundSettings(2), progress=False)
    assert "is not certified" in forecasts.notes[0]
    assert "still falling at widths 3, 6 after 2 iterations" in forecasts.notes[1]


def test_it_goes_on_from_its_checkpoint(neox: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    file, quick = tmp_path / "bound", BoundSettings(10)
    rank_bound(neox, tokens, [3], quick, checkpoint=file, progress=False)
    whole = rank_bound(neox, tokens, [3, 6], quick, progress=False)
    before = file.read_bytes()
    again = rank_bound(neox, tokens, [6, 3], quick, checkpoint=file, progress=False)
    assert {r.width: r.floor for r in again} == {r.width: r.floor for r in whole}
    assert file.read_bytes() != before
    finished = file.read_bytes()
    assert rank_bound(neox, tokens, [3], quick, checkpoint=file, progress=False).records == whole.records[:1]
    assert file.read_bytes() == finished, "nothing was searched again"
    with pytest.raises(CapacityError, match="belongs to other settings"):
        rank_bound(neox, tokens[:3], [3], quick, checkpoint=file)
    with pytest.raises(CapacityError, match="belongs to other settings"):
        rank_bound(neox, tokens, [3], BoundSettings(11), checkpoint=file)


def test_refusals(neox: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(CapacityError, match="width 0 is not a student width"):
        rank_bound(neox, tokens, [0])
    with pytest.raises(CapacityError, match="no width to bound"):
        rank_bound(neox, tokens, [])
    with pytest.raises(CapacityError, match="the text has no token to predict"):
        rank_bound(neox, tokens[:, :1], [3])
    with pytest.raises(CapacityError, match="iterations = 0 search for nothing"):
        BoundSettings(0)
    with pytest.raises(CapacityError, match="tolerance = 1 is not a share"):
        BoundSettings(10, 1.0)
    with pytest.raises(CapacityError, match="more than the teacher's 32"):
        rank_bound(neox, torch.ones(1, 40, dtype=torch.int64), [3])
