"""Splice: run a teacher in which only its most important features pass a hook point, and measure how its predictions
change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import (
    check_dictionary,
    dictionary_digest,
    inputs_for,
    named_dictionaries,
    target_hook,
)
from tl_capacity.dictionaries.encoding import Encoder, decoder_vectors_add_up, joined
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.forward import check_token_ids, device_of, evaluating
from tl_capacity.models.head import check_head, head_of
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import checked_widths, sparsity
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.logs import ended_early, log
from tl_capacity.runtime.out_of_memory import within_device_memory
from tl_capacity.runtime.processes import ALONE, Processes
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
    sum_over_all,
    variant_divergences,
)
from tl_capacity.splicing.variants import Variants
from tl_capacity.text.counting import CountedTokens, CountingRule
from tl_capacity.text.streams import as_batches, source_of

LOST = ("mean", "zero")
FEWER = "ask for fewer --kept and --widths, or choose another --device"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85)
"""Shares of the alive features that are kept by default, besides none and all."""
SAEs = Mapping[str, SparseAutoencoder | Sequence[SparseAutoencoder]] | Sequence[SparseAutoencoder] | SparseAutoencoder


@dataclass(frozen=True)
class _Wanted:
    """A requested curve: the latents in their order, and how many of them to keep."""

    name: str
    order: NDArray[np.int64]
    kept: tuple[int, ...]


@checked
def splice(
    model: Any,
    measurement: Measurement,
    stream: Any,
    widths: Sequence[int] = (),
    *,
    saes: SAEs,
    importance: Sequence[str] = (),
    laws: Sequence[str] = (),
    kept: Sequence[int] = (),
    orders: Mapping[str, Sequence[int]] | None = None,
    lost: str = "mean",
    keep_error: bool = False,
    max_tokens: int | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Spliced:
    """KL(teacher ‖ teacher with only the F_S most important features at a hook point), in nats per token at T = 1.

    At every counted token the activation x becomes b_dec + Σ_{kept} zᵢ wᵢ + Σ_{lost} z̄ᵢ wᵢ, with z̄ᵢ from the
    measurement; the other tokens stay as they are. Then the rest of the teacher runs. No student is trained, and no
    constant is fitted. Of each ranking the layers below the hook point run once and the dictionary encodes once, for as
    many variants as `TOKENS_AT_ONCE` allows.

    Args:
        model: the teacher: a hooked or Hugging Face model.
        measurement: of this model with these SAEs.
        stream: a `TokenStream`, or rows of token ids [row, position]; best text that was not measured.
        widths: student widths, whose numbers of features are run exactly; others are interpolated later.
        saes: the SAEs that were measured; hook points of the measurement without one here are left out.
        importance: estimators by which features are ranked; by default the default one.
        laws: capacity laws that say how many features a width keeps; by default the default one.
        kept: further numbers of features to run.
        orders: further rankings by name, each the numbers of the alive latents with the first to stay first.
        lost: "mean", z̄ᵢ stands for a lost latent, or "zero", nothing does.
        keep_error: leave the SAE's error in the stream.
        max_tokens: read no more tokens of the stream than this.
        progress: show it once it takes longer than two seconds.
        processes: that share the batches; each gets the curves.

    Raises:
        HookPointError: where the model lacks a hook point, does not run it, or nothing runs after it.
        DictionaryError: where an SAE is not the one that was measured, or does not write the sum of its decoder's rows.
        CapacityError: where a width or a number of features cannot be, or an activation is not finite.
    """
    if lost not in LOST:
        raise CapacityError(f"lost = {lost!r} cannot stand for a lost latent: choose one of {', '.join(LOST)}")
    if max_tokens is not None and max_tokens < 1:
        raise CapacityError(f"{max_tokens:,} tokens are too few to splice on: ask for at least 1")
    widths = checked_widths(widths)
    started = time.monotonic()
    pairs = list(_measured(measurement, saes))
    jobs = [
        _Job(model, hook, sae, _wanted(hook, widths, importance, laws, kept, orders or {}), lost, keep_error)
        for hook, sae in pairs
    ]
    rule = CountingRule.recorded(measurement.provenance.settings)
    tokens = 0
    with ExitStack() as held, torch.no_grad():
        held.enter_context(within_device_memory("the model with its variants", FEWER))
        held.enter_context(evaluating(model))
        advance = held.enter_context(token_progress(max_tokens, progress and processes.first, "splicing"))
        for number, batch in enumerate(as_batches(stream)):
            if max_tokens is not None and tokens >= max_tokens:
                break
            text = CountedTokens(batch, rule)
            ids = torch.from_numpy(batch.filled(rule.filler))
            check_token_ids(model, ids.numpy())
            if number % processes.count == processes.index:
                if number == processes.index:
                    check_head(model, ids.to(device_of(model)), "spliced")
                for job in jobs:
                    job.read(ids, text)
            tokens += int(text.valid.sum())
            advance(tokens)
    if max_tokens is not None and tokens < max_tokens:
        log.warning(ended_early(tokens, max_tokens))
    sum_over_all([sums for job in jobs for sums in job.sums], processes)
    curves = tuple(curve for job in jobs for curve in job.curves())
    about = {
        "model": measurement.provenance.model,
        "revision": measurement.provenance.revision,
        "source": source_of(stream),
        "tokens": tokens,
        "widths": list(widths),
        "versions": library_versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Spliced(curves, about)


class _Job:
    """The curves of one hook point and dictionary.

    They share the lower layers, the encoding and the teacher's own logits.
    """

    def __init__(
        self, model: Any, hook: HookMeasurement, sae: Any, wanted: Sequence[_Wanted], lost: str, keep_error: bool
    ) -> None:
        self.model, self.hook, self.sae, self.wanted = model, hook, sae, wanted
        self.lost, self.keep_error = lost, keep_error
        check_dictionary(sae, hook.hook)
        self.source = reading_of(model, sae, hook.hook).point
        written = target_hook(sae, hook.hook)
        self.target = self.source if written is None else reading_of(model, sae, written).point
        self.encoder, self.head = Encoder(sae), head_of(model)
        means = hook.summary.arrays["sums"].sum(0) / hook.summary.n_tokens
        self.means = torch.from_numpy(means if lost == "mean" else np.zeros_like(means)).float()
        self.sums = [DivergenceSums(len(curve.kept)) for curve in wanted]
        self._checked = False
        self._made: dict[tuple[str, tuple[int, ...]], Variants] = {}

    def read(self, ids: Int[Tensor, "row position"], text: CountedTokens) -> None:
        """Add the tokens of a batch to every curve."""
        variants = max(len(curve.kept) for curve in self.wanted)
        at_once = rows_at_once([self.target], int(text.valid.sum(1).max()), variants)
        for rows in rows_of(ids, text, at_once):
            for curve, sums in zip(self.wanted, self.sums, strict=True):
                sums.add(self._kl(curve, rows), rows.groups)

    def curves(self) -> Iterator[SplicedCurve]:
        """The curves of all tokens so far.

        Raises:
            CapacityError: where nothing was.
        """
        hook = self.hook
        for curve, sums in zip(self.wanted, self.sums, strict=True):
            if not sums.tokens.sum():
                raise CapacityError("the text has no token to predict: splice on longer text")
            yield SplicedCurve(
                hook.hook,
                hook.sae,
                hook.sae_digest,
                hook.architecture,
                hook.width,
                curve.name,
                self.lost,
                self.keep_error,
                curve.kept,
                sums.kl,
                sums.tokens,
            )

    def _kl(self, curve: _Wanted, rows: RowsOfText) -> Float64[Tensor, "variant token"]:
        """KL of a curve's variants at the predicting positions."""
        per_pass = max(1, TOKENS_AT_ONCE // rows.ids.numel() - 1)
        parts = []
        for start in range(0, len(curve.kept), per_pass):
            hidden = self._hidden(rows, self._variants(curve, curve.kept[start : start + per_pass]))
            parts.append(variant_divergences(self.head, hidden, rows.predicting))
        return torch.cat(parts)

    def _hidden(self, rows: RowsOfText, variants: Variants) -> Float[Tensor, "one_more row position d_model"]:
        """Last hidden states of the teacher, then those of each variant."""
        read: list[Tensor] = []

        def replace(x: Tensor) -> Tensor:
            if not read:
                raise HookPointError(
                    f"{self.target.name} fired before {self.source.name}, which the transcoder reads: splice another"
                    " hook point"
                )
            # The model, its layers and the SAE may be on different devices.
            inputs = inputs_for(self.sae, read[0][rows.counted.to(read[0].device)]).to(self.sae.W_dec.device)
            self._check(inputs)
            flat, spliced = x.flatten(2), rows.counted.to(x.device)
            new = variants(flat[spliced], inputs, joined(list(self.encoder.entries(inputs))))
            check_finite_activations(self.target.name, new)
            edited: Tensor = variants.edited(flat, spliced, new).unflatten(2, x.shape[2:])
            return edited

        ids, watched = rows.ids.to(device_of(self.model)), [(self.source, read.append)]
        return hidden_states(self.model, ids, variants.n, [(self.target, replace)], watched)

    def _variants(self, curve: _Wanted, kept: tuple[int, ...]) -> Variants:
        """The variants of a pass. They are made once, as what stands for lost latents does not change."""
        if (curve.name, kept) not in self._made:
            alive, order = self.hook.summary.n_alive.value, torch.from_numpy(curve.order)
            everything = [len(order) if number == alive else number for number in kept]
            self._made[curve.name, kept] = Variants(self.sae, order, everything, self.means, self.keep_error)
        return self._made[curve.name, kept]

    def _check(self, inputs: Tensor) -> None:
        """Refuse a dictionary that does not write the sum of its decoder vectors. The first tokens show it."""
        if self._checked or not len(inputs):
            return
        if decoder_vectors_add_up(self.sae, inputs) is False:
            raise DictionaryError(
                f"the SAE at {self.hook.hook} does not write the sum of its decoder vectors, so no features can be"
                " left out: choose another SAE"
            )
        self._checked = True


def _measured(measurement: Measurement, saes: Any) -> Iterator[tuple[HookMeasurement, Any]]:
    """The measurement of each SAE.

    Raises:
        DictionaryError: where one was not measured.
    """
    for hook, _, sae in named_dictionaries(saes):
        there = [measured for measured in measurement if measured.hook == hook]
        digest = dictionary_digest(sae)
        same = [measured for measured in there if measured.sae_digest == digest]
        if not same:
            raise DictionaryError(
                f"the SAE at {hook} is not one that was measured there"
                f" ({', '.join(measured.sae for measured in there) or 'nothing was'}): pass the same weights, or"
                " measure with it"
            )
        yield same[0], sae


def _wanted(
    hook: HookMeasurement,
    widths: Sequence[int],
    importance: Sequence[str],
    laws: Sequence[str],
    kept: Sequence[int],
    orders: Mapping[str, Sequence[int]],
) -> list[_Wanted]:
    """The curves of a hook point, one for each order."""
    alive = int(hook.summary.n_alive.value)
    if wrong := [number for number in kept if not 0 <= number <= alive]:
        raise CapacityError(
            f"{wrong[0]:,} features cannot stay at {hook.hook}, which has {alive:,} alive ones: choose a number from 0"
            f" to {alive:,}"
        )
    chosen = [plugins().capacity_laws.named(law) for law in (laws or (None,))]
    budgets = {
        kept_features(law, width, context_at(hook, hook.importance(name), sparsity(hook)))
        for name in (importance or (None,))
        for law in chosen
        for width in widths
    }
    numbers = {0, alive, *kept, *budgets, *(() if kept else (round(share * alive) for share in SHARES))}
    rest = np.flatnonzero(~hook.summary.alive)
    rankings = {hook.estimator(name).name: hook.ranked(name) for name in (importance or (None,))}
    for name, order in orders.items():
        ranked = np.asarray(order, dtype=np.int64)
        if not np.array_equal(np.sort(ranked), np.flatnonzero(hook.summary.alive)):
            raise CapacityError(
                f"the order {name!r} does not name each of the {alive:,} alive features at {hook.hook} once: pass a"
                " permutation of them"
            )
        rankings[name] = ranked
    return [
        _Wanted(name, np.concatenate([ranked, rest]), tuple(sorted(min(n, alive) for n in numbers)))
        for name, ranked in rankings.items()
    ]
