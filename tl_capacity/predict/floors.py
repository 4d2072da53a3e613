"""Predicted loss floors and the per-layer budget table, from a measurement or from a bare
published importance curve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import floor, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import CapacityError, MeasurementError, PluginError, plugin_code
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.measurement.measurement import advice_on_fit
from tl_capacity.plugins import plugins
from tl_capacity.predict.suite import suites
from tl_capacity.results.summary import Estimate, Resample, significant
from tl_capacity.runtime.checks import checked

if TYPE_CHECKING:
    from rich.table import Table

    from tl_capacity.measurement.measurement import HookMeasurement, Measurement

HOOKS_IN_A_TABLE = 3
"""Columns that fit a terminal; more hook points follow in further tables."""


@dataclass(frozen=True)
class FloorPrediction:
    """The loss that a student of one width cannot avoid, according to one capacity law and importance estimator.

    Attributes:
        hook: the hook point that was measured, or the curve's name; where several SAEs were measured there, the SAE's
            name as well.
        width: d_S.
        features_kept, features_lost: F_S and F − F_S.
        kept_share: F_S / F.
        predicted_floor: Σ of the lost features' importance, in `unit` per token.
        naive_floor: the same with every feature equally important.
        share: predicted floor / L_∞, the loss of keeping nothing.
    """

    hook: str
    width: int
    features_kept: Estimate
    features_lost: Estimate
    kept_share: Estimate
    predicted_floor: Estimate
    naive_floor: Estimate
    share: Estimate
    unit: str
    importance: str
    law: str
    caveat: str = ""

    def to_json(self) -> dict[str, Any]:
        """A flat object, as `tl-capacity floor --json` prints it."""
        return {
            "hook": self.hook,
            "width": self.width,
            "features_kept": int(self.features_kept.value),
            "kept_low": self.features_kept.low,
            "kept_high": self.features_kept.high,
            "features_lost": int(self.features_lost.value),
            "lost_low": self.features_lost.low,
            "lost_high": self.features_lost.high,
            "predicted_floor": self.predicted_floor.value,
            "predicted_low": self.predicted_floor.low,
            "predicted_high": self.predicted_floor.high,
            "naive_floor": self.naive_floor.value,
            "naive_low": self.naive_floor.low,
            "naive_high": self.naive_floor.high,
            "share_of_total": self.share.value,
            "share_low": self.share.low,
            "share_high": self.share.high,
            "unit": self.unit,
            "importance": self.importance,
            "law": self.law,
            "caveat": self.caveat,
        }


@dataclass(frozen=True)
class Curve:
    """A bare importance curve, as published: sorted importances of the alive features, and their sparsity."""

    name: str
    importance: NDArray[np.float64]
    alpha: float

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Curve:
        """Read `{"sorted_importance": […], "alpha": …}`; where it also gives `F_alive`, the two must agree.

        Raises:
            MeasurementError: where the file is no such curve.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            importance, alpha = np.asarray(content["sorted_importance"], dtype=np.float64), float(content["alpha"])
            theory.refined_floor(importance, 0, alpha)  # raises where these are no importances or no sparsity
        except OSError as problem:
            raise MeasurementError(
                f"{path} cannot be read ({problem.strerror}): pass a measurement folder or a curve's JSON file"
            ) from problem
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as problem:
            raise MeasurementError(
                f"{path} is no importance curve ({problem}): it needs `sorted_importance`, a list of numbers, and"
                " `alpha`"
            ) from problem
        if content.get("F_alive", len(importance)) != len(importance):
            raise MeasurementError(
                f"{path} says F_alive = {content['F_alive']} but lists {len(importance)} importances: it is truncated"
                " or altered"
            )
        layer = content.get("layer")
        return cls(f"layer {layer}" if layer is not None else Path(path).stem, importance, alpha)

    def floors(self, widths: Sequence[int], law: str = "compressed_sensing") -> list[FloorPrediction]:
        """Predicted floors, without intervals: a bare curve does not say how uncertain it is."""
        chosen = plugins().capacity_laws[law]
        figures = map(Estimate, _floor_figures(self.importance, self.alpha, _checked(widths), chosen))
        return _predictions(self.name, widths, list(figures), "as published", "", chosen)


