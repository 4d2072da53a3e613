"""Budget: the per-layer table of a measurement, with the predicted floors of some student widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.plugins import plugins
from tl_capacity.predict.caveats import _kind, advice_on_fit
from tl_capacity.predict.floors import FloorPrediction, floor_cells, hook_floors
from tl_capacity.predict.laws import features_per_dimension
from tl_capacity.predict.suite import suites
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import told_apart
from tl_capacity.results.summary import Resample
from tl_capacity.show.tables import html_table, plain, table

HOOKS_IN_A_TABLE = 3
"""Columns that fit a terminal; more hook points follow in further tables."""


@dataclass(frozen=True)
class Budget:
    """The per-layer table of a measurement and the floors of some student widths; shows itself in a terminal and in a
    notebook.

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
        """The budget of some hook points; see `Measurement.budget`."""
        for hook in hooks:
            fvu = hook.summary.fvu
            if max_fvu is not None and fvu is not None and fvu.value > max_fvu:
                raise CapacityError(
                    f"the {_kind(hook)} at {hook.hook} leaves FVU = {fvu.value:.3g} of the variance unexplained, more"
                    f" than {max_fvu:g}: {advice_on_fit(hook.is_basis)} (max_fvu=None, or --max-fvu inf, reports the"
                    " budget all the same)"
                )
        chosen = plugins().capacity_laws.named(law)
        name = told_apart(hooks)
        floors = tuple(
            replace(f, hook=name(hook)) for hook in hooks for f in hook_floors(hook, widths, importance, chosen)
        )
        return cls(hooks, floors, chosen.name, warnings)

    def rows(self) -> list[dict[str, Any]]:
        """One object per hook point: every figure an `Estimate` or a number."""
        law = plugins().capacity_laws[self.law]
        rows = []
        for hook in self.hooks:
            s = hook.summary
            rows.append(
                {
                    "hook": hook.hook,
                    "sae": hook.sae,
                    "width": hook.width,
                    "tokens": s.n_tokens,
                    "documents": s.n_documents,
                    "F": s.n_alive,
                    "L0": s.l0,
                    "alpha": s.alpha,
                    "g": s.capacity,
                    "budget": _budget(hook, law),
                    "d*": s.critical_width,
                    "d*_het": s.heterogeneous_critical_width,
                    "FVU": s.fvu,
                    "explained variance": s.explained_variance,
                    "dense latents": s.dense_latents,
                }
            )
        return rows

    def to_frame(self) -> Any:
        """The per-layer table as a pandas DataFrame, each estimate with columns for its interval."""
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
        """A plotly figure of the predicted floors against the student's width; see `report.figures.floors_figure`."""
        from tl_capacity.predict.figures import floors_figure

        return floors_figure(self.floors)

    def cells(self, columns: slice = slice(None)) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the per-layer table as text: a column for each hook point, a row for each figure."""
        rows, names = self.rows()[columns], list(map(told_apart(self.hooks), self.hooks))[columns]
        lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("tokens (documents)", lambda r: f"{r['tokens']:,} ({r['documents']:,})"),
            ("F alive", lambda r: r["F"].show(",.0f")),
            ("L0", lambda r: r["L0"].show(",.2f")),
            ("α = 1 − L0/F", lambda r: r["alpha"].show(".4f")),
            ("g(α) per dimension", lambda r: r["g"].show(",.2f")),
            (
                "budget d·g(α)" if plugins().capacity_laws[self.law].is_default else f"budget, {self.law}",
                lambda r: r["budget"].show(",.0f"),
            ),
            ("d* = F/g(α)", lambda r: r["d*"].show(",.1f")),
            ("d*_het = Σ p ln 1/p", lambda r: r["d*_het"].show(",.1f")),
            ("FVU of the SAE", lambda r: "not checked" if r["FVU"] is None else r["FVU"].show(".3f")),
            (
                "explained variance",
                lambda r: "not checked" if r["FVU"] is None else r["explained variance"].show(".3f"),
            ),
        ]
        return ["", *(f"{name} (d={r['width']:,})" for name, r in zip(names, rows, strict=True))], [
            [label, *(show(r) for r in rows)] for label, show in lines
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
        for warning in self.notes():
            yield f"[yellow]note:[/yellow] {plain(warning)}"

    def _repr_html_(self) -> str:
        parts = [html_table(*self.cells()), *(html_table(*suite.cells()) for suite in suites(self.hooks))]
        if self.floors:
            parts.append(html_table(*floor_cells(self.floors)))
        parts += [f"<p>note: {escape(w)}</p>" for w in self.notes()]
        return "".join(parts)

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        caveat = plugins().capacity_laws[self.law].caveat
        return (
            [suite.statement() for suite in suites(self.hooks)]
            + list(self.warnings)
            + ([f"{self.law}: {caveat}"] if caveat else [])
        )

    def __repr__(self) -> str:
        return f"Budget({', '.join(h.hook for h in self.hooks)}; law {self.law}, {len(self.floors)} floors)"


def _budget(hook: HookMeasurement, law: CapacityLaw) -> Estimate:
    """d·ĝ(α) of a hook point; importances are taken from the default estimator, for laws that depend on them."""
    s, values = hook.summary, hook.importance()

    def budget_of(sums: Resample) -> list[float]:
        alpha = s.sparsity_of(sums)
        return [hook.width * features_per_dimension(law, alpha, values) if 0 < alpha < 1 else float("nan")]

    return s.estimates(budget_of)[0]
