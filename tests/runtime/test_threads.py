"""Work side by side on several cores, and the figures of everything that is done so: those of one core."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from commands import HOOK
from conftest import D_MODEL

from tl_capacity import add_capacity_hooks
from tl_capacity.dictionaries import encoding
from tl_capacity.dictionaries.encoding import ACTIVATIONS, Encoder
from tl_capacity.errors import CapacityError
from tl_capacity.probing import ranking
from tl_capacity.probing.ranking import Firings, Ranking
from tl_capacity.probing.ridge import Latents, Readout
from tl_capacity.runtime.threads import cores_for, side_by_side

CORES = 3
TOKENS, FEATURES = 40, 30
pytestmark = pytest.mark.cpu_only("on a device there is one thread")


@pytest.fixture
def cores() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield CORES
    torch.set_num_threads(before)


def on_one_core_and_on_several(figures: Callable[[], Any]) -> tuple[Any, Any]:
    """What a function gives with one thread of PyTorch and with several."""
    before, both = torch.get_num_threads(), []
    for threads in (1, CORES):
        torch.set_num_threads(threads)
        try:
            both.append(figures())
        finally:
            torch.set_num_threads(before)
    return both[0], both[1]


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_each_item_once_and_in_order(cores: int) -> None:
    """In threads of their own, numbered from 0, to which PyTorch gives one core each and which record no gradient."""
    together = threading.Barrier(cores)

    def work(number: int, item: int) -> tuple[int, int, int, bool]:
        if item < cores:
            together.wait(timeout=60)
        return item**2, number, cores_for(torch.device("cpu")), torch.is_grad_enabled()

    done = side_by_side(work, range(20), cores_for(torch.device("cpu")))
    assert [square for square, *_ in done] == [item**2 for item in range(20)]
    assert {number for _, number, _, _ in done} == set(range(cores))
    assert {(threads, recorded) for *_, threads, recorded in done} == {(1, False)}


def test_the_callers_threads_stay_as_they_were(cores: int) -> None:
    """PyTorch keeps its number of threads here, and gives it to threads that are started afterwards."""
    side_by_side(lambda _, item: item, range(5), cores)
    seen = [torch.get_num_threads()]
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [CORES, CORES]


def test_an_error_ends_the_work(cores: int) -> None:
    begun = []

    def work(_: int, item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("no such item")
        return item

    with pytest.raises(ValueError, match="no such item"):
        side_by_side(work, range(100_000), cores)
    assert len(begun) < 100_000
    assert side_by_side(lambda _, item: item, range(5), cores) == [0, 1, 2, 3, 4]


def test_nothing_to_do_and_a_device_that_is_none() -> None:
    assert side_by_side(lambda _, item: item, [], 2) == []
    assert cores_for(torch.device("meta")) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    program = """
import os
from tl_capacity.runtime.threads import side_by_side
assert side_by_side(lambda _, item: item, range(5), 2) == [0, 1, 2, 3, 4]
child = os.fork()
if child == 0:
    os._exit(0 if side_by_side(lambda _, item: item, range(5), 2) == [0, 1, 2, 3, 4] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each core encodes five features at once."""
    few = {
        name: replace(activation, features_at_once=5) for name, activation in ACTIVATIONS.items() if activation.apart
    }
    monkeypatch.setattr(encoding, "ACTIVATIONS", ACTIVATIONS | few)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_encoding(make_sae: Callable[..., Any], architecture: str) -> None:
    """The last block of features is smaller; one latent writes nothing."""
    sae, x = make_sae(architecture, d_sae=61), drawn(100, D_MODEL)
    with torch.no_grad():
        sae.W_dec[3] = 0
    one, several = on_one_core_and_on_several(lambda: Encoder(sae)(x))
    assert len(one[0]) > 100
    assert 3 not in one[1]
    assert all(torch.equal(mine, own) for mine, own in zip(one[:2], several[:2], strict=True))
    torch.testing.assert_close(one[2], several[2])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("importance", ["gradient", "second_moment"])
def test_measuring(neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor, importance: str) -> None:
    sae = make_sae("standard", HOOK)

    def summary() -> Any:
        with add_capacity_hooks(neox, sae, mask_token_ids=(), importance=[importance]) as capacity:
            return capacity.run(tokens, progress=False).measurement()[HOOK].summary

    one, several = on_one_core_and_on_several(summary)
    assert one.arrays.keys() == several.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, several.arrays[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("small_blocks")
def test_a_latent_that_is_not_finite_is_refused(
    cores: int, neox: Any, make_sae: Callable[..., Any], tokens: torch.Tensor
) -> None:
    sae = make_sae("standard", HOOK)
    with add_capacity_hooks(neox, sae, mask_token_ids=()) as capacity:
        capacity.run(tokens[:4], progress=False)
        with torch.no_grad():
            sae.b_enc[20] = float("nan")
        with pytest.raises(CapacityError, match="latents"):
            capacity.run(tokens, progress=False)


@pytest.mark.parametrize("signed", [False, True])
def test_ranking(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 4 * TOKENS)
    monkeypatch.setattr(ranking, "FEATURES_AT_ONCE", 7)
    z = drawn(TOKENS, FEATURES, seed=1).double().relu()
    if signed:
        z[:, ::2] *= -1
    tokens, features = z.nonzero(as_tuple=True)
    latents = Latents.from_entries((tokens, features, z[tokens, features]), torch.arange(FEATURES), FEATURES, TOKENS)
    weight = drawn(FEATURES, D_MODEL).double()
    ones = torch.ones(FEATURES, dtype=torch.float64)
    readout = Readout(weight, torch.zeros(D_MODEL, dtype=torch.float64), 0.5 * ones, ones, 1e-3, None)

    def scores() -> Any:
        ranked, held = Ranking(readout, signed=signed), Firings(FEATURES)
        groups = torch.arange(TOKENS) % 4
        held.update(latents, groups)
        ranked.update(drawn(TOKENS, D_MODEL, seed=2), latents, groups)
        return ranked.scores(held)

    one, several = on_one_core_and_on_several(scores)
    for name, array in vars(one).items():
        expected = torch.as_tensor(getattr(several, name))
        torch.testing.assert_close(torch.as_tensor(array), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert 0.2 < one.auroc.mean() < 0.8
