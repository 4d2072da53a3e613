"""Judged: how a finished student predicts held-out text beside its teacher, document by document.

The figures that follow have intervals over documents. It is read without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.results.estimate import Estimate, cluster_bootstrap

MEANS = ("kl", "cross_entropy", "teacher_cross_entropy", "agreement")
"""The figures that are means over the predicted tokens of each document."""


@dataclass(frozen=True)
class Judged:
    """How one student predicts held-out text, beside its teacher.

    Attributes:
        documents: number of each document in its source [document].
        tokens: predicted tokens of each [document].
        kl: KL(teacher ‖ student) at T = 1, in nats per token: the mean over the tokens of each document [document].
        cross_entropy, teacher_cross_entropy: of the text by the student and by the teacher, likewise.
        agreement: share of the tokens for which both find the same next token likeliest [document].
    """

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    teacher_cross_entropy: tuple[float, ...]
    agreement: tuple[float, ...]

    @cached_property
    def figures(self) -> dict[str, Estimate]:
        """Means over all tokens, with 95% intervals from a bootstrap over documents.

        They are those of `MEANS` and `above_teacher`: the student's cross-entropy less its teacher's.
        """
        columns = {name: np.array(getattr(self, name)) for name in MEANS}
        columns["above_teacher"] = columns["cross_entropy"] - columns["teacher_cross_entropy"]
        return {name: self._mean(column) for name, column in columns.items()}

    def _mean(self, per_document: NDArray[np.float64]) -> Estimate:
        tokens = np.array(self.tokens, dtype=np.float64)
        return cluster_bootstrap(
            lambda weights: (weights @ (per_document * tokens)) / (weights @ tokens), np.array(self.documents)
        )

    def flat(self) -> dict[str, float | None]:
        """The figures as one row: each value, then `NAME low` and `NAME high`."""
        return {
            key: end
            for name, figure in self.figures.items()
            for key, end in ((name, figure.value), (f"{name} low", figure.low), (f"{name} high", figure.high))
        }

    @classmethod
    def of_sums(
        cls, documents: NDArray[np.int64], tokens: NDArray[np.int64], sums: Mapping[str, NDArray[np.float64]]
    ) -> Judged:
        """From sums over each document's predicted tokens [document], keyed by the names in `MEANS`."""
        means = (tuple((sums[name] / tokens).tolist()) for name in MEANS)
        return cls(tuple(documents.tolist()), tuple(tokens.tolist()), *means)

    def to_json(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Judged:
        """The result that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: where it is damaged.
        """
        documents, tokens = (tuple(map(int, content[name])) for name in ("documents", "tokens"))
        judged = cls(documents, tokens, *(tuple(map(float, content[name])) for name in MEANS))
        lengths = {len(getattr(judged, name)) for name in ("documents", "tokens", *MEANS)}
        if len(lengths) != 1 or not judged.tokens or min(judged.tokens) < 1:
            raise ValueError("its figures are of different documents, or of none")
        return judged
