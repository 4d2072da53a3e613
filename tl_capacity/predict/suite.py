"""Suites: several SAEs of one hook point, and how far d* depends on the dictionary rather than on the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import e
from typing import TYPE_CHECKING

import numpy as np

from tl_capacity.results.columns import ALIVE, CRITICAL_WIDTH, FVU, HETEROGENEOUS_CRITICAL_WIDTH, L0, LATENTS

if TYPE_CHECKING:
    from tl_capacity.results.hook import HookMeasurement

COLUMNS = (
    LATENTS,
    replace(L0, digits=",.1f"),  # SAEs of a suite differ by more than hundredths
    ALIVE,
    replace(CRITICAL_WIDTH, heading=CRITICAL_WIDTH.name),
    HETEROGENEOUS_CRITICAL_WIDTH,
    FVU,
)
"""The figures of each SAE of a suite."""

EQUAL_L0 = 1.05
"""SAEs whose L0s lie within this factor of each other do not show how d* depends on L0."""


@dataclass(frozen=True)
class Suite:
    """The SAEs that were measured at one hook point, by rising L0.

    d* = L0 · ln(F/L0) holds for every dictionary, so d* rises with L0 however good the dictionary is. What is asked is
    only how steeply, and what was paid in reconstruction.
    """

    hook: str
    saes: tuple[HookMeasurement, ...]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """`(L0, d*)` of each SAE in the sparse regime, L0 < F/e. Beyond it, d* falls as more features are active."""
        figures = [(h.summary.l0.value, h.summary.n_alive.value, h.summary.critical_width.value) for h in self.saes]
        return [(l0, width) for l0, alive, width in figures if 0 < l0 < alive / e]

    @property
    def exponent(self) -> float | None:
        """The b of d* ∝ L0^b, by least squares on logarithms; None if the SAEs do not differ in L0."""
        l0, width = np.array(self.curve).reshape(-1, 2).T
        if len(l0) < 2 or l0.max() <= EQUAL_L0 * l0.min():
            return None
        return float(np.polyfit(np.log(l0), np.log(width), 1)[0])

    def statement(self) -> str:
        """How far d* depends on the dictionary, in one sentence."""
        widths = sorted(width for _, width in self.curve)
        if len(widths) < 2:
            sparse = (
                f"{len(widths)} of {len(self.saes)} dictionaries {'is' if len(widths) == 1 else 'are'} sparse (L0 <"
                " F/e)"
            )
            return f"{self.hook}: {sparse}, so they do not show how d* depends on the dictionary"
        low, high = widths[0], widths[-1]
        spread = (
            f"{self.hook}: d* lies between {low:,.1f} and {high:,.1f} ({high / low:.2f}-fold) over {len(widths)}"
            " dictionaries"
        )
        if self.exponent is None:
            return f"{spread} of nearly the same L0: this much comes from other differences between them"
        l0 = [x for x, _ in self.curve]
        return (
            f"{spread} with L0 from {l0[0]:,.1f} to {l0[-1]:,.1f}, about as L0^{self.exponent:.2f}: twice the L0 gives"
            f" {2**self.exponent:.2f} times the d*"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the suite as text."""
        return ["SAE", *(column.heading for column in COLUMNS)], [
            [measured.sae, *(column.show(measured) for column in COLUMNS)] for measured in self.saes
        ]


def suites(hooks: Iterable[HookMeasurement]) -> list[Suite]:
    """A suite for each hook point at which several SAEs were measured."""
    by_hook: dict[str, list[HookMeasurement]] = {}
    for measured in hooks:
        by_hook.setdefault(measured.hook, []).append(measured)
    return [
        Suite(hook, tuple(sorted(several, key=lambda h: h.summary.l0.value)))
        for hook, several in by_hook.items()
        if len(several) > 1
    ]
