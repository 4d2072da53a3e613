"""The interface of a capacity law: what it is given, and what it declares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CapacityContext:
    """What a capacity law is given: the features at a hook point, and the widths there.

    Attributes:
        alpha: sparsity α of the features.
        importance: [feature] importances of the alive features, in no particular order.
        hook_width: d, the dimensions of the hook point; 0 where it is not known, as of a bare curve.
        teacher_width: d_T, the dimensions of the teacher's residual stream; 0 where it is not known.
    """

    alpha: float
    importance: NDArray[np.float64]
    hook_width: int = 0
    teacher_width: int = 0

    @property
    def n_features(self) -> int:
        """F, the number of alive features."""
        return len(self.importance)


class CapacityLaw:
    """Base of a capacity law: how many features a student's width holds. Subclass it, name it, and override one method.
    That is `features_per_dimension`, or `kept` for a law that looks at other widths or is not linear in the student's.
    """

    name: str
    summary: str = ""
    caveat: str = ""
    """Where the law must not be trusted. It is printed beside every figure that uses the law."""
    is_default: bool = False
    """Whether this law is used by default. Exactly one law of all plugins says so."""

    def features_per_dimension(self, alpha: float, importance: NDArray[np.float64]) -> float:
        """ĝ for sparsity `alpha` and the alive features' importances [feature]."""
        raise NotImplementedError(
            f"the capacity law {self.name!r} overrides neither features_per_dimension() nor kept()"
        )

    def kept(self, width: int, at: CapacityContext) -> float:
        """Features that a student of width d_S keeps, before rounding down. It must not fall as the width grows. Called
        only if both widths of `at` are known.
        """
        return width * self.features_per_dimension(at.alpha, at.importance)
