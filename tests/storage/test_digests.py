"""Digests: what is hashed, in which order, and that values of earlier versions stay."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tl_capacity import CapacityError
from tl_capacity.recipe import already_there
from tl_capacity.storage.digests import digest, fingerprint, place_of, tensors_digest
from tl_capacity.storage.same_run import changed_fields, earlier_values


def test_a_digest_is_the_sha256_of_names_shapes_types_and_values() -> None:
    a, b = torch.arange(6.0).view(2, 3).T, torch.ones(2, dtype=torch.bfloat16)
    content = b"x\ny" + b"a(3, 2)torch.float32" + a.contiguous().numpy(force=True).tobytes()
    content += b"b(2,)torch.bfloat16" + b.view(torch.int16).numpy(force=True).tobytes()
    assert tensors_digest({"b": b, "a": a}, "x", "y") == digest(content) == hashlib.sha256(content).hexdigest()
    assert tensors_digest({"b": b, "a": a.contiguous()}, "x", "y") == digest(content)
    assert tensors_digest({"b": b, "a": a.T}, "x", "y") != digest(content)


def test_a_fingerprint_is_that_of_parameters_in_their_order() -> None:
    model = torch.nn.Linear(2, 3)
    content = b"".join(name.encode() + p.detach().numpy(force=True).tobytes() for name, p in model.named_parameters())
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
    assert earlier_values(before, now) == "c = None, a = 1"
    assert earlier_values(before, now, all_of_them=True) == "a = 1, more = 0, c = None"


def test_a_field_that_is_missing_is_none() -> None:
    before, now = {"a": 1}, {"a": 1, "new": None}
    assert changed_fields(before, now) == changed_fields(now, before) == []
    assert earlier_values(before, now) == earlier_values(now, before, all_of_them=True) == ""
    assert earlier_values({**now, "new": 2}, before) == ""
    assert earlier_values({**now, "new": 2}, before, all_of_them=True) == "new = 2"


def test_a_recipes_result_of_before_an_option_is_of_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, about = tmp_path / "result.json", tmp_path / "about.json"
    assert not already_there(result, about, {"k": 1})
    result.touch()
    for written, says in (
        ('{"settings": {"k": 2, "widths": [1, 2]}}', r"of other settings \(k = 2\)"),
        ('{"settings": {}}', r"of other settings \(k = None, widths = None\)"),
        ('{"settings": [1]}', r"of other settings \(which are unknown\)"),
        ("[]", r"of other settings \(which are unknown\)"),
    ):
        about.write_text(written)
        with pytest.raises(CapacityError, match=says):
            already_there(result, about, {"k": 1, "widths": (1, 2), "new": None})
    about.write_text('{"settings": {"k": 1, "widths": [1, 2], "gone": 3}}')
    assert already_there(result, about, {"k": 1, "widths": (1, 2), "new": None})
    assert "which stays: choose another --out to make it anew" in capsys.readouterr().out
