"""k-sparse probes (Gurnee et al. 2023, arXiv:2305.01610): which few features of an SAE carry a concept.

They also say below which student width the theorem drops these features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, narrowest_width
from tl_capacity.probing.activations import Activations
from tl_capacity.probing.concepts import LabelledTexts
from tl_capacity.probing.probes import Probe, fit_probes
from tl_capacity.probing.probes import difference as difference_of
from tl_capacity.probing.rows import SparseRow
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked

FEATURES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class SparseProbe:
    """A probe that reads k features.

    Attributes:
        probe: the probe, on those features alone.
        features: their numbers in the SAE, the most telling first.
        ranks: of their importance, 1 for the most important of the alive features; None for a feature that the
            measurement does not know as alive.
        widths: the narrowest student in which the law keeps each; None where it has no rank.
    """

    probe: Probe
    features: tuple[int, ...]
    ranks: tuple[int | None, ...] = ()
    widths: tuple[int | None, ...] = ()

    @property
    def lost_below(self) -> int | None:
        """The narrowest student whose law keeps all of the features; None if a rank is missing."""
        known = [width for width in self.widths if width is not None]
        return max(known) if known and len(known) == len(self.widths) else None

    def row(self, falls_at: int | None = None) -> SparseRow:
        """The numbers as `probes.json` has them.

        Args:
            falls_at: the widest student in which the probe on all activations falls.
        """
        return SparseRow(
            **vars(self.probe.numbers),
            features=self.features,
            ranks=self.ranks,
            widths=self.widths,
            lost_below=self.lost_below,
            falls_at=falls_at,
        )

    def to_json(self) -> dict[str, Any]:
        """The probe and the features that it reads, as a JSON object."""
        return {name: value for name, value in self.row().to_json().items() if name != "falls_at"}


@checked
def sparse_probes(
    latents: Mapping[str, Activations],
    concepts: Sequence[LabelledTexts],
    measurement: HookMeasurement | None = None,
    *,
    importance: str | None = None,
    law: str | None = None,
    ks: Sequence[int] = FEATURES,
    seed: int = 0,
) -> list[SparseProbe]:
    """Probes of each concept on its k most telling features, for each k.

    Features are chosen on the training split, by the t statistic of their mean pooled latent between the classes, so
    that what is reported is of documents that had no say in the choice.

    Args:
        latents: of each concept's texts, by its name: what `collect(…, sae=…)` gives.
        concepts: the concepts.
        measurement: of the same SAE, for importance ranks and the law's widths.
        importance, law: as for predicted floors; None for the default ones.
        ks: numbers of features.

    Raises:
        CapacityError: where latents are missing or the measurement is of another SAE.
    """
    if not ks or min(ks) < 1:
        raise CapacityError(f"k = {list(ks)} are not numbers of features: pass whole numbers of at least 1")
    capacity_law = plugins().capacity_laws.named(law)
    ranks: dict[int, int] = {}
    if measurement is not None:
        at = context_at(measurement, measurement.importance(importance), measurement.summary.alpha.value)
        ranks = {int(feature): rank for rank, feature in enumerate(measurement.ranked(importance), 1)}
    probes = []
    for concept in concepts:
        if concept.name not in latents:
            raise CapacityError(
                f"there are no latents of the concept {concept.name!r}: collect those of its texts with sae=…"
            )
        pooled = latents[concept.name]
        if measurement is not None and pooled.width != measurement.summary.d_sae:
            raise CapacityError(
                f"the SAE has {pooled.width:,} latents, but the measurement is of one with"
                f" {measurement.summary.d_sae:,}: measure this SAE"
            )
        train = concept.splits[pooled.texts] == "train"
        telling = most_telling(pooled.values[train], concept.labels[pooled.texts][train], max(ks))
        for k in ks:
            chosen = telling[:k]
            narrowed = replace(pooled, values=pooled.values[:, chosen])
            (probe,) = fit_probes({concept.name: narrowed}, [concept], control=False, seed=seed)
            features = tuple(int(feature) for feature in chosen)
            ranks_of_probe = tuple(ranks.get(feature) for feature in features) if measurement is not None else ()
            widths = tuple(None if rank is None else narrowest_width(capacity_law, rank, at) for rank in ranks_of_probe)
            probes.append(SparseProbe(probe, features, ranks_of_probe, widths))
    return probes


def most_telling(
    values: Float[np.ndarray, "row feature"], labels: Bool[np.ndarray, " row"], k: int
) -> NDArray[np.int64]:
    """Numbers of the k features that tell the classes apart best, the most telling first.

    They have the largest difference of means, in units of its standard error (Welch's |t|).

    Features that never vary are not chosen, so there may be fewer than k.

    Raises:
        CapacityError: where none varies.
    """
    first, second = values[labels].astype(np.float64), values[~labels].astype(np.float64)
    error = np.sqrt(first.var(axis=0) / len(first) + second.var(axis=0) / len(second))
    apart = np.abs(first.mean(axis=0) - second.mean(axis=0))
    varies = values.min(axis=0) < values.max(axis=0)
    if not varies.any():
        raise CapacityError(
            "no feature of the SAE tells these texts apart: it belongs to another model, or all of its latents are"
            " silent"
        )
    # A feature that is constant within each class, but not over both, tells them apart without error.
    t = np.divide(apart, error, out=np.where(varies, np.inf, -1.0), where=error > 0)
    return np.argsort(-t, kind="stable")[: min(k, int(varies.sum()))]


def carrying_features(
    latents: Activations, concept: LabelledTexts, k: int, among: Bool[np.ndarray, " feature"] | None = None
) -> tuple[int, ...]:
    """Numbers of the k features that carry a concept, the most telling first.

    Its k-sparse probe chooses them on the training split.

    Args:
        latents: of the concept's texts: what `collect(…, sae=…)` gives.
        among: the only features to choose from [feature]; None for all.

    Raises:
        CapacityError: where fewer than k of them tell the classes apart.
    """
    train = concept.splits[latents.texts] == "train"
    telling = most_telling(latents.values[train], concept.labels[latents.texts][train], latents.width)
    chosen = tuple(int(feature) for feature in telling if among is None or among[feature])[:k]
    if k < 1 or len(chosen) < k:
        raise CapacityError(
            f"{k:,} features cannot carry the concept {concept.name!r}, as only {len(chosen):,} tell its classes"
            f" apart: ask for a number from 1 to {len(chosen):,}"
        )
    return chosen


def falls_at(teacher: Probe, students: Sequence[Probe], seed: int = 0) -> int | None:
    """The widest student whose probe is less accurate than the teacher's; None if there is none.

    The whole 95% interval of the difference over resampled documents must be below zero.
    """
    fallen = [
        student.width
        for student in students
        if (high := difference_of(student, teacher, seed).high) is not None and high < 0
    ]
    return max(fallen, default=None)