@dataclass(frozen=True)
class Budget:
    """The per-layer table of a measurement and the floors of some student widths; shows itself in a terminal and in a
    notebook.
    """

    measurement: Measurement
    floors: tuple[FloorPrediction, ...]
    law: str

    @classmethod
    def of(
        cls, measurement: Measurement, widths: tuple[int, ...], importance: str, law: str, max_fvu: float | None
    ) -> Budget:
        """See `Measurement.budget`."""
        for hook in measurement:
            fvu = hook.summary.fvu
            if max_fvu is not None and fvu is not None and fvu.value > max_fvu:
                raise CapacityError(
                    f"the {_kind(hook)} at {hook.hook} leaves FVU = {fvu.value:.3g} of the variance unexplained, more"
                    f" than {max_fvu:g}: {advice_on_fit(hook.is_basis)} (max_fvu=None, or --max-fvu inf, reports the"
                    " budget all the same)"
                )
        chosen = plugins().capacity_laws[law]
        name = _told_apart(measurement)
        floors = tuple(
            replace(f, hook=name(hook)) for hook in measurement for f in hook_floors(hook, widths, importance, chosen)
        )
        return cls(measurement, floors, law)

    def rows(self) -> list[dict[str, Any]]:
        """One object per hook point: every figure an `Estimate` or a number."""
        law = plugins().capacity_laws[self.law]
        rows = []
        for hook in self.measurement:
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
        from tl_capacity.report.figures import floors_figure

        return floors_figure(self.floors)

    def cells(self, hooks: slice = slice(None)) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the per-layer table as text: a column for each hook point, a row for each figure."""
        rows, names = self.rows()[hooks], list(map(_told_apart(self.measurement), self.measurement))[hooks]
        lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("tokens (documents)", lambda r: f"{r['tokens']:,} ({r['documents']:,})"),
            ("F alive", lambda r: r["F"].show(",.0f")),
            ("L0", lambda r: r["L0"].show(",.2f")),
            ("α = 1 − L0/F", lambda r: r["alpha"].show(".4f")),
            ("g(α) per dimension", lambda r: r["g"].show(",.2f")),
            (
                "budget d·g(α)" if self.law == "compressed_sensing" else f"budget, {self.law}",
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
        for first_hook in range(0, len(self.measurement.hooks), HOOKS_IN_A_TABLE):
            yield table(
                "Feature capacity [95% interval over documents]",
                *self.cells(slice(first_hook, first_hook + HOOKS_IN_A_TABLE)),
            )
        for suite in suites(self.measurement):
            yield table(f"d* over the dictionaries at {suite.hook}", *suite.cells())
        if self.floors:
            first = self.floors[0]
            yield table(f"Predicted floors: importance {first.importance}, law {first.law}", *floor_cells(self.floors))
        for warning in self.notes():
            yield f"[yellow]note:[/yellow] {plain(warning)}"

    def _repr_html_(self) -> str:
        parts = [html_table(*self.cells()), *(html_table(*suite.cells()) for suite in suites(self.measurement))]
        if self.floors:
            parts.append(html_table(*floor_cells(self.floors)))
        parts += [f"<p>note: {escape(w)}</p>" for w in self.notes()]
        return "".join(parts)

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        caveat = plugins().capacity_laws[self.law].caveat
        return (
            [suite.statement() for suite in suites(self.measurement)]
            + self.measurement.warnings
            + ([f"{self.law}: {caveat}"] if caveat else [])
        )

    def __repr__(self) -> str:
        return f"Budget({', '.join(h.hook for h in self.measurement)}; law {self.law}, {len(self.floors)} floors)"


def floor_cells(floors: Sequence[FloorPrediction]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of predicted floors, as text."""
    unit = f" ({floors[0].unit} per token)" if floors and floors[0].unit else ""
    return ["hook", "width", "kept", "lost", f"predicted floor{unit}", "share of total"], [
        [
            f.hook,
            f"{f.width:,}",
            f"{f.features_kept.value:,.0f}",
            f"{f.features_lost.value:,.0f}",
            f.predicted_floor.show(".4g"),
            f"{100 * f.share.value:.3g}%",
        ]
        for f in floors
    ]


def hook_floors(
    hook: HookMeasurement, widths: Sequence[int], importance: str, law: CapacityLaw
) -> list[FloorPrediction]:
    """Predicted floors of one hook point, every figure with its document-bootstrap interval."""
    if not _checked(widths):
        return []
    estimates = resampled(hook, importance, lambda values, alpha: _floor_figures(values, alpha, widths, law))
    return _predictions(hook.hook, widths, estimates, importance, str(hook.estimator(importance).unit), law)


