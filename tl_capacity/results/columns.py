"""Each headline figure of a hook point, declared once: its names, format, formula and getter.

The JSON of a measurement, the tables in a terminal, a notebook and the report, the DataFrame and the table of figures
on docs/about-counting.md are all selections of these columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement

Value = Estimate | int | float | Mapping[Any, Any] | None
"""What a column holds; None if it needs a reconstruction that was not checked."""


def as_json(value: Value) -> Any:
    """A value in JSON: an estimate as three numbers, thresholds as short numbers."""
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else f"{key:g}": as_json(entry) for key, entry in value.items()}
    return value


def without_interval(value: Value) -> Any:
    """An estimated count in JSON, as a whole number."""
    return int(value.value) if isinstance(value, Estimate) else value


@dataclass(frozen=True)
class Column:
    """One headline figure: its name in each place, its format, and how to compute it for a hook point.

    Attributes:
        name: its short name, also in a DataFrame.
        value: the figure of a hook point.
        key: its name in a measurement's JSON.
        label: its name where there is room for a formula.
        heading: its name above a column.
        digits: how its numbers are formatted.
        formula, meaning: what docs/about-counting.md says of it.
        to_json: its value in JSON.
    """

    name: str
    value: Callable[[HookMeasurement], Value]
    key: str = ""
    label: str = ""
    heading: str = ""
    digits: str = ""
    formula: str = ""
    meaning: str = ""
    to_json: Callable[[Value], Any] = as_json

    def show(self, hook: HookMeasurement) -> str:
        """The figure of a hook point as text, with its interval where it has one."""
        value = self.value(hook)
        if value is None:
            return "not checked"
        return value.show(self.digits) if isinstance(value, Estimate) else format(value, self.digits)

    def brief(self, hook: HookMeasurement) -> str:
        """The same, without an interval that rounds to the figure itself."""
        value = self.value(hook)
        return value.brief(self.digits) if isinstance(value, Estimate) else self.show(hook)


TOKENS = Column("tokens", lambda hook: hook.summary.n_tokens, key="tokens", label="tokens", digits=",")
DOCUMENTS = Column("documents", lambda hook: hook.summary.n_documents, key="documents", label="documents", digits=",")
MASKED = Column("masked", lambda hook: hook.summary.masked, key="masked")
MASKED_NORM_SHARE = Column(
    "masked norm share", lambda hook: hook.summary.masked_norm_share, key="masked_norm_share", digits=".1%"
)
LATENTS = Column("latents", lambda hook: hook.summary.d_sae, label="latents", heading="latents", digits=",")
ALIVE = Column(
    "F",
    lambda hook: hook.summary.n_alive,
    key="n_alive",
    label="F alive",
    heading="F alive",
    digits=",.0f",
    formula="number of features with firing rate pᵢ > 10⁻⁵",
    meaning=(
        "alive features; their number grows with the tokens read, so F is also given at other thresholds, with "
        "Chao2's estimate of how many can fire at all"
    ),
)
ALIVE_AT = Column("F at thresholds", lambda hook: hook.summary.alive_at, key="alive_at")
CHAO2 = Column(
    "can fire",
    lambda hook: hook.summary.features_chao2,
    key="features_chao2",
    heading="can fire (Chao2)",
    digits=",.0f",
)
L0 = Column(
    "L0",
    lambda hook: hook.summary.l0,
    key="l0",
    label="L0",
    heading="L0",
    digits=",.2f",
    formula="Σᵢ pᵢ",
    meaning="mean number of active features per counted token; active means z ≠ 0",
)
SPARSITY = Column(
    "alpha",
    lambda hook: hook.summary.alpha,
    key="alpha",
    label="α = 1 − L0/F",
    heading="α = 1 − L0/F",
    digits=".4f",
    formula="1 − L0/F",
    meaning="sparsity",
)
CAPACITY = Column(
    "g",
    lambda hook: hook.summary.capacity,
    key="capacity",
    label="g(α) per dimension",
    heading="g(α)",
    digits=",.2f",
    formula="1 / ((1−α) ln(1/(1−α)))",
    meaning="features that one dimension can hold",
)
CRITICAL_WIDTH = Column(
    "d*",
    lambda hook: hook.summary.critical_width,
    key="critical_width",
    label="d* = F/g(α)",
    heading="d* = F/g(α)",
    digits=",.1f",
    formula="F / g(α) = L0 · ln(F/L0)",
    meaning="critical width: the narrowest student that the theory lets keep every feature",
)
HETEROGENEOUS_CRITICAL_WIDTH = Column(
    "d*_het",
    lambda hook: hook.summary.heterogeneous_critical_width,
    key="heterogeneous_critical_width",
    label="d*_het = Σ p ln 1/p",
    heading="d*_het",
    digits=",.1f",
    formula="Σᵢ pᵢ ln(1/pᵢ)",
    meaning=(
        "critical width without the assumption that all features fire equally often; never larger than d*, and "
        "needs no alive threshold"
    ),
)
DENSE_LATENTS = Column(
    "dense latents",
    lambda hook: hook.summary.dense_latents,
    key="dense_latents",
    heading="dense, p > 1/e",
    digits=",.0f",
    to_json=without_interval,
)
FVU = Column(
    "FVU",
    lambda hook: hook.summary.fvu,
    key="fvu",
    label="FVU of the SAE",
    heading="FVU",
    digits=".3f",
    formula="Σ‖x − x̂‖² / Σ‖x − x̄‖²",
    meaning="share of the variance that the SAE leaves unexplained; above 1 the SAE is refused",
)
EXPLAINED_VARIANCE = Column(
    "explained variance",
    lambda hook: hook.summary.explained_variance,
    key="explained_variance",
    label="explained variance",
    digits=".3f",
)

RECORDED = (
    TOKENS,
    DOCUMENTS,
    MASKED,
    MASKED_NORM_SHARE,
    ALIVE,
    ALIVE_AT,
    CHAO2,
    L0,
    SPARSITY,
    CAPACITY,
    CRITICAL_WIDTH,
    HETEROGENEOUS_CRITICAL_WIDTH,
    DENSE_LATENTS,
    FVU,
    EXPLAINED_VARIANCE,
)
"""The figures of each hook point in a measurement's JSON, in order."""


def recorded(hook: HookMeasurement) -> dict[str, Any]:
    """The headline figures of a hook point in JSON. A measurement can be read from them without this package."""
    return {column.key: column.to_json(column.value(hook)) for column in RECORDED}
