"""Memory: how many latents may be dense at once, so that a process stays below what it may hold."""

from __future__ import annotations

from tl_capacity.dictionaries.encoding import CHECKED_TOKENS
from tl_capacity.errors import CapacityError
from tl_capacity.measure.session import CapacityHooks

SUMS_AT_ONCE = 4.5
"""The sums, and while they are saved the snapshot, its counts as floats, and its bytes twice: as safetensors gathers
them, and joined.
"""
LATENT_BYTES = 6
"""Of a latent that is encoded: its value, and what finds those that are active."""
OWN_ENCODE_BYTES = 16
"""Of a latent in an SAE's own `encode`, which makes a new block at each of its steps."""
VARIATION = 100_000_000
"""By which what a process holds before it begins differs from one time to the next; who allows what a refusal asks for
must not be refused again.
"""
RESERVE = 300_000_000
"""For the activations of a small model, and for libraries that are first needed on the way."""


def sums_of(capacity: CapacityHooks) -> int:
    """Bytes of the sums of all taps."""
    return sum(tensor.nbytes for tap in capacity.taps for tensor in tap.statistics.tensors().values())


def fit_memory(capacity: CapacityHooks, limit: int) -> None:
    """Choose how many latents are dense at once so that this process stays below `limit` bytes: beside what it holds,
    the sums while they are saved, and a reserve for the model's own activations.

    Raises:
        CapacityError: where not one token would fit.
    """
    import psutil

    fixed = psutil.Process().memory_info().rss + int(SUMS_AT_ONCE * sums_of(capacity)) + RESERVE
    widest = max(tap.d_sae for tap in capacity.taps)  # taps encode one after the other, into the same memory
    # The first tokens are also encoded by the SAE itself, to compare.
    spare = limit - fixed - CHECKED_TOKENS * OWN_ENCODE_BYTES * widest
    if spare < LATENT_BYTES * widest:
        needed = (limit - spare + LATENT_BYTES * widest + VARIATION) / 1e9
        raise CapacityError(
            f"--max-memory {limit / 1e9:.2f} GB is too little: these SAEs need {needed:.2f} GB, so allow that or"
            " measure fewer at once"
        )
    for tap in capacity.taps:
        tap.encoder.hold(min(tap.encoder.dense_latents, spare // LATENT_BYTES))
