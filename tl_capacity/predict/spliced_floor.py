"""SplicedFloor: the floor of one width in nats per token, read from the curve of the spliced teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.results.naming import places_told_apart
from tl_capacity.runtime.units import NATS

PREDICTOR = "splice"
"""Name of these floors beside those of other predictors."""


@dataclass(frozen=True)
class SplicedFloor:
    """The floor of one width by one capacity law, in nats per token. Nothing of it is fitted to students.

    Attributes:
        hook, sae, order: of the curve that it was read from.
        law: the capacity law that says how many features the width keeps.
        width: d_S.
        features_kept, alive: F_S and F.
        floor: KL(teacher ‖ teacher with those features only), with its interval over documents.
    """

    hook: str
    sae: str
    order: str
    law: str
    width: int
    features_kept: int
    alive: int
    floor: Estimate

    @property
    def key(self) -> tuple[str, str, str]:
        """The method behind it: predictor, importance and law."""
        return PREDICTOR, self.order, self.law

    def to_json(self) -> dict[str, Any]:
        """The floor as a flat JSON object."""
        return {
            "predictor": PREDICTOR,
            "hook": self.hook,
            "sae": self.sae,
            "order": self.order,
            "law": self.law,
            "width": self.width,
            "features_kept": self.features_kept,
            "features_lost": self.alive - self.features_kept,
            "predicted_floor": self.floor.value,
            "predicted_low": self.floor.low,
            "predicted_high": self.floor.high,
            "unit": NATS,
        }


def floor_cells(floors: Sequence[SplicedFloor]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of floors, as text."""
    name = places_told_apart((f.hook, f.sae) for f in floors)
    return ["hook", "order", "law", "width", "kept", f"floor ({NATS})"], [
        [
            name(f.hook, f.sae),
            f.order,
            f.law,
            f"{f.width:,}",
            f"{f.features_kept:,}",
            f.floor.show(significant(f.floor.value)),
        ]
        for f in floors
    ]


def kept_whole(floors: Iterable[SplicedFloor]) -> list[str]:
    """A sentence for each hook point and order, on widths that keep every feature by one law.

    The floor of these widths is what the dictionary's own reconstruction costs.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    said = list(floors)
    name = places_told_apart((floor.hook, floor.sae) for floor in said)
    for floor in said:
        widths = groups.setdefault((name(floor.hook, floor.sae), floor.order, floor.law), [])
        if floor.features_kept == floor.alive:
            widths.append(floor.width)
    notes = [
        f"{where}: by {law} every feature fits into width {', '.join(f'{width:,}' for width in sorted(widths))}, so the"
        " floor there is the dictionary's own error"
        for (where, _, law), widths in groups.items()
        if widths
    ]
    return list(dict.fromkeys(notes))
