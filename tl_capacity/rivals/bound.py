"""rank_bound: the least KL, in nats, that a student of some width can have on a text, as its logits have no higher
rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl_capacity.errors import CapacityError
from tl_capacity.predict.floors import checked_widths
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.results.estimate import group_means
from tl_capacity.rivals.low_rank import BoundSettings as BoundSettings
from tl_capacity.rivals.low_rank import divergence_sums, fitted, leading_directions
from tl_capacity.rivals.text import TeacherText, heldout_text, interval_notes
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.storage.digests import tensors_digest
from tl_capacity.text.streams import source_of

RANK_BOUND = "rank_bound"
FEW = 20
"""With fewer tokens per dimension of a width, logits of that rank can fit the text because it is short."""


@checked
def rank_bound(
    model: Any,
    stream: Any,
    widths: Sequence[int],
    settings: BoundSettings | None = None,
    *,
    max_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Forecasts:
    """The least KL(teacher ‖ student) that L-BFGS finds for logits W h_t + b of each rank, in nats per token at T = 1.

    W, b and one h_t for each token are free, so no student of that width is below the minimum on this text, with a bias
    in its head or without. What is found is at or above the minimum, never below, and is not certified: a search that
    stops early gives a bound that is too high. The minimum itself rises with the number of tokens.

    Memory is that of the last hidden states, of W and of h, some twenty times over (L-BFGS remembers ten steps); logits
    exist for a chunk of tokens at a time.

    Args:
        model: the teacher: a hooked or Hugging Face model.
        stream: the text that students are judged on: a `TokenStream`, or rows of token ids [row, position].
        widths: d_S of each student.
        settings: when the search stops.
        max_tokens: read no more predicted tokens of the stream than this, but whole batches.
        checkpoint: a file for the widths that are done, with which the same call goes on after it was stopped; a width
            that was under way begins anew. It stays when all are done.
        progress: show it once it takes longer than two seconds.

    Raises:
        CapacityError: where a width cannot be, no text is left, the logits are not the head's, or a checkpoint is of
            another teacher, text or search.
    """
    widths, settings, started = checked_widths(widths), settings or BoundSettings(), time.monotonic()
    if not widths:
        raise CapacityError("there is no width to bound: pass at least one, such as 16")
    text = TeacherText.read(model, heldout_text(stream, max_tokens), progress)
    state = Checkpoint(None if checkpoint is None else Path(checkpoint), {**_identity(text), **asdict(settings)})
    sums = {int(width): tensor.numpy() for width, tensor in state.tensors.items()}
    fits: dict[str, Any] = dict(state.about)
    directions = leading_directions(text)
    for width in sorted(widths):
        if width in sums:
            continue
        with token_progress(settings.iterations, progress, f"bounding width {width:,}", "iterations") as advance:
            fit = fitted(text, directions, width, settings, advance)
        sums[width] = divergence_sums(text, fit.low_rank)
        fits[str(width)] = {"iterations": fit.iterations, "gain": fit.gain}
        state.save({str(each): torch.from_numpy(values) for each, values in sums.items()}, fits)
    best = lowest_so_far(sums)
    floors = group_means(np.stack([best[width] for width in widths], 1), text.tokens)
    about = {
        "source": source_of(stream),
        "tokens": len(text),
        "vocabulary": len(text.head.weight),
        "rank_of_the_teacher": directions.whole.rank,
        "settings": asdict(settings),
        "searches": {str(width): fits[str(width)] for width in widths},
        "versions": library_versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    records = tuple(Forecast(RANK_BOUND, width, floor) for width, floor in zip(widths, floors, strict=True))
    return Forecasts(records, about, (*_notes(text, widths, settings, fits), *interval_notes(floors)))


def lowest_so_far(sums: Mapping[int, NDArray[np.float64]]) -> dict[int, NDArray[np.float64]]:
    """For each width, the sums [group] of the lowest bound of it and all narrower ones.

    Logits of a lower rank also count as logits of a higher rank.
    """
    best: dict[int, NDArray[np.float64]] = {}
    lowest: NDArray[np.float64] | None = None
    for width in sorted(sums):
        lowest = sums[width] if lowest is None or sums[width].sum() < lowest.sum() else lowest
        best[width] = lowest
    return best


def _identity(text: TeacherText) -> dict[str, str]:
    """What must be the same for a checkpoint to be used."""
    tensors = {"hidden": text.hidden, "weight": text.head.weight}
    if text.head.bias is not None:
        tensors["bias"] = text.head.bias
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {"teacher_on_this_text": tensors_digest(held, str(text.head.cap), str(text.groups.tolist()))}


def _notes(text: TeacherText, widths: Sequence[int], settings: BoundSettings, fits: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the bounds."""
    notes = [
        f"{RANK_BOUND} is what an optimiser found and is not certified: the true bound on these {len(text):,} tokens is"
        " at or below it"
    ]
    going = [width for width in widths if fits[str(width)]["gain"] >= max(settings.tolerance, 1e-12)]
    if going:
        gain = max(fits[str(width)]["gain"] for width in going)
        shown = ", ".join(f"{width:,}" for width in going)
        notes.append(
            f"{RANK_BOUND} was still falling at {'width' if len(going) == 1 else 'widths'}"
            f" {shown} after {settings.iterations:,} iterations, by up to {gain:.1%} in the last"
            " twenty: allow more --iterations"
        )
    if few := [width for width in widths if len(text) < FEW * width]:
        shown = ", ".join(f"{width:,}" for width in few)
        notes.append(
            f"{len(text):,} tokens are few for {'width' if len(few) == 1 else 'widths'} {shown}:"
            f" logits of that rank can nearly fit so short a text, so {RANK_BOUND} is lower than on more text"
        )
    return notes
