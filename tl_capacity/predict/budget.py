"""Budget: the per-layer table of a measurement, with the predicted floors of some student widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.plugins import plugins
from tl_capacity.predict.caveats import advice_on_fit
from tl_capacity.predict.floors import FloorPrediction, floor_cells, hook_floors
from tl_capacity.predict.laws import budgets, context_at
from tl_capacity.predict.suite import suites
from tl_capacity.results.columns import (
    ALIVE,
    CAPACITY,
    CRITICAL_WIDTH,
    DENSE_LATENTS,
    DOCUMENTS,
    EXPLAINED_VARIANCE,
    FVU,
    HETEROGENEOUS_CRITICAL_WIDTH,
    L0,
    SPARSITY,
    TOKENS,
    Column,
)
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import told_apart
from tl_capacity.results.summary import Resample
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, table, terminal_notes

HOOKS_IN_A_TABLE = 3
"""Hook points that fit in a table on a terminal; more of them get further tables."""


@dataclass(frozen=True)
class Budget(ShownInNotebooks):
    """The per-layer table of a measurement, with the floors of some student widths.

    It shows itself in a terminal and in a notebook.

    Attributes:
        hooks: what was measured, a row of the table each.
        floors: the predicted floors of every hook point and width.
        law: the capacity law that both rest on.
        warnings: what a reader must know of the measurement itself.
    """

    hooks: tuple[HookMeasurement, ...]
    floors: tuple[FloorPrediction, ...]
    law: str
    warnings: Sequence[str] = ()

    @classmethod
    def predict(
        cls,
        hooks: tuple[HookMeasurement, ...],
        widths: tuple[int, ...],
        importance: str | None,
        law: str | None,
        max_fvu: float | None,
        warnings: Sequence[str] = (),
    ) -> Budget:
        """The budget at some hook points; see `Measurement.budget`."""
        if max_fvu is not None and isnan(max_fvu):
            raise CapacityError("max_fvu = nan refuses nothing: give a number, or inf to accept any fit")
        for hook in hooks:
            fvu = hook.summary.fvu
            if max_fvu is not None and fvu is not None and fvu.value > max_fvu:
                raise CapacityError(
                    f"the {hook.kind} at {hook.hook} leaves FVU = {fvu.value:.3g} of the variance unexplained, more"
                    f" than {max_fvu:g}: {advice_on_fit(hook.is_basis)} (max_fvu=None, or --max-fvu inf, reports the"
                    " budget anyway)"
                )
        chosen = plugins().capacity_laws.named(law)
        name = told_apart(hooks)
        floors = tuple(
            replace(f, hook=name(hook)) for hook in hooks for f in hook_floors(hook, widths, importance, chosen)
        )
        return cls(hooks, floors, chosen.name, warnings)

    def rows(self) -> list[dict[str, Any]]:
        """One object per hook point. Every figure is an `Estimate` or a number."""
        columns = frame_columns(self.chosen_law)
        return [
            {"hook": hook.hook, "sae": hook.sae, "width": hook.width, **{c.name: c.value(hook) for c in columns}}
            for hook in self.hooks
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """The rows, as `tl-capacity budget --json` prints them."""
        return [{k: v.to_json() if isinstance(v, Estimate) else v for k, v in row.items()} for row in self.rows()]

    @property
    def chosen_law(self) -> CapacityLaw:
        """The registered law that `law` names."""
        return plugins().capacity_laws[self.law]

    def to_frame(self) -> Any:
        """The per-layer table as a pandas DataFrame. Each estimate has columns for its interval."""
        import pandas

        flat = []
        for row in self.rows():
            cells: dict[str, Any] = {}
            for key, value in row.items():
                if isinstance(value, Estimate):
                    cells |= {key: value.value, f"{key} low": value.low, f"{key} high": value.high}
                else:
                    cells[key] = value
            flat.append(cells)
        return pandas.DataFrame(flat)

    def floors_frame(self) -> Any:
        """The predicted floors as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame([f.to_json() for f in self.floors])

    def plot(self) -> Any:
        """A plotly figure of the predicted floors against the student's width; see `predict.figures.floors_figure`."""
        from tl_capacity.predict.figures import floors_figure

        return floors_figure(self.floors)

    def cells(self, part: slice = slice(None)) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the per-layer table as text: one column for each hook point, one row for each figure."""
        hooks, name = self.hooks[part], told_apart(self.hooks)
        counted = [f"{TOKENS.show(hook)} ({DOCUMENTS.show(hook)})" for hook in hooks]
        return ["", *(f"{name(hook)} (d={hook.width:,})" for hook in hooks)], [
            [f"{TOKENS.label} ({DOCUMENTS.label})", *counted],
            *([row.label, *map(row.show, hooks)] for row in table_columns(self.chosen_law)),
        ]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        for first_hook in range(0, len(self.hooks), HOOKS_IN_A_TABLE):
            yield table(
                "Feature capacity [95% interval over documents]",
                *self.cells(slice(first_hook, first_hook + HOOKS_IN_A_TABLE)),
            )
        for suite in suites(self.hooks):
            yield table(f"d* over the dictionaries at {suite.hook}", *suite.cells())
        if self.floors:
            first = self.floors[0]
            yield table(f"Predicted floors: importance {first.importance}, law {first.law}", *floor_cells(self.floors))
        yield from terminal_notes(self.notes())

    def _repr_html_(self) -> str:
        parts = [html_table(*self.cells()), *(html_table(*suite.cells()) for suite in suites(self.hooks))]
        if self.floors:
            parts.append(html_table(*floor_cells(self.floors)))
        parts.append(html_notes(self.notes()))
        return "".join(parts)

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        caveat = self.chosen_law.caveat
        return (
            [suite.statement() for suite in suites(self.hooks)]
            + list(self.warnings)
            + ([f"{self.law}: {caveat}"] if caveat else [])
        )

    def __repr__(self) -> str:
        return f"Budget({', '.join(h.hook for h in self.hooks)}; law {self.law}, {len(self.floors):,} floors)"


def budget_column(law: CapacityLaw) -> Column:
    """The column of the number of features that a hook point's width holds, d·ĝ(α), by one law."""
    return Column(
        "budget",
        lambda hook: budget_estimate(hook, law),
        label="budget d·g(α)" if law is plugins().capacity_laws.default else f"budget, {law.name}",
        heading="budget d·ĝ",
        digits=",.0f",
        formula="d · g(α)",
        meaning="features that the hook point's width d can hold",
    )


def table_columns(law: CapacityLaw) -> tuple[Column, ...]:
    """The figures of the per-layer table, below the tokens."""
    return (
        ALIVE,
        L0,
        SPARSITY,
        CAPACITY,
        budget_column(law),
        CRITICAL_WIDTH,
        HETEROGENEOUS_CRITICAL_WIDTH,
        FVU,
        EXPLAINED_VARIANCE,
    )


def frame_columns(law: CapacityLaw) -> tuple[Column, ...]:
    """The figures of the DataFrame, after the hook point, its SAE and its width."""
    return (TOKENS, DOCUMENTS, *table_columns(law), DENSE_LATENTS)


def budget_estimate(hook: HookMeasurement, law: CapacityLaw) -> Estimate:
    """d·ĝ(α) of a hook point. Laws that need importances get those of the default estimator."""
    s, values = hook.summary, hook.importance()

    def budget_of(sums: Resample) -> list[float]:
        alpha = s.sparsity_of(sums)
        if not 0 < alpha < 1:
            return [float("nan")]
        return [float(held) for held in budgets(law, [hook.width], context_at(hook, values, alpha))]

    return s.estimates(budget_of)[0]
