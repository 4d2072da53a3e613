"""Digests: what is hashed, in which order, and that values of earlier versions stay."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tl_capacity.storage.digests import digest, fingerprint, place_of, tensors_digest
from tl_capacity.storage.same_run import changed_fields


def test_a_digest_is_the_sha256_of_names_shapes_types_and_values() -> None:
    a, b = torch.arange(6.0).view(2, 3).T, torch.ones(2, dtype=torch.bfloat16)
    content = b"x\ny" + b"a(3, 2)torch.float32" + a.contiguous().numpy().tobytes()
    content += b"b(2,)torch.bfloat16" + b.view(torch.int16).numpy().tobytes()
    assert tensors_digest({"b": b, "a": a}, "x", "y") == digest(content) == hashlib.sha256(content).hexdigest()
    assert tensors_digest({"b": b, "a": a.contiguous()}, "x", "y") == digest(content)
    assert tensors_digest({"b": b, "a": a.T}, "x", "y") != digest(content)


def test_a_fingerprint_is_that_of_parameters_in_their_order() -> None:
    model = torch.nn.Linear(2, 3)
    content = b"".join(name.encode() + p.detach().numpy().tobytes() for name, p in model.named_parameters())
    assert fingerprint(model) == digest(content)


def test_names_are_spread_evenly() -> None:
    places = [place_of(f"document {i}") for i in range(1000)]
    assert 0 <= min(places) < 0.01
    assert 0.99 < max(places) < 1
    assert sum(places) / 1000 == pytest.approx(0.5, abs=0.03)
    assert place_of("a") == int.from_bytes(hashlib.sha256(b"a").digest()[:8], "big") / 2**64


def test_changed_fields_are_named_in_order() -> None:
    before, now = {"a": 1, "b": 2, "more": 0}, {"c": 3, "b": 2, "a": 2}
    assert changed_fields(before, now) == ["c", "a"]
    assert changed_fields(now, now) == []
