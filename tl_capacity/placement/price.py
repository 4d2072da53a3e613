"""Price: what students of one width keep and pay at one weight of the chosen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tl_capacity.results.estimate import Estimate

ESTIMATES = ("chosen", "others", "kl", "paid", "gained", "lost", "per_feature", "probe")
BY_SEED = ("chosen", "others", "kl", "probe")


@dataclass(frozen=True)
class Price:
    """What students of one width keep and pay at one weight.

    Each figure is the mean over their seeds, with a 95% interval over documents.

    Attributes:
        width: d_S.
        weight: of the loss of the chosen features; 0 for students that were trained without.
        seeds: of the students.
        budget: how many features the default capacity law gives the width.
        chosen, others: how many of the chosen and of the other judged features the students keep, as `recover` counts.
        kl: KL(teacher ‖ student) at T = 1 on held-out documents, in nats per token.
        paid: `kl` less that of the students without, of the same width and seeds; None for these.
        gained, lost: chosen features that they keep more, and others that they keep fewer, than the students without.
        per_feature: `paid` / `gained`, in nats per token; None where nothing was gained.
        probe: accuracy of a linear probe of the concept whose features were chosen; None where no concept was named.
        by_seed: the figures in `BY_SEED` of each seed.
    """

    width: int
    weight: float
    seeds: tuple[int, ...]
    budget: float
    chosen: Estimate
    others: Estimate
    kl: Estimate
    paid: Estimate | None = None
    gained: Estimate | None = None
    lost: Estimate | None = None
    per_feature: Estimate | None = None
    probe: Estimate | None = None
    by_seed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The price as a JSON object."""
        estimates = {name: getattr(self, name) for name in ESTIMATES}
        return {
            "width": self.width,
            "weight": self.weight,
            "seeds": list(self.seeds),
            "budget": self.budget,
            **{name: None if each is None else each.to_json() for name, each in estimates.items()},
            "by_seed": {name: list(values) for name, values in self.by_seed.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Price:
        """The price that `to_json` wrote."""
        estimates = {
            name: None if content[name] is None else Estimate(**numbers_of(content[name])) for name in ESTIMATES
        }
        for name in ("chosen", "others", "kl"):
            if estimates[name] is None:
                raise ValueError(f"no {name}")
        return cls(
            width=int(content["width"]),
            weight=float(content["weight"]),
            seeds=tuple(int(seed) for seed in content["seeds"]),
            budget=float(content["budget"]),
            by_seed={name: tuple(map(float, values)) for name, values in content["by_seed"].items()},
            **estimates,  # type: ignore[arg-type]
        )


def numbers_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The three numbers of an estimate."""
    value, low, high = (content[name] for name in ("value", "low", "high"))
    ends = {"low": None if low is None else float(low), "high": None if high is None else float(high)}
    return {"value": float("nan") if value is None else float(value), **ends}
