"""Caveats: what a reader must know before trusting the figures of a measurement, one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import floor_values
from tl_capacity.results.estimate import significant
from tl_capacity.results.naming import told_apart
from tl_capacity.runtime.rounding import whole_below
from tl_capacity.runtime.units import per_token

if TYPE_CHECKING:
    from tl_capacity.results.hook import HookMeasurement

HIGH_FVU = 0.5
"""Above it, the SAE misses half of the variance, and the features in it."""


def measurement_warnings(hooks: Sequence[HookMeasurement], complete: bool = True) -> list[str]:
    """Sentences that a reader must know before trusting the figures of a measurement."""
    sentences, name = [], told_apart(hooks)
    if not complete:
        sentences.append("this measurement is a checkpoint of a run that has not ended; resume it with --resume")
    for hook in hooks:
        s, where = hook.summary, name(hook)
        sentences += hook.notes
        if s.fvu is None:
            unknown = "what the basis leaves out is not known" if hook.is_basis else "a wrong SAE would not be noticed"
            sentences.append(f"{where}: the reconstruction was not checked on any document, so {unknown}")
        elif s.fvu.value > 1:
            sentences.append(
                f"{where}: FVU = {s.fvu.value:.3g}, worse than predicting the mean: {advice_on_fit(hook.is_basis)}"
            )
        elif s.fvu.value > HIGH_FVU:
            sentences.append(
                f"{where}: FVU = {s.fvu.value:.2f}: the {hook.kind} misses half of the variance, and its features"
                " with it"
            )
        if s.n_tokens * s.alive_threshold < 100 and s.alive_threshold > 0:
            fired = int(whole_below(s.n_tokens * s.alive_threshold)) + 1
            precise = int(whole_below(100 / s.alive_threshold))
            sentences.append(
                f"{where}: at {s.n_tokens:,} tokens, alive at rate > {s.alive_threshold:g} means fired on at least"
                f" {fired} of them; about {precise:,} tokens give 10% error at the threshold"
            )
        if hook.is_basis:
            sentences.append(
                f"{where}: a basis has {s.d_sae:,} features because the hook point has {hook.width:,} dimensions, so F"
                " says nothing about the model"
            )
        elif s.n_alive.value > 0.95 * s.d_sae:
            sentences.append(
                f"{where}: {s.n_alive.value:,.0f} of the SAE's {s.d_sae:,} latents are alive: the dictionary bounds F,"
                " and a wider SAE may find more"
            )
        if s.n_alive.low is None:
            sentences.append(f"{where}: too few documents for intervals over them: {s.n_documents:,}")
        if s.dense_latents.value:
            sentences.append(
                f"{where}: latents that fire on more than 1/e of the tokens, outside the sparse regime of g(α):"
                f" {s.dense_latents.value:,.0f}"
            )
    return sentences


def error_warnings(hooks: Iterable[HookMeasurement], widths: Sequence[int], law: str | None = None) -> list[str]:
    """A sentence for widths whose predicted floor is below the SAE's own reconstruction error.

    Such a prediction is about less than the SAE misses.

    Compared in the same unit: E‖x − x̂‖² and the floor by the estimator that says its importances compare with it, both
    squared activations per token. An SAE that normalises each token has its latents in another unit, and then nothing
    is compared.
    """
    measured, registered = tuple(hooks), plugins()
    estimator = next((e for e in registered.importance_estimators if e.compares_with_reconstruction_error), None)
    if estimator is None:
        return []
    sentences, name = [], told_apart(measured)
    importance, chosen = estimator.name.replace("_", "-"), registered.capacity_laws.named(law)
    for hook in measured:
        error = hook.summary.reconstruction_error
        if error is None:
            continue
        if hook.linear is False:
            sentences.append(
                f"{name(hook)}: the SAE's own error is in {estimator.unit} but its floors are not, because its decode"
                " does not add up its decoder vectors (it may normalise each token); so the two are not compared"
            )
            continue
        floors = floor_values(hook, widths, estimator.name, chosen)
        below = [width for width, floor in floors.items() if floor < error.value]
        if below:
            widths_below = ", ".join(f"{width:,}" for width in below)
            listed = f"width{'s' if len(below) > 1 else ''} {widths_below}"
            sentences.append(
                f"{name(hook)}: at {listed} the {importance} floor is below the {hook.kind}'s own error of "
                f"{error.show(significant(error.value, 3))} {per_token(estimator.unit)}: "
                f"what the {hook.kind} misses is larger than what the student is predicted to lose"
            )
    return sentences


def advice_on_fit(basis: bool) -> str:
    """What to ask oneself if a dictionary leaves too much of the variance unexplained."""
    return "keep more coordinates of each token?" if basis else "wrong hook or wrong model?"
