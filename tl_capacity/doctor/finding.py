"""What one check found, and a way to turn a refusal into such a finding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tl_capacity.errors import CapacityError

OK, CHANGE, STOP = "ok", "change", "stop"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was checked.
        level: `ok`; `change`, where a run would work but another setting would serve better; `stop`, where it would
            fail or mean nothing.
        says: the figures, and what to change.
    """

    check: str
    level: str
    says: str

    def to_json(self) -> dict[str, str]:
        """A flat object, as `tl-capacity doctor --json` prints it."""
        return {"check": self.check, "level": self.level, "says": self.says}


@contextmanager
def refusal_found(check: str, findings: list[Finding]) -> Iterator[None]:
    """A `CapacityError` ends the block, and is appended to the findings."""
    try:
        yield
    except CapacityError as problem:
        findings.append(Finding(check, STOP, str(problem)))
