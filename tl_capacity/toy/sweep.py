"""What a sweep of toy models trains: its settings, and the place of each model in the stacked tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.toy.features import FeatureDistribution, zipf_importance


@dataclass(frozen=True)
class SweepSettings:
    """Everything that decides the weights of a sweep.

    The defaults are the paper's 48 configurations (arXiv:2604.04037).

    A configuration is a number of features n, a sparsity α and a teacher width d_T, and has students of the widths 1 …
    d_T. Those trained on the data itself do not depend on d_T, and are trained once for all configurations of one n and
    α.

    Attributes:
        features, alphas, teacher_widths: the values of n, α and d_T, all combined with one another.
        widths: d_S of the students; by default all from 1 to d_T. Teachers' widths are always among them.
        seeds, first_seed: how many seeds, and the first of them.
        steps, batch, lr: steps of Adam on `batch` samples that are not all zero, with a learning rate that falls from
            `lr` to 0 along half a cosine.
        slope: s of the importances Iᵢ = i^−s: 1 for Zipf's law, 0 for uniform ones.
        correlation: see `FeatureDistribution`.
        distilled: whether students of the trained teachers are trained as well.
        evaluation_rows: held-out samples, not all zero, that floors are measured on.

    Raises:
        CapacityError: where a value is outside its domain.
    """

    features: tuple[int, ...] = (10, 20, 40)
    alphas: tuple[float, ...] = (0.80, 0.90, 0.95, 0.99)
    teacher_widths: tuple[int, ...] = (3, 5, 8, 10)
    widths: tuple[int, ...] = ()
    seeds: int = 20
    steps: int = 10_000
    batch: int = 128
    lr: float = 1e-2
    slope: float = 1.0
    correlation: str = "independent"
    distilled: bool = True
    evaluation_rows: int = 2**17
    first_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("features", "alphas", "teacher_widths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise CapacityError(f"{name} = {list(values)} must list at least one value, each once")
        for name in ("teacher_widths", "widths", "seeds", "steps", "batch", "evaluation_rows"):
            for value in getattr(self, name) if isinstance(getattr(self, name), tuple) else (getattr(self, name),):
                if value < 1:
                    raise CapacityError(f"{name} = {value} is too few: pass at least 1")
        if self.evaluation_rows < 2:
            raise CapacityError(f"evaluation_rows = {self.evaluation_rows} gives no error of the mean: pass at least 2")
        if not (isfinite(self.lr) and self.lr > 0):
            raise CapacityError(f"lr = {self.lr:g} is not a learning rate: pass a positive number")
        if self.first_seed < 0:
            raise CapacityError(f"first_seed = {self.first_seed} is negative: pass 0 or more")
        try:
            for n in self.features:
                zipf_importance(n, self.slope)
                for alpha in self.alphas:
                    FeatureDistribution(n, alpha, self.correlation)
        except ValueError as problem:
            raise CapacityError(str(problem)) from problem

    @property
    def student_widths(self) -> tuple[int, ...]:
        """d_S of all students that are trained on the data, ascending, with the teachers among them."""
        return tuple(sorted({*(self.widths or range(1, max(self.teacher_widths) + 1)), *self.teacher_widths}))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    @property
    def configurations(self) -> int:
        """Number of configurations (n, α, d_T)."""
        return len(self.features) * len(self.alphas) * len(self.teacher_widths)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of students, in the order in which they are trained."""
        return ("direct", "distilled") if self.distilled else ("direct",)

    @property
    def total_steps(self) -> int:
        return self.steps * len(self.kinds)

    def streams(self, n: int) -> list[Stream]:
        """The source of samples for each sparsity and seed. All students of one stream see the same samples."""
        return [
            Stream(FeatureDistribution(n, alpha, self.correlation), seed)
            for alpha in self.alphas
            for seed in self.all_seeds
        ]

    def families(self, kind: str) -> Iterator[Family]:
        """The families of students trained on the data (`direct`) or on teachers (`distilled`)."""
        for n in self.features:
            if kind == "direct":
                yield Family(n, self.student_widths, None)
            else:
                yield from (
                    Family(n, tuple(w for w in self.student_widths if w <= teacher), teacher)
                    for teacher in self.teacher_widths
                )

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SweepSettings:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Stream:
    """The samples of one feature distribution and one seed."""

    distribution: FeatureDistribution
    seed: int


@dataclass(frozen=True)
class Family:
    """Students of one n that are trained together.

    Each stream has one student of each width. All learn from the data, or all from the teacher of one width.

    Attributes:
        n: number of features.
        widths: d_S of each student of a stream.
        teacher_width: d_T, or None for students trained on the data.
    """

    n: int
    widths: tuple[int, ...]
    teacher_width: int | None

    @property
    def name(self) -> str:
        return f"n{self.n}.direct" if self.teacher_width is None else f"n{self.n}.teacher{self.teacher_width}"