def sparsity(hook: HookMeasurement) -> float:
    """α of a hook point.

    Raises:
        CapacityError: where none is defined, with no feature alive or all of them always active.
    """
    s = hook.summary
    if not 0 < s.alpha.value < 1:
        raise CapacityError(
            f"{hook.hook} has {int(s.n_alive.value)} alive features at L0 = {s.l0.value:.3g}, for which no sparsity is"
            f" defined: count more tokens, or keep the largest coordinates of a basis, as in pca:{hook.hook},k=24"
        )
    return s.alpha.value


def resampled(
    hook: HookMeasurement, importance: str, statistic: Callable[[NDArray[np.float64], float], Sequence[float]]
) -> list[Estimate]:
    """Figures that follow from the alive features' importances [feature] and their sparsity, with intervals over
    documents.

    Raises:
        CapacityError: where the hook point has no sparsity.
    """
    estimator, s = hook.estimator(importance), hook.summary
    size = len(statistic(hook.importance(importance), sparsity(hook)))

    def of(sums: Resample) -> Sequence[float]:
        alpha = s.sparsity_of(sums)
        if not 0 < alpha < 1:
            return [float("nan")] * size
        return statistic(sums.importance(estimator.compute, importance)[sums.rates > s.alive_threshold], alpha)

    return s.estimates(of)


def measurement_warnings(measurement: Measurement) -> list[str]:
    """What a reader must know before trusting the figures of a measurement."""
    found, name = [], _told_apart(measurement)
    if not measurement.complete:
        found.append("this measurement is a checkpoint of a run that has not ended; resume it with --resume")
    for hook in measurement:
        s, where = hook.summary, name(hook)
        if s.fvu is None:
            unknown = "what the basis leaves out is not known" if hook.is_basis else "a wrong SAE would not be noticed"
            found.append(f"{where}: the reconstruction was not checked on any document, so {unknown}")
        elif s.fvu.value > 1:
            found.append(
                f"{where}: FVU = {s.fvu.value:.3g}, worse than predicting the mean: {advice_on_fit(hook.is_basis)}"
            )
        elif s.fvu.value > 0.5:
            found.append(
                f"{where}: FVU = {s.fvu.value:.2f}: the {_kind(hook)} misses half of the variance, and its features"
                " with it"
            )
        if s.n_tokens * s.alive_threshold < 100 and s.alive_threshold > 0:
            fired = max(1, int(s.n_tokens * s.alive_threshold) + 1)
            found.append(
                f"{where}: at {s.n_tokens:,} tokens, alive at rate > {s.alive_threshold:g} means fired on at least"
                f" {fired} of them; about {int(100 / s.alive_threshold):,} tokens give 10% error at the threshold"
            )
        if hook.is_basis:
            found.append(
                f"{where}: a basis has {s.d_sae:,} features because the hook point has {hook.width:,} dimensions, so F"
                " says nothing of the model"
            )
        elif s.n_alive.value > 0.95 * s.d_sae:
            found.append(
                f"{where}: {s.n_alive.value:,.0f} of the SAE's {s.d_sae:,} latents are alive: the dictionary bounds F,"
                " and a wider SAE may find more"
            )
        if s.n_alive.low is None:
            found.append(f"{where}: too few documents for intervals over them: {s.n_documents}")
        if s.dense_latents.value:
            found.append(
                f"{where}: latents that fire on more than 1/e of the tokens, outside the sparse regime of g(α):"
                f" {s.dense_latents.value:,.0f}"
            )
    return found


def error_warnings(measurement: Measurement, widths: Sequence[int], law: str = "compressed_sensing") -> list[str]:
    """Widths whose predicted floor lies below the SAE's own reconstruction error, so that the prediction is of what the
    SAE does not even see.

    Compared in the same unit: the decoder-weighted floor and E‖x − x̂‖², both squared activations per token.
    """
    found, name = [], _told_apart(measurement)
    for hook in measurement:
        error = hook.summary.reconstruction_error
        if error is None:
            continue
        below = [
            f
            for f in hook_floors(hook, widths, "decoder_weighted", plugins().capacity_laws[law])
            if f.predicted_floor.value < error.value
        ]
        if below:
            listed = ", ".join(f"{f.width:,}" for f in below)
            found.append(
                f"{name(hook)}: at width {listed} the decoder-weighted floor is below the {_kind(hook)}'s own error of "
                f"{error.show(significant(error.value, 3))} activation² per token: "
                f"what the {_kind(hook)} misses is larger than what the student is predicted to lose"
            )
    return found


