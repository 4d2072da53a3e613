"""Which features a student of some width loses first, and the text on which each is most active.

The text comes from a second pass over few documents, in which a bounded heap is kept for each feature that the report
shows and for no other.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.errors import HookPointError, MeasurementError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.floors import sparsity
from tl_capacity.predict.laws import kept_features
from tl_capacity.results.estimate import Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.summary import Resample
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream

if TYPE_CHECKING:
    from torch import Tensor

    from tl_capacity.models.loading import LoadedModel

SHOWN = 8
"""Features on each side of a budget."""
SNIPPETS = 4
"""Of each feature."""
BEFORE, AFTER = 14, 7
"""Tokens around the most active one."""


@dataclass(frozen=True)
class Edge:
    """The features on both sides of a student's budget at one hook point.

    Attributes:
        width: d_S.
        n_kept, n_lost: F_S and F − F_S.
        kept: latents that are just kept, the least important last.
        lost: latents that are lost first, the most important first.
    """

    width: int
    n_kept: int
    n_lost: int
    kept: tuple[int, ...]
    lost: tuple[int, ...]


@dataclass(frozen=True)
class ShownFeature:
    """One latent, with intervals over documents: its rank, which is 1 and the number of alive features that are more
    important, importance, firing rate.
    """

    latent: int
    rank: Estimate
    importance: Estimate
    rate: Estimate


@dataclass(frozen=True)
class Snippet:
    """Text around the token on which a latent is most active.

    Attributes:
        strength: |z| at that token.
        document: its number in the source.
        pieces: `(text, share)` of each token: its text, and |z| there as a share of `strength`.
    """

    strength: float
    document: int
    pieces: tuple[tuple[str, float], ...]


Snippets = Mapping[tuple[int, int], Sequence[Snippet]]
"""By the place of a hook point in the measurement, and latent."""


def edges(
    hook: HookMeasurement, widths: Sequence[int], importance: str | None, law: CapacityLaw, shown: int = SHOWN
) -> list[Edge]:
    """The features on both sides of each width's budget.

    Raises:
        CapacityError: where the hook point has no sparsity.
    """
    alpha, values, order = sparsity(hook), hook.importance(importance), hook.ranked(importance)
    return [
        Edge(
            width,
            kept,
            len(order) - kept,
            tuple(order[max(0, kept - shown) : kept].tolist()),
            tuple(order[kept : kept + shown].tolist()),
        )
        for width in widths
        for kept in [kept_features(values, alpha, width, law)]
    ]


def shown_features(hook: HookMeasurement, latents: Sequence[int], importance: str | None) -> dict[int, ShownFeature]:
    """What is known of some alive latents, by latent."""
    if not latents:
        return {}
    estimator, s, chosen = hook.estimator(importance), hook.summary, np.array(sorted(set(latents)), dtype=np.int64)

    def rank_importance_and_rate(sums: Resample) -> list[float]:
        values = sums.importance(estimator.compute, estimator.name)
        alive = np.sort(values[sums.rates > s.alive_threshold])
        ranks = 1 + len(alive) - np.searchsorted(alive, values[chosen], side="right")
        return list(np.stack([ranks, values[chosen], sums.rates[chosen]], 1).ravel())

    estimates = s.estimates(rank_importance_and_rate)
    return {
        latent: ShownFeature(latent, rank.within(1.0), worth.within(0.0), rate.within(0.0, 1.0))
        for latent, rank, worth, rate in zip(
            chosen.tolist(), estimates[::3], estimates[1::3], estimates[2::3], strict=True
        )
    }


def stream_of(measurement: Measurement, tokenizer: Any, source: str | None = None, batch_rows: int = 4) -> TokenStream:
    """The token stream that was measured, or one of another source cut in the same way."""
    settings = measurement.provenance.settings
    context = settings.get("context")
    return TokenStream(
        source or measurement.provenance.source,
        tokenizer,
        int(context or 256),
        batch_rows,
        settings.get("bos", 0) is not None,
    )


def top_snippets(
    loaded: LoadedModel,
    measurement: Measurement,
    shown: Mapping[int, Sequence[int]],
    stream: TokenStream,
    max_tokens: int,
    *,
    progress: bool = True,
) -> dict[tuple[int, int], list[Snippet]]:
    """The text on which latents are most active, at most one snippet from each row.

    Args:
        loaded: the model that was measured.
        shown: the latents of each hook point, by its place in the measurement.
        stream: the text.
        max_tokens: how much of it to read.

    Returns:
        snippets by `(place of the hook point, latent)`, the strongest first; a latent that never fired has none.

    Raises:
        CapacityError: where model or SAE are not those that were measured, or the text cannot be read.
    """
    import torch

    from tl_capacity.measure.setup import measured_dictionary, tapped_model
    from tl_capacity.models.hook_points import TapPoint
    from tl_capacity.runtime.progress import token_progress

    wanted = {place: list(latents) for place, latents in shown.items() if latents}
    dictionaries = {
        place: measured_dictionary(measurement.hooks[place], loaded, measurement.provenance) for place in wanted
    }
    if measurement.provenance.revision not in (None, loaded.revision):
        raise MeasurementError(
            f"{loaded.name!r} is no longer the model that was measured (its revision is {loaded.revision!r}): measure"
            " again"
        )
    model = tapped_model(loaded, list(dictionaries.values()), [measurement.hooks[place].hook for place in wanted])
    run: Any = model if hasattr(model, "hook_dict") else model.base_model  # without the head, which nobody looks at
    device = next(model.parameters()).device
    masked = np.array(measurement.provenance.settings.get("masked_token_ids", []), dtype=np.int64)
    heaps = {place: _Heaps(dictionaries[place], latents) for place, latents in wanted.items()}
    seen: dict[int, Tensor] = {}
    read = 0
    with ExitStack() as watching, token_progress(max_tokens, progress, "looking for examples") as advance:
        for place in wanted:
            point = TapPoint.of(model, measurement.hooks[place].hook)
            watching.callback(point.watch(lambda activation, place=place: seen.update({place: activation.detach()})))  # type: ignore[misc]
        for batch in stream:
            counted = (batch.tokens != PADDING) & ~np.isin(batch.tokens, masked)
            tokens = torch.from_numpy(np.where(batch.tokens == PADDING, 0, batch.tokens)).to(device)
            seen.clear()
            with torch.no_grad():
                run(tokens) if run is model else run(tokens, use_cache=False)
            for place in wanted:
                if place not in seen:
                    raise HookPointError(
                        f"{measurement.hooks[place].hook} did not fire: the model does not run it, measure another hook"
                        " point"
                    )
                heaps[place].look(seen[place], batch, counted)
            read += int(counted.sum())
            advance(read)
            if read >= max_tokens:
                break
    return {
        (place, latent): found for place, each in heaps.items() for latent, found in each.snippets(stream.tokenizer)
    }


@dataclass(frozen=True)
class _Candidate:
    document: int
    ids: NDArray[np.int64]
    strengths: NDArray[np.float64]


class _Heaps:
    """The strongest rows of each shown latent of one SAE."""

    def __init__(self, sae: Any, latents: Sequence[int]) -> None:
        import torch

        from tl_capacity.dictionaries.encoding import Encoder

        self.sae, self.encoder = sae, Encoder(sae)
        self.latents = sorted(set(latents))
        self.slot = torch.full((int(sae.W_dec.shape[0]),), -1, dtype=torch.int64)
        self.slot[torch.tensor(self.latents)] = torch.arange(len(self.latents))
        self.heaps: list[list[tuple[float, int, _Candidate]]] = [[] for _ in self.latents]
        self.pushed = 0

    def look(self, activation: Tensor, batch: TokenBatch, counted: NDArray[np.bool_]) -> None:
        """Take one forward pass's activations [row, position, ...] into account."""
        import torch

        rows, positions = np.nonzero(counted)
        inputs = activation.flatten(0, 1)[torch.from_numpy(counted.ravel()).to(activation.device)]
        if not getattr(self.sae, "hook_z_reshaping_mode", False):
            inputs = inputs.flatten(1)
        for start in range(0, len(inputs), self.encoder.chunk):
            tokens, features, values = (t.cpu() for t in self.encoder(inputs[start : start + self.encoder.chunk]))
            slots = self.slot[features]
            wanted = slots >= 0
            token = tokens[wanted].numpy() + start
            self._take(
                slots[wanted].numpy(), rows[token], positions[token], np.abs(values[wanted].double().numpy()), batch
            )

    def _take(
        self,
        slots: NDArray[Any],
        rows: NDArray[Any],
        positions: NDArray[Any],
        strengths: NDArray[np.float64],
        batch: TokenBatch,
    ) -> None:
        # The strongest token of each latent and row comes first in its group.
        order = np.lexsort((-strengths, rows, slots))
        slots, rows, positions, strengths = slots[order], rows[order], positions[order], strengths[order]
        ends = [*(np.flatnonzero((np.diff(slots) != 0) | (np.diff(rows) != 0)) + 1), len(slots)] if len(slots) else []
        for first, end in pairwise([0, *ends]):
            heap, peak = self.heaps[slots[first]], float(strengths[first])
            if len(heap) == SNIPPETS and peak <= heap[0][0]:
                continue
            row, at = int(rows[first]), int(positions[first])
            ids = batch.tokens[row, max(0, at - BEFORE) : at + AFTER + 1]
            along = np.zeros(batch.tokens.shape[1])
            along[positions[first:end]] = strengths[first:end]
            candidate = _Candidate(
                int(batch.documents[row]),
                ids[ids != PADDING],
                along[max(0, at - BEFORE) : at + AFTER + 1][ids != PADDING],
            )
            self.pushed += 1
            (heapq.heappushpop if len(heap) == SNIPPETS else heapq.heappush)(heap, (peak, -self.pushed, candidate))

    def snippets(self, tokenizer: Any) -> Iterator[tuple[int, list[Snippet]]]:
        """The snippets of each latent, as text."""
        for latent, heap in zip(self.latents, self.heaps, strict=True):
            found = []
            for peak, _, c in sorted(heap, key=lambda entry: entry[:2], reverse=True):
                shares = (c.strengths / peak).tolist()
                found.append(
                    Snippet(peak, c.document, tuple(zip(token_texts(tokenizer, c.ids.tolist()), shares, strict=True)))
                )
            yield latent, found


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. Joined, it is the text of all; a character that is spread over several tokens
    comes with the last of them.
    """
    texts: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        texts.append(whole[len(done) :])
        done = whole if len(whole) > len(done) else done
    return texts
