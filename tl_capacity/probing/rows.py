"""Rows of `probes.json`: how well each model and baseline told each concept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_capacity.probing.fields import estimate_of, finite, whole, width_of
from tl_capacity.results.estimate import Estimate

JSON_NAME = "probes.json"
SCHEMA = 1
TRAINED, RANDOM, COMPONENTS, EMBEDDINGS = (
    "trained",
    "random weights",
    "teacher's principal components",
    "bag of embeddings",
)
"""What is probed: the model itself, and three baselines."""


@dataclass(frozen=True, kw_only=True)
class ProbeNumbers:
    """The numbers of one probe, without its weights and scores; None if a file lacks one.

    Attributes:
        concept: what it tells apart.
        hook, width, pooling: of what it reads.
        accuracy, auroc: on the test split, with 95% intervals.
        control: accuracy on the control task; None where there was none.
        selectivity: accuracy above that of the control task; None where there was none.
        majority: accuracy of always saying the commoner class.
        c: inverse of the penalty.
        n_train, n_test: rows that it was fitted on and tested on.
        test_documents: documents that the latter are from.
    """

    concept: str
    width: int
    accuracy: Estimate
    auroc: Estimate | None = None
    hook: str = ""
    pooling: str = ""
    control: float | None = None
    selectivity: Estimate | None = None
    majority: float | None = None
    c: float | None = None
    n_train: int | None = None
    n_test: int | None = None
    test_documents: int | None = None

    def to_json(self) -> dict[str, Any]:
        """All numbers as a flat JSON object."""
        estimates = {"accuracy": self.accuracy, "auroc": self.auroc, "selectivity": self.selectivity}
        known = {name: estimate for name, estimate in estimates.items() if estimate is not None}
        values: dict[str, Any] = {name: estimate.value for name, estimate in known.items()}
        selectivity = {"selectivity": values.pop("selectivity")} if "selectivity" in values else {}
        return {
            "concept": self.concept,
            "hook": self.hook,
            "pooling": self.pooling,
            "width": self.width,
            **values,
            "control_accuracy": self.control,
            **selectivity,
            **{
                ("" if name == "accuracy" else f"{name}_") + side: getattr(estimate, side)
                for name, estimate in known.items()
                for side in ("low", "high")
            },
            "majority": self.majority,
            "c": self.c,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "test_documents": self.test_documents,
        }


@dataclass(frozen=True, kw_only=True)
class ProbeRow(ProbeNumbers):
    """One probe of a model or of a baseline.

    Attributes:
        kind: what it reads: the trained model or student, or a baseline.
        model: the model's or student's name.
        baseline: whether it is one; its width is that of the student that it stands beside.
    """

    kind: str = "probe"
    model: str = ""
    baseline: bool = False

    def to_json(self) -> dict[str, Any]:
        """The row as a flat JSON object."""
        return {"kind": self.kind, "model": self.model, "baseline": self.baseline} | super().to_json()

    @classmethod
    def from_json(cls, content: Any) -> ProbeRow | None:
        """A checked row of the file; None if it has no number, as for a probe that could not be fitted.

        Raises:
            MeasurementError: where a width or number is none that a probe can have.
        """
        numbers = _numbers(content)
        if numbers is None:
            return None
        return cls(
            **numbers,
            kind=str(content.get("kind", "probe")),
            model=str(content.get("model", "")),
            baseline=bool(content.get("baseline")),
        )


@dataclass(frozen=True, kw_only=True)
class SparseRow(ProbeNumbers):
    """One probe that reads k features.

    Attributes:
        features: their numbers in the SAE, the most telling first.
        ranks, widths, lost_below: see `SparseProbe`.
        falls_at: the widest student in which the probe on all activations falls.
    """

    features: tuple[int, ...] = ()
    ranks: tuple[int | None, ...] = ()
    widths: tuple[int | None, ...] = ()
    lost_below: int | None = None
    falls_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return {
            **super().to_json(),
            "features": list(self.features),
            "ranks": list(self.ranks),
            "widths": list(self.widths),
            "lost_below": self.lost_below,
            "falls_at": self.falls_at,
        }

    @classmethod
    def from_json(cls, content: Any) -> SparseRow | None:
        """A checked row of the file; None if it has no number.

        Raises:
            MeasurementError: where a width or number is none that a probe can have.
        """
        numbers = _numbers(content)
        if numbers is None:
            return None
        return cls(
            **numbers,
            features=tuple(feature for feature in _whole_numbers(content, "features") if feature is not None),
            ranks=_whole_numbers(content, "ranks"),
            widths=_whole_numbers(content, "widths"),
            lost_below=whole(JSON_NAME, content.get("lost_below")),
            falls_at=whole(JSON_NAME, content.get("falls_at")),
        )


@dataclass(frozen=True)
class ProbedConcept:
    """A concept that was probed for.

    Attributes:
        classes: the class of label 1 and the other; empty where the file does not name them.
        texts: how many there are.
        truncated: how many of them did not fit the teacher's context.
        falls_at: the widest student that is less accurate than the teacher by more than its interval.
    """

    name: str
    classes: tuple[str, ...] = ()
    texts: int | None = None
    truncated: int | None = None
    falls_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The concept as a JSON object."""
        return vars(self) | {"classes": list(self.classes)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ProbedConcept:
        """What the file says of a concept."""
        classes = content.get("classes")
        return cls(
            str(content.get("name", "")),
            tuple(map(str, classes)) if isinstance(classes, list) else (),
            *(whole(JSON_NAME, content.get(name)) for name in ("texts", "truncated", "falls_at")),
        )


def _numbers(content: Any) -> dict[str, Any] | None:
    """The checked numbers of a row; None if it has no width or accuracy."""
    if not isinstance(content, dict) or "width" not in content:
        return None
    accuracy = estimate_of(JSON_NAME, content, "accuracy", "low", "high")
    if accuracy is None:
        return None
    return {
        "concept": str(content.get("concept", "")),
        "width": width_of(JSON_NAME, content),
        "accuracy": accuracy,
        "auroc": estimate_of(JSON_NAME, content, "auroc", "auroc_low", "auroc_high"),
        "majority": finite(JSON_NAME, content.get("majority")),
        "control": finite(JSON_NAME, content.get("control_accuracy")),
        "selectivity": estimate_of(JSON_NAME, content, "selectivity", "selectivity_low", "selectivity_high"),
        "hook": str(content.get("hook", "")),
        "pooling": str(content.get("pooling", "")),
        "c": finite(JSON_NAME, content.get("c")),
        **{name: whole(JSON_NAME, content.get(name)) for name in ("n_train", "n_test", "test_documents")},
    }


def _whole_numbers(content: Mapping[str, Any], name: str) -> tuple[int | None, ...]:
    """A list of whole numbers, with None for anything else; empty if there is no list."""
    listed = content.get(name)
    return tuple(whole(JSON_NAME, each) for each in listed) if isinstance(listed, list) else ()
