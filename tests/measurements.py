"""Measurements of which the counts are given, and curves and students of which the losses are, without model or
text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.summary import FeatureSummary
from tl_capacity.text.counting import MASK_REASONS
from tl_capacity.text.documents import DOCUMENT_GROUPS


def sums_of_counts(counts: np.ndarray[Any, Any], tokens: int = 10_000) -> dict[str, np.ndarray[Any, Any]]:
    """The sums of an SAE of which latent i fired `counts[i]` times."""
    groups, features = DOCUMENT_GROUPS, len(counts)
    share = np.zeros((groups, features), dtype=np.int64) + counts // groups
    spread = np.random.default_rng(0).gamma(2.0, size=features)
    return {
        "counts": share,
        "sums": share * spread,
        "squares": share * spread**2,
        "tokens": np.full(groups, tokens // groups),
        "documents": np.full(groups, 3),
        "incidence": np.minimum(counts, 3 * groups).astype(np.int64),
        "masked": np.zeros(len(MASK_REASONS), dtype=np.int64),
        "counted_norm": np.ones(1),
        "masked_norm": np.zeros(1),
        "fvu_tokens": np.zeros(groups, dtype=np.int64),
        "residual": np.zeros(groups),
        "energy": np.zeros(groups),
        "mean_sum": np.zeros((groups, 16)),
        "decoder_norm": np.ones(features),
    }


def measurement_of_counts(
    *counts: np.ndarray[Any, Any], hook: str = "blocks.{}.hook_resid_post", tokens: int = 10_000
) -> Measurement:
    """A measurement with a hook point for each array of how often each latent fired."""
    hooks = [
        HookMeasurement(
            hook.format(i), f"sae{i}", "0" * 64, "standard", 16, FeatureSummary(sums_of_counts(each, tokens))
        )
        for i, each in enumerate(counts)
    ]
    return Measurement(tuple(hooks))


KEPT = (0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 200)


def curve_at(
    hook: HookMeasurement,
    kl: Callable[[float], float],
    kept: Sequence[int] = KEPT,
    groups: int = DOCUMENT_GROUPS,
    order: str = "second_moment",
) -> SplicedCurve:
    """A curve at a hook point of which `kl` says the mean at each number of kept features; documents differ by a
    factor.
    """
    alive = int(hook.summary.n_alive.value)
    numbers = tuple(sorted({min(number, alive) for number in kept} | {alive}))
    factors = np.random.default_rng(1).gamma(50.0, 1 / 50, size=groups)
    factors /= factors.mean()
    tokens = np.zeros(DOCUMENT_GROUPS, dtype=np.int64)
    tokens[:groups] = 100
    sums = np.zeros((DOCUMENT_GROUPS, len(numbers)))
    sums[:groups] = 100 * factors[:, None] * np.array([kl(number) for number in numbers])
    return SplicedCurve(
        hook.hook,
        hook.sae,
        hook.sae_digest,
        hook.architecture,
        hook.width,
        order,
        "mean",
        False,
        numbers,
        sums,
        tokens,
    )


def students_with(
    floors: Mapping[int, Sequence[float]], teacher: str = "unnamed model", teacher_width: int = 16
) -> DistillationRun:
    """Students whose held-out loss was the same from the first step on: of each width one for each floor."""
    curves = [
        StudentCurve(
            f"width{width}-seed{seed}",
            width,
            seed,
            "random",
            100 * width,
            10 * width,
            tuple(range(0, 600, 100)),
            (floor,) * 6,
            (1.0,) * 5,
        )
        for width, of_seeds in floors.items()
        for seed, floor in enumerate(of_seeds)
    ]
    return DistillationRun(tuple(curves), teacher, teacher_width)


def assert_same_sums(one: Measurement, other: Measurement, rtol: float = 1e-12) -> None:
    """Counts exactly, moments to `rtol`; the number of padding places depends on which rows share a batch."""
    for mine, theirs in zip(one, other, strict=True):
        for name, array in mine.summary.arrays.items():
            if array.dtype.kind == "i":
                skip = int(name == "masked")
                np.testing.assert_array_equal(array[skip:], theirs.summary.arrays[name][skip:], err_msg=name)
            else:
                scale = 1e-12 * np.abs(array).max()
                np.testing.assert_allclose(array, theirs.summary.arrays[name], rtol=rtol, atol=scale, err_msg=name)
