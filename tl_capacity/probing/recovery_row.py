"""RecoveryRow: what was read from one student at one hook point, as stored in recoverability.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from tl_capacity.errors import MeasurementError
from tl_capacity.plugins import plugins
from tl_capacity.probing.fields import as_count, finite, numbers_of, object_of, whole, width_of
from tl_capacity.results.estimate import Estimate
from tl_capacity.storage.files import check_any_schema

JSON_NAME = "recoverability.json"


SCHEMA = 1


COUNTS = {"student": "kept", "random": "kept_random", "pca": "kept_pca", "teacher": "kept_teacher"}
"""What is read at each width, and the JSON name of its number of kept features."""


READOUTS = {"random": "random weights", "student": "student", "teacher": "teacher"}
"""Readouts whose medians a page shows, from the floor to the ceiling."""


OVERLAP = ("predicted", "kept_of_predicted", "kept_of_all", "ordered", "ordered_by_chance")
"""The names of the figures of `Recovery.overlap`."""


TYPICAL = ("auroc", "average_precision", "r2", "largest_auroc_error", "ridge")
"""The figures of a readout: medians over judged features, the largest AUROC error, and the penalty."""


DEFAULT_BUDGET = "budget"
"""The field of the default law's budget. The fields of other laws have the law's name."""


FIELDS = {
    *("schema", "student", "width", "hook", "tau", *COUNTS.values(), DEFAULT_BUDGET, "predicted", "n_features"),
    *("n_judged", "intervals", "overlap", "by_tau", "readouts", "tokens", "student_hook", "tried"),
}
"""The fields of a row; any other is a law's budget."""


TAU_KEY = re.compile(r"0\.\d{1,9}")


