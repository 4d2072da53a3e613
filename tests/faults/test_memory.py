"""Wide SAEs stay within a stated memory, whatever is asked of it, and give the same figures however few latents are
dense at once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import HOOK, arguments

from tl_capacity import Measurement
from tl_capacity.errors import CapacityError
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
