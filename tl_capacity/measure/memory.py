"""Memory: how many latents may be dense at once for a process to stay within its limit."""

from __future__ import annotations

from tl_capacity.dictionaries.encoding import CHECKED_TOKENS
from tl_capacity.errors import CapacityError
from tl_capacity.measure.session import CapacityHooks

COPIES_OF_SUMS = 4.5
"""Copies of the sums held at once: the sums themselves and, while saving, the snapshot, its counts as floats, and its
bytes twice (gathered by safetensors, then joined).
"""
LATENT_BYTES = 6
"""Bytes for each latent that is encoded: its value, and what finds the active ones."""
CHECKED_BYTES = 16
"""Bytes for each latent of the first tokens, which the SAE itself encodes too, one after the other."""
OWN_ENCODE_BYTES = 48
"""Bytes for each latent in an SAE's own `encode`: at most 20 in its steps, each of which makes a new block, and then at
most 48 in finding the active ones, where all are.
"""
VARIATION = 100_000_000
"""How much a process's memory at the start varies from run to run. It keeps a limit that a refusal asked for from being
refused again.
"""
RESERVE = 300_000_000
"""Left for the activations of a small model, and for libraries that load later."""


def sums_of(capacity: CapacityHooks) -> int:
    """Bytes of the sums of all taps."""
    return sum(tensor.nbytes for tap in capacity.taps for tensor in tap.statistics.tensors().values())


def fit_memory(capacity: CapacityHooks, limit: int) -> None:
    """Choose how many latents are dense at once, so that this process stays below `limit` bytes. The count includes
    what it holds already, the sums while they are saved, and a reserve for the model's activations. It holds for the
    short cut and for an SAE's own `encode`, which any SAE may turn out to need.

    Raises:
        CapacityError: where not one token would fit.
    """
    import psutil

    fixed = psutil.Process().memory_info().rss + int(COPIES_OF_SUMS * sums_of(capacity)) + RESERVE
    widest = max(tap.d_sae for tap in capacity.taps)  # taps encode one after the other, into the same memory
    room = limit - fixed
    # The first tokens are also encoded by the SAE itself, to compare.
    spare = room - CHECKED_TOKENS * CHECKED_BYTES * widest
    if spare < LATENT_BYTES * widest:
        needed = (limit - spare + LATENT_BYTES * widest + VARIATION) / 1e9
        raise CapacityError(
            f"--max-memory {limit / 1e9:.2f} GB is too little: these SAEs need {needed:.2f} GB, so allow that or"
            " measure fewer at once"
        )
    for tap in capacity.taps:
        tap.encoder.hold(min(tap.encoder.dense_latents, spare // LATENT_BYTES))
    kept = LATENT_BYTES * max(tap.encoder.kept_latents for tap in capacity.taps)
    for tap in capacity.taps:
        tap.encoder.hold_own(min(tap.encoder.own_latents, (room - kept) // OWN_ENCODE_BYTES))