@dataclass(frozen=True)
class RecoveryRow:
    """One student at one hook point.

    Attributes:
        n_features, n_judged: alive features, and those that fired often enough in the held-out text to be judged.
        counts: numbers of kept features, by the names in `COUNT_LABELS`; those that are known.
        budgets: how many features each capacity law lets the student keep, by the law's name, the default one first.
        predicted: how many alive features are among those that the default law lets it keep.
        overlap: shares of the predicted and of all judged features that are kept, as `Recovery.overlap` names them.
        readouts: what is typical of each readout, by the names in `TYPICAL`.
        by_tau: at each τ, how many features each readout finds.
        tokens: counted tokens by what they were used for.
        student_hook: where the student was read, if not at `hook`, or if that was chosen.
        tried: where it was chosen, the error of each hook point that was tried, on the documents that fit.
    """

    student: str
    width: int
    hook: str
    tau: float
    n_features: int
    n_judged: int
    counts: Mapping[str, Estimate]
    budgets: Mapping[str, Estimate] = field(default_factory=dict)
    predicted: int | None = None
    overlap: Mapping[str, float] = field(default_factory=dict)
    readouts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    by_tau: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    student_hook: str | None = None
    tried: Mapping[str, float] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, dict[str, float]]:
        """Medians of `average_precision` and `r2` over judged features, by readout."""
        return {
            name: {
                readout: self.readouts[readout][name] for readout in READOUTS if name in self.readouts.get(readout, {})
            }
            for name in ("average_precision", "r2")
        }

    @property
    def labelled(self) -> dict[str, Estimate]:
        """Numbers of kept features, then budgets, by their names on a page."""
        kept = {label: self.counts[key] for key, label in COUNT_LABELS.items() if key in self.counts}
        return kept | {budget_label(law): budget for law, budget in self.budgets.items()}

    def flat(self) -> dict[str, Any]:
        """The scalar numbers by their names in the file; null if not known."""
        return {
            "student": self.student,
            "width": self.width,
            "hook": self.hook,
            "tau": self.tau if isfinite(self.tau) else None,
            **{key: as_count(self.counts[key].value) if key in self.counts else None for key in COUNTS.values()},
            **{_budget_key(law): budget.value for law, budget in self.budgets.items()},
            "predicted": self.predicted,
            "n_features": self.n_features,
            "n_judged": self.n_judged,
        }

    def intervals(self) -> dict[str, list[float] | None]:
        """The interval of each readout's number of kept features."""
        counted = {readout: self.counts[key] for readout, key in COUNTS.items() if key in self.counts}
        return {
            readout: None if count.low is None or count.high is None else [count.low, count.high]
            for readout, count in counted.items()
        }

    def shares(self) -> dict[str, float | int | None]:
        """The figures of the overlap; null if not known."""
        shares: dict[str, float | int | None] = {name: self.overlap.get(name) for name in OVERLAP}
        predicted = shares["predicted"]
        return shares if predicted is None else {**shares, "predicted": as_count(predicted)}

    def typical(self) -> dict[str, dict[str, float | None]]:
        """The figures of each readout; null if not known."""
        return {readout: {name: values.get(name) for name in TYPICAL} for readout, values in self.readouts.items()}

    def to_json(self) -> dict[str, Any]:
        """The whole row, as the file has it."""
        return {
            "schema": SCHEMA,
            **self.flat(),
            "intervals": self.intervals(),
            "overlap": self.shares(),
            "by_tau": {
                f"{tau:.2f}": {name: as_count(count) for name, count in counts.items()}
                for tau, counts in self.by_tau.items()
            },
            "readouts": self.typical(),
            "tokens": dict(self.tokens),
            **({} if self.student_hook is None else {"student_hook": self.student_hook, "tried": dict(self.tried)}),
        }

    @classmethod
    def from_json(cls, content: Any) -> RecoveryRow:
        """A checked row of the file.

        Raises:
            MeasurementError: where it is of a newer version, or a width or number is none that a row can have.
        """
        check_any_schema(JSON_NAME, content, SCHEMA)
        row = content if isinstance(content, dict) else {}
        numbers = numbers_of(JSON_NAME, row)
        if "width" not in row or "kept" not in numbers:
            raise MeasurementError(
                f"{JSON_NAME} has a row without width and kept: it was altered, measure recoverability again"
            )
        intervals, features = object_of(row, "intervals"), int(numbers.get("n_features", 0))
        readouts, by_tau = object_of(row, "readouts"), object_of(row, "by_tau")
        return cls(
            student=str(row.get("student", "")),
            width=width_of(JSON_NAME, row),
            hook=str(row.get("hook", "")),
            tau=numbers.get("tau", float("nan")),
            n_features=features,
            n_judged=int(numbers.get("n_judged", features)),
            counts={
                key: _with_interval(numbers[key], intervals.get(readout))
                for readout, key in COUNTS.items()
                if key in numbers
            },
            budgets={
                _law_of(key): Estimate(number)
                for key, number in numbers.items()
                if key == DEFAULT_BUDGET or key not in FIELDS
            },
            predicted=whole(JSON_NAME, row.get("predicted")),
            overlap=numbers_of(JSON_NAME, object_of(row, "overlap")),
            readouts={
                readout: numbers_of(JSON_NAME, object_of(readouts, readout))
                for readout in COUNTS
                if readout in readouts
            },
            by_tau={
                float(tau): numbers_of(JSON_NAME, object_of(by_tau, tau)) for tau in by_tau if TAU_KEY.fullmatch(tau)
            },
            tokens={part: int(tokens) for part, tokens in numbers_of(JSON_NAME, object_of(row, "tokens")).items()},
            student_hook=None if row.get("student_hook") is None else str(row["student_hook"]),
            tried=numbers_of(JSON_NAME, object_of(row, "tried")),
        )


def _budget_key(law: str) -> str:
    """The field of a law's budget."""
    if law == plugins().capacity_laws.default.name:
        return DEFAULT_BUDGET
    return f"{DEFAULT_BUDGET} {law}" if law in FIELDS else law


def _law_of(key: str) -> str:
    """The law whose budget a field holds."""
    return plugins().capacity_laws.default.name if key == DEFAULT_BUDGET else key.removeprefix(f"{DEFAULT_BUDGET} ")


def _with_interval(value: float, interval: Any) -> Estimate:
    ends = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return Estimate(value, *(finite(JSON_NAME, end) for end in ends))


COUNT_LABELS = {
    "kept": "kept by the student",
    "kept_teacher": "in the teacher",
    "kept_random": "with random weights",
    "kept_pca": "in the teacher's leading components",
}
"""Numbers of kept features, and their names on a page."""


def budget_label(law: str) -> str:
    """A law's budget, as a page names it."""
    return "budget d·g(α)" if law == plugins().capacity_laws.default.name else f"budget by the {law} law"
