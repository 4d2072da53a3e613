"""Snippets: the text on which features are most active.

It comes from a second pass over few documents, in which a bounded heap is kept for each feature that the report shows
and for no other.
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
from tl_capacity.measure.setup import as_measured
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.defaults import USUAL_CONTEXT
from tl_capacity.text.streams import PADDING, TokenBatch, TokenStream

if TYPE_CHECKING:
    from torch import Tensor

    from tl_capacity.models.loading import LoadedModel
    from tl_capacity.text.counting import CountedTokens, CountingRule

SNIPPETS = 4
"""Number of snippets for each feature."""
BEFORE, AFTER = 14, 7
"""Number of tokens before and after the most active one."""
BROKEN = "\ufffd"
"""The character that stands for a piece of a character."""


@dataclass(frozen=True)
class Snippet:
    """Text around the token on which a latent is most active.

    Attributes:
        strength: |z| at that token.
        document: its number in the source.
        pieces: `(text, share)` of each token, or of all that are pieces of one character: text, and the largest |z|
            there as a share of `strength`.
    """

    strength: float
    document: int
    pieces: tuple[tuple[str, float], ...]


Snippets = Mapping[tuple[int, int], Sequence[Snippet]]
"""Snippets by the hook point's place in the measurement, and by latent."""


def stream_of(measurement: Measurement, tokenizer: Any, source: str | None = None, batch_rows: int = 4) -> TokenStream:
    """The token stream that was measured, or one of another source that is cut in the same way."""
    provenance = measurement.provenance
    return as_measured(source or provenance.source, tokenizer, provenance, USUAL_CONTEXT, batch_rows)


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

    from tl_capacity.dictionaries.reading import reading_of
    from tl_capacity.measure.setup import measured_dictionary, tapped_model
    from tl_capacity.models.forward import device_of, forward_options
    from tl_capacity.runtime.progress import token_progress

    provenance = measurement.provenance
    measured = {place: measurement.hooks[place] for place, latents in shown.items() if latents}
    saes = {place: measured_dictionary(hook, loaded, provenance) for place, hook in measured.items()}
    if provenance.revision not in (None, loaded.revision):
        raise MeasurementError(
            f"{loaded.name!r} is no longer the model that was measured (its revision is {loaded.revision!r}): measure"
            " again"
        )
    model = tapped_model(loaded, list(saes.values()), [hook.hook for hook in measured.values()])
    run: Any = model if hasattr(model, "hook_dict") else model.base_model  # without the head, which nobody looks at
    device, rule = device_of(model), counting_rule(measurement)
    strongest = {place: StrongestRows(sae, shown[place]) for place, sae in saes.items()}
    seen: dict[int, Tensor] = {}
    read = 0
    with ExitStack() as watching, token_progress(max_tokens, progress, "looking for examples") as advance:
        for place, hook in measured.items():
            point = reading_of(model, saes[place], hook.hook).point
            watching.callback(point.watch(lambda activation, place=place: seen.update({place: activation.detach()})))  # type: ignore[misc]
        for batch in stream:
            counted = rule.apply(batch)
            tokens = torch.from_numpy(batch.filled(rule.filler)).to(device)
            seen.clear()
            with torch.no_grad():
                run(tokens, **forward_options(run))
            for place, hook in measured.items():
                if place not in seen:
                    raise HookPointError(
                        f"{hook.hook} did not fire: the model does not run it, measure another hook point"
                    )
                strongest[place].look(seen[place], batch, counted)
            read += counted.n_counted
            advance(read)
            if read >= max_tokens:
                break
    return {
        (place, latent): snippets
        for place, rows in strongest.items()
        for latent, snippets in rows.snippets(stream.tokenizer)
    }


def counting_rule(measurement: Measurement) -> CountingRule:
    """The rule by which the measured tokens counted."""
    from tl_capacity.text.counting import CountingRule

    return CountingRule.recorded(measurement.provenance.settings)


