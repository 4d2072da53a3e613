"""Ablation: the exact KL to the clean output when a latent is set to zero. Importances in nats can be checked against
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from tl_capacity.dictionaries.adapter import (
    check_dictionary,
    decoder_scale,
    decoder_vectors,
    inputs_for,
    target_hook,
)
from tl_capacity.dictionaries.encoding import decoder_vectors_add_up
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.models.forward import device_of, evaluating
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.runtime.progress import token_progress


@torch.no_grad()
def ablation_kl(
    model: Any,
    hook: str,
    sae: Any,
    tokens: Int64[Tensor, "row position"],
    latents: Sequence[int],
    *,
    counted: Bool[Tensor, "row position"] | None = None,
    rows_at_once: int = 8,
    progress: bool = False,
) -> Float64[Tensor, " latent"]:
    """KL(clean ‖ ablated) of the next-token distribution, in nats per counted token, with one latent at a time set to
    zero wherever it fires.

    The SAE's error is left in place: what is taken from the activation is zᵢ·w_dec,i. Rows in which a latent does not
    fire cost nothing.

    Args:
        model: a model with TransformerLens hooks, or a Hugging Face model of a registered family.
        hook: the hook point.
        sae: an SAE whose `decode` adds up decoder vectors.
        tokens: token ids without padding.
        latents: which latents to ablate.
        counted: the tokens at which latents are ablated and by whose number the KL is divided; all by default.
        rows_at_once: rows in one forward pass.
        progress: show the remaining time.

    Raises:
        DictionaryError: where the SAE cannot be ablated latent by latent.
        HookPointError: where there is no such hook point, or the model does not run it.
        CapacityError: where a latent does not exist, or nothing is counted.
    """
    check_dictionary(sae, hook)
    if target_hook(sae, hook) is not None:
        raise DictionaryError(
            f"the SAE at {hook} writes to another hook point, so its latents cannot be ablated here: pass an SAE "
            "that writes where it reads"
        )
    n_latents = int(sae.W_dec.shape[0])
    wrong = [latent for latent in latents if not 0 <= latent < n_latents]
    tokens = tokens.cpu()  # the sums are kept there; each batch goes to the model
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted.cpu()
    if wrong or not counted.any():
        raise CapacityError(
            f"there are no latents {wrong} among {n_latents:,}: choose numbers from 0 to {n_latents - 1}"
            if wrong
            else "no token counts, so no latent can be ablated: pass tokens that are not special or padding"
        )
    point, chosen = reading_of(model, sae, hook).point, torch.tensor(list(latents), dtype=torch.int64)
    total, linear = torch.zeros(len(chosen), dtype=torch.float64), None
    decoder, scale = decoder_vectors(sae), decoder_scale(sae)
    seen: list[Tensor] = []
    with evaluating(model), token_progress(len(tokens), progress, "ablating", "rows") as advance:
        for rows in torch.split(torch.arange(len(tokens)), rows_at_once):
            seen.clear()
            with _edited(point, seen.append):
                clean = _log_probabilities(model, tokens[rows])
            if not seen:
                raise HookPointError(f"{hook} did not fire: the model does not run it, choose another hook point")
            inputs = inputs_for(sae, seen[0].flatten(0, 1)).to(sae.W_dec.device)
            linear = decoder_vectors_add_up(sae, inputs) if linear is None else linear
            if linear is False:
                raise DictionaryError(
                    "the SAE does not write the sum of its decoder vectors, so a single latent cannot be removed: "
                    "choose another SAE"
                )
            encoded = sae.encode(inputs).to_dense()
            encoded = encoded if scale is None else encoded * scale
            # zᵢ [row, position, latent] of the chosen latents at counted tokens, zero elsewhere.
            strength = (
                encoded[:, chosen.to(encoded.device)].unflatten(0, tuple(tokens[rows].shape)).cpu()
                * counted[rows, :, None]
            )
            fires = (strength != 0).any(1).nonzero()  # [pair, (row, latent)]
            for pairs in torch.split(fires, rows_at_once) if len(fires) else ():
                row, latent = pairs.unbind(1)
                change = (
                    -strength[row, :, latent, None].to(decoder) * decoder[chosen[latent].to(decoder.device)][:, None]
                )
                with _edited(point, partial(_changed, change)):
                    ablated = _log_probabilities(model, tokens[rows][row])
                total.index_add_(0, latent, (clean[row].exp() * (clean[row] - ablated)).sum((1, 2)).cpu().double())
            advance(int(rows[-1]) + 1)
    return total / int(counted.sum())


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities [row, position, vocabulary] of the next token. The last position is counted too, although its
    token is not in the row.
    """
    output: Any = model(tokens.to(device_of(model)))
    logits: Tensor = getattr(output, "logits", output)
    return logits.float().log_softmax(-1)


def _changed(change: Tensor, activation: Tensor) -> Tensor:
    return activation + change.view_as(activation).to(activation)


@contextmanager
def _edited(point: TapPoint, edit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While the block runs, see the activation at a tap point and replace it if `edit` returns another."""
    remove = point.edit(edit)
    try:
        yield
    finally:
        remove()