def table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], right: bool = True) -> Table:
    """A rich table, with all columns but the first to the right where they hold figures."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        shown.add_column(Text(name), justify="right" if right and i else "left", overflow="fold")
    for row in body:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def features_per_dimension(law: CapacityLaw, alpha: float, importance: NDArray[np.float64]) -> float:
    """ĝ for sparsity `alpha` and the alive features' importances [feature], by some law.

    Raises:
        PluginError: where the law fails, or gives no finite number above 0.
    """
    with plugin_code("capacity law", law.name, law):
        found = float(law.features_per_dimension(alpha, importance))
    if not (isfinite(found) and found > 0):
        raise PluginError(
            f"the capacity law {law.name!r} gives {found:g} features per dimension, but a finite number above 0 is"
            " needed: mend it"
        )
    return found


def kept_features(values: NDArray[np.float64], alpha: float, width: int, law: CapacityLaw) -> int:
    """F_S = min(⌊d_S · ĝ(α)⌋, F) of the alive features' importances [feature], by some law."""
    return min(floor(width * features_per_dimension(law, alpha, values)), len(values))


def _floor_figures(values: NDArray[np.float64], alpha: float, widths: Sequence[int], law: CapacityLaw) -> list[float]:
    """For each width in turn what a `FloorPrediction` says, in its order: features kept and lost, the share kept,
    refined and naive floor, the share lost.
    """
    features, total = len(values), float(values.sum())
    budgets = np.array(widths) * features_per_dimension(law, alpha, values)
    kept = np.minimum(np.floor(budgets), features).astype(np.int64)
    refined = theory.lost_importance(values, kept)
    naive = total * np.maximum(0.0, 1 - budgets / max(features, 1))
    shares = refined / total if total else np.zeros(len(kept))
    return list(np.stack([kept, features - kept, kept / max(features, 1), refined, naive, shares], 1).ravel())


def _predictions(
    hook: str, widths: Sequence[int], figures: Sequence[Estimate], importance: str, unit: str, law: CapacityLaw
) -> list[FloorPrediction]:
    """What `_floor_figures` found, with or without intervals."""
    found, of = [], iter(figures)
    for width in widths:
        kept, lost, kept_share, refined, naive, share = (next(of) for _ in range(6))
        found.append(
            FloorPrediction(
                hook=hook,
                width=width,
                features_kept=kept.within(0.0),
                features_lost=lost.within(0.0),
                kept_share=kept_share.within(0.0, 1.0),
                predicted_floor=refined.within(0.0),
                naive_floor=naive.within(0.0),
                share=share.within(0.0, 1.0),
                unit=unit,
                importance=importance,
                law=law.name,
                caveat=law.caveat,
            )
        )
    return found


def _budget(hook: HookMeasurement, law: CapacityLaw) -> Estimate:
    """d·ĝ(α) of a hook point; importances are taken from the paper's estimator, for laws that depend on them."""
    s, values = hook.summary, hook.importance()

    def budget_of(sums: Resample) -> list[float]:
        alpha = s.sparsity_of(sums)
        return [hook.width * features_per_dimension(law, alpha, values) if 0 < alpha < 1 else float("nan")]

    return s.estimates(budget_of)[0]


def _kind(hook: HookMeasurement) -> str:
    return "basis" if hook.is_basis else "SAE"


def _told_apart(measurement: Measurement) -> Callable[[HookMeasurement], str]:
    """Names a hook point, and the SAE as well where several were measured there."""
    several = {suite.hook for suite in suites(measurement)}

    def name(hook: HookMeasurement) -> str:
        if hook.hook not in several:
            return hook.hook
        return hook.sae if hook.hook in hook.sae else f"{hook.hook}, {hook.sae}"

    return name


def _checked(widths: Sequence[int]) -> Sequence[int]:
    for width in widths:
        if width < 1:
            raise CapacityError(f"width {width} is no student width: pass whole numbers of at least 1")
    return widths


def html_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for a notebook, every cell escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        f"<table><thead>{line('th', header)}</thead><tbody>{''.join(line('td', row) for row in body)}</tbody></table>"
    )


def plain(text: str) -> str:
    """Text for a terminal, in which no bracket is markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)
