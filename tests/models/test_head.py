"""What a head's logits become: probabilities and their logarithms, and how many tokens' logits exist at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from place import placed

from tl_capacity.models.head import CHUNK_LOGITS, DEVICE_LOGITS, LOGIT_TOKENS, log_and_probabilities, tokens_at_once


@given(st.integers(1, 5), st.integers(1, 3000), st.floats(0, 300), st.floats(-1e4, 1e4), st.integers(0, 1000))
def test_probabilities_and_their_logarithms(
    tokens: int, vocabulary: int, scale: float, offset: float, seed: int
) -> None:
    """Both are those of float64, for any sharpness and offset, also of words that all but never come."""
    random = torch.Generator().manual_seed(seed)
    logits = placed((torch.randn(tokens, vocabulary, generator=random) * scale + offset).float())
    expected = logits.double().log_softmax(-1)
    rounding = 1e-6 * float(logits.abs().max() + 1)
    log_p, p = log_and_probabilities(logits, torch.empty_like(logits))
    assert log_p.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-6, atol=rounding)
    torch.testing.assert_close(p.double(), expected.exp(), rtol=0, atol=1e-6)


def test_words_that_cannot_come() -> None:
    logits = placed(torch.tensor([[0.0, -torch.inf, 0.0], [torch.nan, 0.0, 0.0]]))
    log_p, p = log_and_probabilities(logits, torch.empty_like(logits))
    assert p[0].tolist() == [0.5, 0.0, 0.5]
    assert log_p[0].tolist() == pytest.approx([-0.6931472, -torch.inf, -0.6931472])
    assert p[1].isnan().all()
    assert log_p[1].isnan().all()


@pytest.mark.parametrize(
    ("device", "tokens", "vocabulary", "expected"),
    [
        ("cpu", 1000, 50, 125),
        ("cpu", 4 * LOGIT_TOKENS, 50, LOGIT_TOKENS),
        ("cpu", 1000, CHUNK_LOGITS // 100, 100),
        ("cpu", 3, 50, 3),
        ("cuda", 1000, DEVICE_LOGITS // 4000, 1000),
        ("cuda", 8184, DEVICE_LOGITS // 4000, 2728),
    ],
)
def test_tokens_at_once(device: str, tokens: int, vocabulary: int, expected: int) -> None:
    assert tokens_at_once(tokens, vocabulary, torch.device(device)) == expected


@given(st.sampled_from(["cpu", "cuda"]), st.integers(0, 10**5), st.integers(1, 2**28))
def test_chunks_are_of_one_length_and_within_bounds(device: str, tokens: int, vocabulary: int) -> None:
    chunk = tokens_at_once(tokens, vocabulary, torch.device(device))
    assert chunk == 1 or chunk * vocabulary <= (CHUNK_LOGITS if device == "cpu" else DEVICE_LOGITS)
    assert device != "cpu" or chunk <= LOGIT_TOKENS
    chunks = -(-tokens // chunk)
    assert chunk * chunks - tokens < max(chunks, 1)
