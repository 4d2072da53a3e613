"""Wide SAEs stay within a stated memory, whatever is asked of it, and give the same figures however few latents are
dense at once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sae_lens
import torch
from commands import HOOK, arguments
from conftest import D_MODEL
from place import on_cpu, placed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tl_capacity import Measurement, add_capacity_hooks
from tl_capacity.dictionaries.decoding import Decoder
from tl_capacity.errors import CapacityError
from tl_capacity.measure.memory import COPIES_OF_SUMS, RESERVE, fit_memory, sums_of
from tl_capacity.runtime.units import bytes_in


def wide_sae(folder: Path, latents: int) -> Path:
    """A random SAE of which few latents are active."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=latents, metadata=SAEMetadata(hook_name=HOOK)))
    with torch.no_grad():
        directions = torch.randn(32, latents)
        sae.W_enc.copy_(directions / directions.norm(dim=0))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_enc.fill_(-0.12)
    sae.save_model(folder / "sae")
    return folder / "sae"


@pytest.mark.slow
@pytest.mark.parametrize("latents", [32_768, 262_144])
def test_a_wide_sae_within_its_bound(
    latents: int, setup: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Asked for too little it says how much it needs; with that it stays below it, checkpoints included."""
    sae = wide_sae(tmp_path, latents)

    def run(out: str, memory: str) -> subprocess.CompletedProcess[str]:
        more = ("--max-fvu", "inf", "--max-memory", memory, "--checkpoint-seconds", 0)
        command = arguments(setup, tmp_path / out, *more, tokens=500, sae=str(sae))
        return subprocess.run(
            [sys.executable, "-m", "tl_capacity", "--log", "json", *map(str, command)], capture_output=True, text=True
        )

    refused = run("refused", "100MB")
    assert refused.returncode == 2
    needed = re.search(r"these SAEs need ([\d.]+) GB", json.loads(refused.stderr.splitlines()[-1])["message"])
    assert needed is not None
    sums = 64 * latents * 3 * 8
    assert 4.5 * sums < float(needed[1]) * 1e9 < 4.5 * sums + 2.5e9
    limit = float(needed[1]) + 0.05  # what a process holds differs a little each time
    kept = run("kept", f"{limit:.2f}GB")
    assert kept.returncode == 0, kept.stderr
    free = run("free", "100GB")
    assert free.returncode == 0, free.stderr
    peak, unlimited = (json.loads(done.stderr.splitlines()[-1])["peak_memory_bytes"] for done in (kept, free))
    assert peak <= limit * 1e9
    for what, amount in (
        ("sums", sums),
        ("limit", limit * 1e9),
        ("peak below it", peak),
        ("peak without a limit", unlimited),
    ):
        record_property(f"{latents:,} latents: {what}, GB", f"{amount / 1e9:.2f}")
    one, other = (Measurement.load(tmp_path / out)[HOOK].summary for out in ("kept", "free"))
    # Products over fewer tokens are rounded otherwise, so that a latent on the edge may fall to the other side.
    assert np.abs(one.arrays["counts"] - other.arrays["counts"]).sum() <= 1e-4 * other.arrays["counts"].sum()
    assert 0 < one.l0.value < latents / 20


class TensorBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block took at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        for storage in self._storages(made):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self._now)
        return made

    def _gone(self, storage: int) -> None:
        self._now -= self._alive.pop(storage)

    @staticmethod
    def _storages(tree: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class StandardSAE(sae_lens.StandardSAE):
    """Has the name of an architecture with a short cut, and another `encode`."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x) * 2


def sae_encoding_itself(make_sae: Callable[..., Any], kind: str) -> Any:
    sae = make_sae("standard" if kind in ("another encode", "hooks") else kind, HOOK, d_sae=2048)
    with torch.no_grad():
        (sae.b_gate if kind == "gated" else sae.b_enc).sub_(2.0)  # few latents are active, as in a trained SAE
    if kind == "another encode":
        sae.__class__ = StandardSAE
    if kind == "hooks":
        sae.hook_sae_acts_post.register_forward_hook(lambda _module, _inputs, latents: latents)
    return sae


@pytest.mark.parametrize("kind", ["gated", "layer_norm", "another encode", "hooks"])
def test_an_sae_that_encodes_itself_within_its_bound(kind: str, neox: Any, make_sae: Callable[..., Any]) -> None:
    """Its own `encode` makes all latents of its tokens at once, and so does a `decode` that does not add up. A bound
    makes these tokens fewer, and changes no latent and nothing that is written.
    """
    sae, bound = sae_encoding_itself(make_sae, kind), 3_000_000
    x = placed(torch.randn(256, D_MODEL, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad(), add_capacity_hooks(neox, sae) as capacity:
        held = psutil.Process().memory_info().rss + int(COPIES_OF_SUMS * sums_of(capacity)) + RESERVE
        fit_memory(capacity, held + bound)
        encoder = capacity.taps[0].encoder
        with TensorBytes() as made:
            encoder.each_part(x, lambda entries: None)
            Decoder(sae).directly(x, encoder.own_tokens)
        with TensorBytes() as made_at_once:
            own = sae.encode(x)
            written = sae.decode(own)
        assert 0 < own.count_nonzero() < own.numel() / 20
        # A GPU keeps more of a layer norm.
        assert made.most < (bound if on_cpu() else 1.1 * bound) < made_at_once.most
        latents = torch.zeros_like(own)
        tokens, features, values = encoder(x)
        latents[tokens, features] = values
        torch.testing.assert_close(latents, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(Decoder(sae).directly(x, encoder.own_tokens), written, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("text", ["4", "4 TB", "lots", "-1GB", "1e9GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(CapacityError, match="is not a size: write it as 500MB or 4GB"):
        bytes_in(text)


def test_sizes_are_exact() -> None:
    """A float loses a byte of 1.001 GB."""
    assert (bytes_in("1.5GB"), bytes_in("500MB"), bytes_in(" 0.29GB ")) == (1_500_000_000, 500_000_000, 290_000_000)
    for number in range(1, 30_000):
        whole, thousandths = divmod(number, 1000)
        assert bytes_in(f"{whole}.{thousandths:03}GB") == number * 10**6
        assert bytes_in(f"{whole}.{thousandths:03}MB") == number * 10**3
