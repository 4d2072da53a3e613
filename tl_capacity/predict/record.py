"""The record of predictions in nats: how far each method was from what students reached, where it was checked.

The numbers are data of the package, record.json, which docs/write_record.py writes from docs/results/splice.json and
the runs that its page names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from tl_capacity.errors import MeasurementError

JSON_NAME = "record.json"
SCHEMA = 1


@dataclass(frozen=True)
class Check:
    """One prediction in nats per token, with what students reached.

    Attributes:
        predictor: the floor predictor.
        importance, law: by which it ranked features and said how many a width keeps; empty where it did neither.
        teacher, teacher_width, hook, sae: what it was made from.
        width: d_S.
        predicted: in nats per token.
        observed: the mean over students of that width of the last tenth of their training, in nats per token.
    """

    predictor: str
    importance: str
    law: str
    teacher: str
    teacher_width: int
    hook: str
    sae: str
    width: int
    predicted: float
    observed: float

    @property
    def method(self) -> tuple[str, str, str]:
        """Predictor, importance and law."""
        return self.predictor, self.importance, self.law


@dataclass(frozen=True)
class Record:
    """All checks of one method.

    Attributes:
        low, high: the smallest and the largest number of times that students reached what was predicted.
        median: of those numbers.
    """

    checks: tuple[Check, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Observed over predicted loss, for each check."""
        return tuple(check.observed / check.predicted for check in self.checks)

    @property
    def low(self) -> float:
        return min(self.ratios)

    @property
    def median(self) -> float:
        return float(np.median(self.ratios))

    @property
    def high(self) -> float:
        return max(self.ratios)

    def sentence(self) -> str:
        """How far off the method was, and where it was checked."""
        return (
            f"students reached {self.low:.2g} to {self.high:.2g} times its floor (median {self.median:.2g})"
            f" ({self.where()})"
        )

    def where(self) -> str:
        """The teachers, dictionaries and widths of the checks."""
        teachers = dict.fromkeys(check.teacher for check in self.checks)
        dictionaries = {(check.teacher, check.hook, check.sae) for check in self.checks if check.sae}
        widths = sorted({check.width for check in self.checks})
        counted = f"{len(dictionaries)} {'dictionary' if len(dictionaries) == 1 else 'dictionaries'}, "
        between = f"width {widths[0]:,}" if len(widths) == 1 else f"widths {widths[0]:,} to {widths[-1]:,}"
        return f"{' and '.join(teachers)}: {counted if dictionaries else ''}{between}"


def record_of(predictor: str, importance: str = "", law: str = "") -> Record | None:
    """How far one method was off; None if it was never checked."""
    mine = tuple(check for check in all_checks() if check.method == (predictor, importance, law))
    return Record(mine) if mine else None


def records(methods: Iterable[tuple[str, str, str]]) -> list[str]:
    """A sentence on how far off each method was, for methods that were ever checked.

    Args:
        methods: predictor, importance and law of each.
    """
    found = {method: record_of(*method) for method in methods}
    return [
        f"{predictor} of {importance}, {law}: where it was checked, {record.sentence()}"
        for (predictor, importance, law), record in found.items()
        if record is not None
    ]


@lru_cache(maxsize=1)
def all_checks() -> tuple[Check, ...]:
    """Every check that the package has on record."""
    import json

    content = json.loads((files("tl_capacity.predict") / JSON_NAME).read_text(encoding="utf-8"))
    if content["schema"] != SCHEMA:
        raise MeasurementError(f"{JSON_NAME} of the package has schema {content['schema']!r}: reinstall tl-capacity")
    return checks_from(content["checks"])


def checks_from(rows: Iterable[Mapping[str, Any]]) -> tuple[Check, ...]:
    """Checks from the rows of a file, without those that predicted or observed nothing.

    No factor leads from or to zero.
    """
    checks = (Check(**row) for row in rows)
    return tuple(check for check in checks if check.predicted > 0 and check.observed > 0)
