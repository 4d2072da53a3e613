"""Attaching: `add_capacity_hooks`, and the same for SAEs and models that already have a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tl_capacity.dictionaries.adapter import NamedDictionary, SAEs, target_hook
from tl_capacity.dictionaries.reading import Reading, reading_of
from tl_capacity.dictionaries.rows import counted_positions
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import ImportanceEstimator, SparseAutoencoder
from tl_capacity.measure.by_name import dictionaries_of
from tl_capacity.measure.session import CapacityHooks
from tl_capacity.measure.tap import Tap
from tl_capacity.models.compiled import uncompiled
from tl_capacity.models.identity import Identity
from tl_capacity.plugins import plugins
from tl_capacity.results.summary import FeatureSummary
from tl_capacity.runtime.checks import checked_but
from tl_capacity.runtime.logs import log
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import TokenStream


class HookedModel(Protocol):
    """What a model offers once `tl_capacity` is imported. Annotate a variable with it, and a type checker accepts
    `add_capacity_hooks`.
    """

    def add_capacity_hooks(
        self,
        saes: SAEs | None = ...,
        *,
        text: str | TokenStream | None = ...,
        importance: Sequence[str | ImportanceEstimator] = ...,
        alive_threshold: float = ...,
        fvu_every: int = ...,
        mask_token_ids: Iterable[int] | None = ...,
        skip_first_positions: int | None = ...,
    ) -> CapacityHooks: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@checked_but("saes")
def add_capacity_hooks(
    model: Any,
    saes: SAEs | None = None,
    *,
    text: str | TokenStream | None = None,
    importance: Sequence[str | ImportanceEstimator] | None = None,
    alive_threshold: float = 1e-5,
    fvu_every: int = 8,
    mask_token_ids: Iterable[int] | None = None,
    skip_first_positions: int | None = None,
) -> CapacityHooks:
    """Tap a model's hook points and count what the SAEs' features do until the handle is removed.

    Args:
        model: a `HookedTransformer`, `TransformerBridge`, their SAE variants, or a Hugging Face causal language model
            of a registered family.
        saes: one SAE (its metadata names the hook point), a list, or a mapping from hook point to one or several SAEs,
            in memory or by name: `RELEASE/SAE_ID` of SAELens' directory, a folder, `pca:HOOK`, `neurons:HOOK`. Without
            it, those that `add_sae` put into the model, or else those that come with a model of its name.
        text: what `pca:` bases are fitted to; by default the text that comes with the model.
        importance: importance estimators, by name or as objects; the default one where none are given. Those that need
            only the sums of z and z² can also be chosen later.
        alive_threshold: a feature is alive where its firing rate exceeds this; the paper's is 1e-5.
        fvu_every: check the reconstruction on one document in this many; 1 is all.
        mask_token_ids: ids not to count; by default every special token of the model's tokenizer, BOS among them.
        skip_first_positions: do not count the first positions of each row, whose activations have huge norms in many
            models; by default the positions count that the SAEs were trained on, where their metadata says so.

    Returns:
        A handle, itself a context manager.

    Raises:
        HookPointError: unknown hook point, or one of another width than the SAE's d_in.
        DictionaryError: an SAE that cannot be measured as it is, or no SAE at all.
    """
    if (skip_first_positions or 0) < 0 or fvu_every < 1:
        raise CapacityError(
            f"skip_first_positions = {skip_first_positions or 0} and fvu_every = {fvu_every} must be at least 0 and 1"
        )
    if isinstance(model, SparseAutoencoder):
        raise HookPointError(
            f"{type(model).__name__} is an SAE, not a model: call add_capacity_hooks on the model and pass the SAE"
            " to it"
        )
    rule = (
        CountingRule.for_model(model, getattr(model, "tokenizer", None))
        if mask_token_ids is None
        else CountingRule.without(mask_token_ids)
    )
    dictionaries = dictionaries_of(model, saes, text)
    rule = rule.at(counted_positions(skip_first_positions, [d.sae for d in dictionaries]))
    capacity = attach(model, dictionaries, rule, importance, alive_threshold, fvu_every)
    for tap in capacity.taps:
        for sentence in tap.differences():
            log.warning(sentence)
    return capacity


def attach(
    model: Any,
    dictionaries: Sequence[NamedDictionary],
    rule: CountingRule,
    importance: Sequence[str | ImportanceEstimator] | None,
    alive_threshold: float,
    fvu_every: int,
    identity: Identity | None = None,
    on_device: bool | None = None,
) -> CapacityHooks:
    """`add_capacity_hooks` for SAEs that already have a name, and for a model that is recorded under another name.
    `on_device` decides whether to count as on an accelerator, wherever the SAEs are.
    """
    FeatureSummary.check_threshold(alive_threshold)
    model = uncompiled(model)
    registry = plugins().importance_estimators
    asked_for = (registry.default,) if importance is None else importance
    estimators = [registry[e] if isinstance(e, str) else e for e in asked_for]
    for estimator in estimators:
        if lacking := registry.lacking(estimator):
            raise CapacityError(
                f"the importance estimator {type(estimator).__name__} has no {lacking}: give it a `{lacking}` attribute"
            )
    names = [estimator.name for estimator in estimators]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CapacityError(
            f"the importance estimator {twice!r} is given twice, and both would add to the same sums: give it once, "
            "or give the two different names"
        )
    scratch = Scratch()
    taps = [Tap(_reading(model, d), d, estimators, fvu_every, scratch, on_device) for d in dictionaries]
    if not taps:
        raise DictionaryError("no SAE was given: pass one, a list, or a mapping from hook point to SAE")
    return CapacityHooks(model, taps, alive_threshold, rule, identity or Identity.according_to(model))


def _reading(model: Any, dictionary: NamedDictionary) -> Reading:
    """Where a dictionary reads in this model, what differs there and, for a transcoder, where it writes."""
    reading, written = reading_of(model, dictionary.sae, dictionary.hook), target_hook(dictionary.sae, dictionary.hook)
    notes = () if written is None else reading_of(model, dictionary.sae, written).notes
    return replace(reading, notes=tuple(dict.fromkeys((*reading.notes, *notes))))
