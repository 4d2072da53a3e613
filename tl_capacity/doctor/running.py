"""Checks that need the running model: whether a hook fires, whether a position outweighs the others, and how well the
SAE fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_capacity.dictionaries.adapter import NamedDictionary, check_dictionary, joins_heads, target_hook
from tl_capacity.dictionaries.reading import Reading, reading_of
from tl_capacity.doctor.finding import CHANGE, OK, STOP, Finding, refusal_found
from tl_capacity.errors import CapacityError
from tl_capacity.measure.attach import attach
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.models.forward import activation_at, evaluating
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.predict.caveats import HIGH_FVU
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import TokenBatch

FIRST_NORM_RATIO = 10.0
"""Attention sinks have norms a hundred times those of other positions. Nothing else comes near ten."""


@dataclass(frozen=True)
class Trial:
    """A model that can be tapped, and a little text to try it on.

    Attributes:
        rule: by which the text's tokens count.
    """

    settings: MeasureSettings
    model: Any
    rule: CountingRule
    batches: Sequence[TokenBatch]

    def attached(self, dictionaries: Sequence[NamedDictionary], fvu_every: int) -> CapacityHooks:
        """The model with SAEs attached, as a measurement attaches them."""
        settings = self.settings
        importance = settings.importance or None
        return attach(self.model, dictionaries, self.rule, importance, settings.alive_threshold, fvu_every)

    def activations(self, point: TapPoint) -> Iterator[Float[Tensor, "row position d"]]:
        """The activations at a hook point that fires, with heads joined, for each batch."""
        for batch in self.batches:
            with evaluating(self.model):
                seen = activation_at(self.model, point, torch.from_numpy(batch.filled(self.rule.filler)))
            assert seen is not None
            yield seen.flatten(2)

    def counted(self) -> list[Tensor]:
        """For each batch, bool [row, position]: which tokens count."""
        return [torch.from_numpy(self.rule.counted(batch.tokens)) for batch in self.batches]


def tap_findings(trial: Trial, dictionary: NamedDictionary) -> Iterator[Finding]:
    """The findings on one SAE: normalisation, hook point, width, whether it fires, and how much it explains."""
    hook, _, sae = dictionary
    findings: list[Finding] = []
    with refusal_found("normalisation", findings):
        check_dictionary(sae, hook)
    if not findings:
        with refusal_found("hook", findings):
            findings += _running_findings(trial, dictionary)
    yield from findings


def _running_findings(trial: Trial, dictionary: NamedDictionary) -> list[Finding]:
    """
    Raises:
        CapacityError: where the hook point does not fit the SAE, or does not fire.
    """
    hook, _, sae = dictionary
    reading = reading_of(trial.model, sae, hook)
    point = reading.point
    if point.width is not None and point.width != sae.cfg.d_in:
        raise CapacityError(
            f"{hook} has width {point.width:,}, but the SAE's d_in is {sae.cfg.d_in:,}: it belongs to another hook"
            " point or model, so pass an SAE that was trained on this one"
        )
    with trial.attached([dictionary], fvu_every=1) as capacity:
        capacity.run(trial.batches, progress=False)
    summary = capacity.measurement().hooks[0].summary
    assert summary.fvu is not None
    activations = list(trial.activations(point))
    counted = trial.counted()
    inputs = torch.cat([x[c.to(x.device)] for x, c in zip(activations, counted, strict=True)])
    fires = f"{hook} fires, with {sae.cfg.d_in:,} dimensions like the SAE; {summary.n_tokens:,} tokens counted"
    return [
        Finding("hook", OK, fires),
        *processing_findings(hook, reading),
        first_position_finding(hook, activations, counted),
        fit_finding(hook, sae, summary.fvu.value, inputs, trial.settings.max_fvu),
    ]


def processing_findings(hook: str, reading: Reading) -> list[Finding]:
    """What the SAE's metadata says of its own model, and whether the activations here are that model's."""
    applied = (
        f"{hook}: the activations are those of a model with {' and '.join(reading.processing)}, on which the SAE was "
        "trained"
    )
    return [
        *([Finding("processing", OK, applied)] if reading.processing else []),
        *(Finding("processing", CHANGE, note) for note in reading.notes),
    ]


def first_position_finding(hook: str, activations: Sequence[Tensor], counted: Sequence[Tensor]) -> Finding:
    """Whether the first counted position of a row outweighs all others, as an attention sink does in a
    row without BOS.
    """
    norms = [torch.where(c, x.float().norm(dim=-1).cpu(), torch.nan) for x, c in zip(activations, counted, strict=True)]
    first, rest = (
        torch.cat([n[:, where].flatten() for n in norms]).nanmedian().item() for where in (slice(0, 1), slice(1, None))
    )
    if first > FIRST_NORM_RATIO * rest:
        return Finding(
            "first position",
            CHANGE,
            f"{hook}: ‖x‖ is {first:.3g} at the first position and {rest:.3g} elsewhere: pass --skip-first-positions 1,"
            " or --bos",
        )
    return Finding(
        "first position", OK, f"{hook}: no counted position outweighs the others; ‖x‖ has the median {rest:.3g}"
    )


def fit_finding(hook: str, sae: Any, fvu: float, inputs: Float[Tensor, "token d_in"], max_fvu: float) -> Finding:
    """The FVU. If it is high, also whether the SAE fits activations normalised as training often does."""
    if fvu <= HIGH_FVU:
        return Finding("FVU", OK, f"{hook}: {fvu:.3f} on {len(inputs):,} tokens")
    level = STOP if fvu > max_fvu else CHANGE
    mean_norm = float(inputs.float().norm(dim=-1).mean())
    scale = sqrt(inputs.shape[1]) / mean_norm
    scaled = (
        f"scaled to the mean norm √{inputs.shape[1]}: fold in the factor first, with "
        f"sae.fold_activation_norm_scaling_factor({scale:.4g})"
    )
    centred = (
        "centred over the dimensions: if it was trained on a model with center_writing_weights, say so in its"
        ' cfg.json, with "model_from_pretrained_kwargs": {"center_writing_weights": true} in "metadata"'
    )
    normalised = {scaled: inputs * scale, centred: inputs - inputs.mean(-1, keepdim=True)}
    if target_hook(sae, hook) is None and not joins_heads(sae):
        for how, x in normalised.items():
            if (better := _fvu(sae, x)) <= HIGH_FVU:
                return Finding(
                    "FVU",
                    level,
                    f"{hook}: {fvu:.3g} with the activations as they are, but {better:.3g} with them {how}",
                )
    return Finding(
        "FVU",
        level,
        f"{hook}: {fvu:.3g} of the variance is unexplained: is it the wrong hook point, the wrong model, or text of "
        "another kind than the SAE was trained on?",
    )


@torch.no_grad()
def _fvu(sae: Any, x: Float[Tensor, "token d_in"]) -> float:
    """The FVU, Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    x = x.to(sae.W_dec)
    value = float((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum())
    return value if isfinite(value) else float("inf")