@dataclass(frozen=True)
class Candidate:
    """The part of a row around the token on which a latent is most active in that row.

    Attributes:
        ids: [token]
        strengths: |z| [token], zero on tokens that do not count.
    """

    document: int
    ids: NDArray[np.int64]
    strengths: NDArray[np.float64]


class StrongestRows:
    """The rows on which each shown latent of one SAE is most active: one bounded heap per latent."""

    def __init__(self, sae: Any, latents: Sequence[int]) -> None:
        import torch

        from tl_capacity.dictionaries.encoding import Encoder

        self.sae, self.encoder = sae, Encoder(sae)
        self.latents = sorted(set(latents))
        self.slot = torch.full((self.encoder.d_sae,), -1, dtype=torch.int64)
        self.slot[torch.tensor(self.latents)] = torch.arange(len(self.latents))
        self.heaps: list[list[tuple[float, int, Candidate]]] = [[] for _ in self.latents]
        self.pushed = 0

    def look(self, activation: Tensor, batch: TokenBatch, counted: CountedTokens) -> None:
        """Look at the activations of one forward pass [row, position, ...]."""
        from tl_capacity.dictionaries.adapter import inputs_for

        rows, positions = counted.row_of_token.numpy(), counted.position_of_token.numpy()
        inputs = inputs_for(self.sae, activation.flatten(0, 1)[counted.counted.flatten().to(activation.device)])
        for entries in self.encoder.entries(inputs):
            tokens, features, values = (t.cpu() for t in entries)
            slots = self.slot[features]
            shown = slots >= 0
            token = tokens[shown].numpy()
            self._take(
                slots[shown].numpy(), rows[token], positions[token], np.abs(values[shown].double().numpy()), batch
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
            around = slice(max(0, at - BEFORE), at + AFTER + 1)
            ids = batch.tokens[row, around]
            along = np.zeros(batch.tokens.shape[1])
            along[positions[first:end]] = strengths[first:end]
            inside = ids != PADDING
            candidate = Candidate(int(batch.documents[row]), ids[inside], along[around][inside])
            self.pushed += 1
            (heapq.heappushpop if len(heap) == SNIPPETS else heapq.heappush)(heap, (peak, -self.pushed, candidate))

    def snippets(self, tokenizer: Any) -> Iterator[tuple[int, list[Snippet]]]:
        """The snippets of each latent, as text."""
        for latent, heap in zip(self.latents, self.heaps, strict=True):
            ordered = sorted(heap, key=lambda entry: entry[:2], reverse=True)
            yield latent, [_snippet(peak, candidate, tokenizer) for peak, _, candidate in ordered]


def _snippet(peak: float, candidate: Candidate, tokenizer: Any) -> Snippet:
    texts, shares = token_texts(tokenizer, candidate.ids.tolist()), (candidate.strengths / peak).tolist()
    return Snippet(peak, candidate.document, whole_characters(texts, shares))


def whole_characters(texts: Sequence[str], shares: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """Text and share of each token. Tokens that are pieces of one character are joined, with their largest share.

    Halves of characters at the ends, where the snippet was cut, are left out unless they are the most active.
    """
    pieces: list[tuple[str, float]] = []
    waiting = 0.0
    for text, share in zip(texts, shares, strict=True):
        waiting = max(waiting, share)
        if text:
            pieces.append((text, waiting))
            waiting = 0.0
    if waiting:  # what ends the row adds no text
        text, share = pieces.pop() if pieces else ("", 0.0)
        pieces.append((text, max(share, waiting)))
    if pieces and pieces[0][1] < 1:
        pieces[0] = (pieces[0][0].lstrip(BROKEN), pieces[0][1])
    if pieces and pieces[-1][1] < 1:
        pieces[-1] = (pieces[-1][0].rstrip(BROKEN), pieces[-1][1])
    return tuple(piece for piece in pieces if piece[0] or piece[1] == 1)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, it is the whole text.

    A character that is spread over several tokens comes with the last of them.
    """
    texts: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = text if end == len(ids) else text.rstrip(BROKEN)
        texts.append(whole[len(done) :])
        done = whole if len(whole) > len(done) else done
    return texts
