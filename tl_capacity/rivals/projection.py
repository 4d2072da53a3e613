"""pca_splice: what a teacher loses, in nats, when only the leading principal components of its activations pass a hook
point.

`pca_tail` is the variance that is lost there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tl_capacity.dictionaries.bases import PCA_TOKENS
from tl_capacity.dictionaries.moments import Moments, principal_components
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.models.forward import activations_at, check_token_ids, device_of, evaluating
from tl_capacity.models.head import check_head, head_of
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.models.hooks import Change
from tl_capacity.predict.floors import checked_widths
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.results.estimate import Estimate, group_means
from tl_capacity.rivals.text import heldout_text, interval_notes, predicted_tokens
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.versions import library_versions
from tl_capacity.splicing.running import (
    TOKENS_AT_ONCE,
    DivergenceSums,
    RowsOfText,
    check_finite_activations,
    hidden_states,
    rows_at_once,
    rows_of,
    variant_divergences,
)
from tl_capacity.text.counting import CountedTokens, CountingRule
from tl_capacity.text.streams import as_batches, source_of

PCA_SPLICE, PCA_TAIL = "pca_splice", "pca_tail"
VARIANCE = "activation²"


@dataclass(frozen=True)
class Spectrum:
    """Principal components of the activations at a hook point.

    Attributes:
        point: the hook point.
        mean: μ.
        variances: λ, falling.
        components: directions of norm 1.
    """

    point: TapPoint
    mean: Float64[Tensor, " width"]
    variances: Float64[Tensor, " component"]
    components: Float64[Tensor, "component width"]

    def tail(self, width: int) -> float:
        """Σ_{j>d} λ_j, the variance outside the `width` leading components."""
        return float(self.variances[width:].sum())

    def projected(self, x: Float[Tensor, "token width"], width: int) -> Float[Tensor, "token width"]:
        """μ + U_d U_dᵀ (x − μ) in float32, of activations of any dtype."""
        mean, kept = self.mean.float().to(x.device), self.components[:width].float().to(x.device)
        return mean + (x.float() - mean) @ kept.T @ kept


@checked
def pca_splice(
    model: Any,
    stream: Any,
    widths: Sequence[int],
    hooks: Sequence[str],
    *,
    fitted_on: Any = None,
    rule: CountingRule | None = None,
    together: bool = False,
    max_tokens: int | None = None,
    fit_tokens: int = PCA_TOKENS,
    progress: bool = True,
) -> Forecasts:
    """KL(teacher ‖ teacher with only the d leading principal components at a hook point), in nats per token at T = 1.

    At every counted token the activation x becomes μ + U_d U_dᵀ (x − μ); the other tokens stay as they are. Then the
    rest of the teacher runs. Of each hook point the layers below run once for as many widths as `TOKENS_AT_ONCE`
    allows. The record `pca_tail` beside it is Σ_{j>d} λ_j, the variance outside these components, in activation².

    Args:
        model: the teacher: a hooked or Hugging Face model.
        stream: a `TokenStream`, or rows of token ids [row, position].
        widths: how many components stay; from the width of the activations on, all of them.
        hooks: hook points.
        fitted_on: the text whose activations the components are of; by default `stream` itself.
        rule: which tokens count; by default all but the model's special ones.
        together: project at all of the hook points at once, and not at one after the other.
        max_tokens: read no more predicted tokens of the stream than this, but whole batches.
        fit_tokens: counted tokens to fit the components to.
        progress: show it once it takes longer than two seconds.

    Raises:
        HookPointError: where the model lacks a hook point, does not run it, or nothing runs after it.
        CapacityError: where a width cannot be, no text is left, or an activation is not finite.
    """
    widths = checked_widths(widths)
    if not widths or not hooks:
        raise CapacityError("there is nothing to project: pass at least one width and one hook point")
    started, rule = time.monotonic(), rule or CountingRule.for_model(model, None)
    with torch.no_grad(), evaluating(model):
        spectra = _spectra(model, hooks, stream if fitted_on is None else fitted_on, rule, fit_tokens, progress)
        sites = [tuple(spectra)] if together else [(spectrum,) for spectrum in spectra]
        sums, tokens = _divergences(model, sites, stream, widths, rule, max_tokens, progress)
    records = [
        Forecast(PCA_SPLICE, width, floor, site_name(model, site))
        for site, site_sums in zip(sites, sums, strict=True)
        for width, floor in zip(widths, group_means(site_sums.kl, site_sums.tokens), strict=True)
    ]
    notes = interval_notes(record.floor for record in records)
    if not together:
        records += [
            Forecast(PCA_TAIL, width, Estimate(spectrum.tail(width)), spectrum.point.name, unit=VARIANCE)
            for spectrum in spectra
            for width in widths
        ]
    about = {
        "source": source_of(stream),
        "fitted_on": source_of(stream if fitted_on is None else fitted_on),
        "tokens": tokens,
        "versions": library_versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Forecasts(tuple(records), about, notes)


def every_layer(model: Any) -> list[str]:
    """The residual stream after each block."""
    config = getattr(model, "cfg", None) or model.config
    layers = getattr(config, "n_layers", None) or config.num_hidden_layers
    return [f"blocks.{layer}.hook_resid_post" for layer in range(int(layers))]


def site_name(model: Any, site: Sequence[Spectrum]) -> str:
    """The name of a record's hook point, or of all of them together."""
    names = [spectrum.point.name for spectrum in site]
    return "blocks.*.hook_resid_post" if len(names) > 1 and names == every_layer(model) else " + ".join(names)


