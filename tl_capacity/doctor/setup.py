"""Checks of a set-up before its model runs: the model, its SAEs, and how the text becomes tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tl_capacity.dictionaries.adapter import NamedDictionary, dictionary_digest, metadata_of
from tl_capacity.dictionaries.rows import TrainedRows
from tl_capacity.doctor.finding import CHANGE, OK, STOP, Finding
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.forward import check_token_ids, device_of
from tl_capacity.models.loading import LoadedModel
from tl_capacity.text.counting import EVERY_POSITION, CountingRule
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream

UNKNOWN_SHARE = 0.01
"""Above this share of unknown tokens, the text is of another kind than the tokenizer knows."""


def model_finding(loaded: LoadedModel, settings: MeasureSettings, earlier: Measurement | None) -> Finding:
    """Whether the model is the one that was measured before, if it was."""
    if earlier is not None and earlier.provenance.revision != loaded.revision:
        return Finding(
            "model",
            STOP,
            f"{settings.model} is now {loaded.revision}, but was {earlier.provenance.revision} when it was measured: "
            "get that version, or measure anew",
        )
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return Finding(
        "model",
        OK,
        f"{settings.model}: {loaded.model.config.model_type}, {parameters:,} parameters, {settings.dtype} on"
        f" {device_of(loaded.model)}",
    )


def dictionary_finding(dictionary: NamedDictionary, earlier: Measurement | None) -> Finding:
    """Whether the SAE is the one that was measured before, if it was."""
    hook, name, sae = dictionary
    if earlier is not None and dictionary_digest(sae) not in {h.sae_digest for h in earlier if h.hook == hook}:
        return Finding(
            "SAE",
            STOP,
            f"{name} at {hook} has other weights than when it was measured: get those weights, or measure anew",
        )
    return Finding("SAE", OK, f"{name} at {hook}: {type(sae).__name__}, {len(sae.W_dec):,} latents")


def context_finding(context: int, dictionaries: Sequence[NamedDictionary]) -> Finding:
    """Whether rows are no longer than those that the SAEs were trained on."""
    trained = [int(size) for d in dictionaries if (size := metadata_of(d.sae, "context_size"))]
    if trained and context > min(trained):
        return Finding(
            "context",
            CHANGE,
            f"rows have {context:,} positions, but the SAE was trained on {min(trained):,}: pass --context"
            f" {min(trained)}",
        )
    return Finding("context", OK, f"rows of {context:,} positions")


def bos_finding(stream: TokenStream, dictionaries: Sequence[NamedDictionary]) -> Finding:
    """Whether rows begin with BOS exactly if they did when the SAEs were trained."""
    trained = {metadata_of(d.sae, "prepend_bos") for d in dictionaries}
    if stream.prepend_bos and stream.bos is None:
        return Finding(
            "BOS", CHANGE, "rows should begin with BOS, but the tokenizer has none: pass --no-bos to accept that"
        )
    if trained == {True} and stream.bos is None:
        return Finding("BOS", CHANGE, "the SAE was trained on rows that begin with BOS, but these do not: pass --bos")
    if trained == {False} and stream.bos is not None:
        return Finding("BOS", CHANGE, "the SAE was trained on rows without BOS, but these begin with it: pass --no-bos")
    if stream.bos is None:
        return Finding("BOS", OK, "rows begin without BOS")
    return Finding("BOS", OK, f"rows begin with BOS (id {stream.bos}), which is not counted")


def positions_findings(rule: CountingRule, dictionaries: Sequence[NamedDictionary]) -> Iterator[Finding]:
    """Whether the SAEs were trained on the positions that count. Empty if they were trained on all."""
    for dictionary in dictionaries:
        own = TrainedRows.of(dictionary.sae).positions
        if not rule.positions.are_among(own):
            yield Finding(
                "positions",
                CHANGE,
                f"{rule.positions} are counted, but the SAE at {dictionary.hook} was trained on {own}: leave out "
                "--skip-first-positions",
            )
        elif own != EVERY_POSITION:
            yield Finding(
                "positions", OK, f"{rule.positions} are counted; the SAE at {dictionary.hook} was trained on these"
            )


def vocabulary_finding(sample: Sequence[TokenBatch], loaded: LoadedModel) -> Finding:
    """Whether the tokenizer knows the text.

    Raises:
        CapacityError: where a token is not in the model's vocabulary.
    """
    ids = np.concatenate([batch.tokens[batch.tokens != PADDING] for batch in sample])
    check_token_ids(loaded.model, ids)
    unknown = getattr(loaded.tokenizer, "unk_token_id", None)
    share = (
        0.0
        if unknown is None or unknown in (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id)
        else float((ids == unknown).mean())
    )
    if share > UNKNOWN_SHARE:
        return Finding(
            "vocabulary",
            CHANGE,
            f"{share:.0%} of the tokens are unknown to the tokenizer: choose text of the kind that the model was"
            " trained on",
        )
    return Finding(
        "vocabulary",
        OK,
        f"token ids up to {int(ids.max()):,} of {int(loaded.model.get_input_embeddings().weight.shape[0]):,}",
    )
