"""The one file in which a long job keeps its state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tl_capacity.errors import CapacityError, DeviceFullError, NotWrittenError, SourceCutOffError
from tl_capacity.storage import checkpoints
from tl_capacity.storage.checkpoints import Checkpoint, checkpoint_in, gone_if_refused, remove_checkpoint
from tl_capacity.storage.digests import tensors_digest

SETTINGS = {"models": ["a", "b"], "seed": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.checkpoint.safetensors"


def test_goes_on_from_what_was_saved(path: Path) -> None:
    tensors = {
        "one w8/all": torch.arange(6, dtype=torch.int32).view(2, 3).T,
        "one/all": torch.tensor([True, False]),
        "two/all": torch.zeros(0),
    }
    Checkpoint(path, SETTINGS).save(tensors, {"done": 3, "exact": 0.1 + 0.2})
    found = Checkpoint(path, {"models": ("a", "b"), "seed": 1})
    assert found.about == {"done": 3, "exact": 0.1 + 0.2}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert found.part("one").keys() == {"all"}
    assert torch.equal(found.part("one")["all"], tensors["one/all"])
    assert found.part("none") == {}
    remove_checkpoint(path)
    assert not list(path.parent.iterdir())


def test_keeps_nothing_without_a_path() -> None:
    nothing = Checkpoint(None, SETTINGS)
    nothing.save({"a": torch.zeros(1)}, {})
    assert not nothing.due
    assert (nothing.tensors, nothing.about) == ({}, {})


def test_other_settings_are_named(path: Path) -> None:
    Checkpoint(path, SETTINGS).save({}, {})
    with pytest.raises(CapacityError, match=r"belongs to other settings \(seed = 1\): use those"):
        Checkpoint(path, {**SETTINGS, "seed": 2})


def test_saving_takes_a_tenth_of_the_time_at_most(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    checkpoint = Checkpoint(path, SETTINGS)
    assert not checkpoint.due
    now += checkpoints.SECONDS
    assert checkpoint.due

    def slow(*_: object, **__: object) -> None:
        nonlocal now
        now += 50

    monkeypatch.setattr(checkpoints, "write_bytes", slow)
    checkpoint.save({}, {})
    now += 499
    assert not checkpoint.due
    now += 1
    assert checkpoint.due


def test_the_hash_is_of_the_content() -> None:
    """Not of the order in which tensors are written."""
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(5)}
    assert tensors_digest(tensors, "x") == tensors_digest(dict(reversed(tensors.items())), "x")
    assert tensors_digest(tensors, "x") != tensors_digest(tensors, "y")
    assert tensors_digest(tensors, "x") != tensors_digest({**tensors, "a": torch.arange(3.0).view(1, 3)}, "x")
    assert len({tensors_digest({"a": torch.from_numpy(np.eye(3)[i])}, "x") for i in range(3)}) == 3


def test_one_that_lies_beside_the_folder_is_moved_into_it(tmp_path: Path) -> None:
    """As 0.1 left it, with the one before."""
    beside = tmp_path / "out.fit.checkpoint.safetensors"
    for number in (1.0, 2.0):
        Checkpoint(beside, SETTINGS).save({"a": torch.tensor([number])}, {})
    path = checkpoint_in(tmp_path / "out", "fit", beside)
    assert path == tmp_path / "out" / "fit.checkpoint.safetensors"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert Checkpoint(path, SETTINGS).tensors["a"] == 2
    path.write_bytes(b"damaged")
    assert Checkpoint(path, SETTINGS).tensors["a"] == 1
    assert checkpoint_in(tmp_path / "out", "fit", beside) == path


@pytest.mark.parametrize(
    ("problem", "stays"),
    [
        (CapacityError, False),
        (NotWrittenError, True),
        (SourceCutOffError, True),
        (DeviceFullError, True),
        (KeyboardInterrupt, True),
    ],
)
def test_what_the_same_command_can_go_on_from_stays(path: Path, problem: type[BaseException], stays: bool) -> None:
    Checkpoint(path, SETTINGS).save({"a": torch.zeros(1)}, {})
    with pytest.raises(problem), gone_if_refused([path]):
        raise problem("no")
    assert path.exists() == stays


def test_a_removal_that_a_kill_cut_short_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, unlink, left = tmp_path / "a.checkpoint.safetensors", Path.unlink, 1

    def killed(self: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        unlink(self, missing_ok)

    checkpoint = Checkpoint(path, {})
    checkpoint.save({"a": torch.ones(2)}, {})
    checkpoint.save({"a": torch.ones(2)}, {})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(path)
    [found] = tmp_path.glob("*.checkpoint.safetensors")
    remove_checkpoint(found)
    assert not list(tmp_path.iterdir())