def _spectra(
    model: Any, hooks: Sequence[str], stream: Any, rule: CountingRule, tokens: int, progress: bool
) -> list[Spectrum]:
    """Principal components at some hook points, from one pass over the text."""
    points = [find_tap_point(model, hook) for hook in hooks]
    moments = [Moments() for _ in points]
    with token_progress(tokens, progress, "fitting principal components") as advance:
        for batch in as_batches(stream):
            text = CountedTokens(batch, rule)
            if not text.n_counted:
                continue
            ids = torch.from_numpy(batch.filled(rule.filler))
            for point, sums, seen in zip(points, moments, activations_at(model, points, ids), strict=True):
                if seen is None:
                    raise HookPointError(
                        f"{point.name} did not fire: the model does not run it, choose another hook point"
                    )
                if seen.ndim < 3 or seen.shape[:2] != ids.shape:
                    raise HookPointError(
                        f"{point.name} carries {list(seen.shape)}, which is not one vector per token: choose another"
                        " hook point"
                    )
                counted = seen.flatten(2)[text.counted.to(seen.device)]
                check_finite_activations(point.name, counted)
                sums.add(counted)
            advance(moments[0].count)
            if moments[0].count >= tokens:
                break
    if moments[0].count < 2:
        raise CapacityError(
            f"the text has {moments[0].count:,} tokens that count, too few for principal components: use longer text"
        )
    return [
        Spectrum(point, sums.mean, *principal_components(sums.covariance))
        for point, sums in zip(points, moments, strict=True)
    ]


def _divergences(
    model: Any,
    sites: Sequence[tuple[Spectrum, ...]],
    stream: Any,
    widths: Sequence[int],
    rule: CountingRule,
    max_tokens: int | None,
    progress: bool,
) -> tuple[list[DivergenceSums], int]:
    """KL of every width at each site, and the number of predicted tokens."""
    head, sums, tokens = head_of(model), [DivergenceSums(len(widths)) for _ in sites], 0
    with token_progress(max_tokens, progress, "projecting") as advance:
        for batch in heldout_text(stream, max_tokens):
            text, ids = CountedTokens(batch, rule), torch.from_numpy(batch.filled(rule.filler))
            check_token_ids(model, ids.numpy())
            if not tokens:
                check_head(model, ids.to(device_of(model)), "spliced")
            for site, site_sums in zip(sites, sums, strict=True):
                points = [spectrum.point for spectrum in site]
                at_once = rows_at_once(points, int(text.valid.sum(1).max()), len(widths))
                for rows in rows_of(ids, text, at_once):
                    per_pass = max(1, TOKENS_AT_ONCE // rows.ids.numel() - 1)
                    parts = []
                    for start in range(0, len(widths), per_pass):
                        hidden = _hidden(model, site, rows, widths[start : start + per_pass])
                        parts.append(variant_divergences(head, hidden, rows.predicting))
                    site_sums.add(torch.cat(parts), rows.groups)
            advance(tokens := tokens + predicted_tokens(batch))
    return sums, tokens


def _hidden(
    model: Any, site: Sequence[Spectrum], rows: RowsOfText, widths: Sequence[int]
) -> Float[Tensor, "one_more row position d_model"]:
    """Last hidden states of the teacher, then those of the teacher projected to each width."""
    device = device_of(model)
    counted = rows.counted.to(device)
    edits = [(spectrum.point, _projecting(spectrum, counted, widths)) for spectrum in site]
    return hidden_states(model, rows.ids.to(device), len(widths), edits)


def _projecting(spectrum: Spectrum, counted: Bool[Tensor, "row position"], widths: Sequence[int]) -> Change:
    """A change that appends the projection to each width to the rows.

    If a lower hook point has already appended such rows, each is projected to its own width.
    """

    def change(x: Tensor) -> Tensor:
        here = counted.to(x.device)  # a device map may have put the layer elsewhere
        several = x if len(x) != len(counted) else x.repeat(len(widths) + 1, *[1] * (x.ndim - 1))
        flat = several.flatten(2).view(len(widths) + 1, *counted.shape, -1).clone()
        for variant, width in enumerate(widths, start=1):
            new = spectrum.projected(flat[variant, here], width)
            check_finite_activations(spectrum.point.name, new)
            flat[variant, here] = new.to(flat.dtype)
        edited: Tensor = flat.flatten(0, 1).unflatten(2, x.shape[2:])
        return edited

    return change
