"""Activations of labelled texts: one pooled vector for each text, from any hook point, and the tokens that it was
pooled over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import check_dictionary
from tl_capacity.dictionaries.encoding import Encoder
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.models.defaults import MEASURED_CONTEXT
from tl_capacity.models.forward import activation_at, device_of, embedding_of, evaluating, longest
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.seeds import seeded
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.tokenizing import bos_of, token_ids

POOLINGS = ("mean", "last", "token")
TOKENS_PER_TEXT = 8
"""Most tokens kept per text if tokens are kept apart. They are evenly spaced; this bounds memory."""


@dataclass(frozen=True)
class Activations:
    """Pooled activations of some texts.

    Attributes:
        hook: where they were taken.
        pooling: `mean` over a text's tokens, its `last` token, or up to eight of its tokens, each by itself (`token`).
        values: float32 [row, width]; a row is a text, or a token where tokens are kept apart.
        texts: int64 [row], the number of the text.
        tokens: ids [token] of what was pooled, for each row; special tokens are never pooled.
        truncated: texts longer than the context, of which only the beginning was read.
    """

    hook: str
    pooling: str
    values: NDArray[np.float32]
    texts: NDArray[np.int64]
    tokens: tuple[NDArray[np.int64], ...]
    truncated: int = 0

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return int(self.values.shape[1])


@checked
def collect(
    model: Any,
    hook: str,
    texts: Sequence[str],
    pooling: str = "mean",
    *,
    tokenizer: Any = None,
    sae: SparseAutoencoder | None = None,
    context: int | None = None,
    batch_rows: int = 32,
    prepend_bos: bool = True,
    progress: bool = True,
) -> Activations:
    """One pooled vector for each text, from a model that is run over all of them.

    Args:
        model: a `HookedTransformer`, a `TransformerBridge`, or a Hugging Face causal language model of a registered
            family.
        hook: the hook point; the forward pass stops there.
        texts: the texts; each is one row `[BOS, tokens…]`, of which what exceeds the context is left out and counted.
        pooling: `mean`, `last` or `token`, see `Activations`.
        tokenizer: by default the model's own.
        sae: pool its latents in place of the activations.
        context: positions in a row; by default what the model takes, at most 512.
        batch_rows: texts in a forward pass.
        prepend_bos: begin each row with the tokenizer's BOS, as TransformerLens does.

    Raises:
        HookPointError: where the model has no such hook point, or it has no vector for each token.
        CapacityError: on an unknown pooling, a context without room for a token, a text without tokens, no tokenizer,
            or activations that are not finite.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if pooling not in POOLINGS:
        raise CapacityError(f"{pooling!r} is not a pooling: choose one of {', '.join(POOLINGS)}")
    if tokenizer is None:
        raise CapacityError(f"this {type(model).__name__} has no tokenizer: pass one as tokenizer=…")
    if not texts or batch_rows < 1:
        raise CapacityError(
            f"{len(texts):,} texts in batches of {batch_rows} are nothing to collect: pass at least one text and one"
            " row"
        )
    if context is not None and context < 2:
        raise CapacityError(
            f"context = {context} has no room for BOS and a token: pass at least 2, or leave it out to use what the"
            " model takes"
        )
    point = find_tap_point(model, hook) if sae is None else reading_of(model, sae, hook).point
    pool = _latents(sae, hook) if sae is not None else _activations
    rows, truncated = _rows(
        tokenizer, texts, min(MEASURED_CONTEXT if context is None else context, longest(model)), prepend_bos
    )
    rule = CountingRule.for_model(model, tokenizer)
    chosen = [_chosen(ids, rule, pooling, number) for number, ids in enumerate(rows)]
    per_text = np.array([len(positions) if pooling == "token" else 1 for positions in chosen])
    first_row = np.cumsum(per_text) - per_text
    values: NDArray[np.float32] | None = None
    with evaluating(model), token_progress(len(texts), progress, "collecting", "texts") as advance:
        done = 0
        for batch in _batches(rows, batch_rows):
            activation = _activation(model, point, _padded([rows[i] for i in batch], rule.filler))
            place = [(row, position) for row, i in enumerate(batch) for position in chosen[i]]
            taken = activation[tuple(torch.tensor(place, device=activation.device).T)].flatten(1)
            group = np.repeat(
                np.arange(int(per_text[batch].sum())), [n for i in batch for n in _sizes(chosen[i], pooling)]
            )
            pooled = pool(taken, torch.from_numpy(group).to(taken.device))
            if not bool(torch.isfinite(pooled).all()):
                raise CapacityError(
                    f"{hook} has NaN or infinite activations on text {batch[0]} or one near it: check the model's dtype"
                    " and weights"
                )
            if values is None:
                values = np.empty((int(per_text.sum()), pooled.shape[1]), dtype=np.float32)
            values[np.concatenate([np.arange(first_row[i], first_row[i] + per_text[i]) for i in batch])] = (
                pooled.float().cpu().numpy()
            )
            advance(done := done + len(batch))
    assert values is not None  # there is a text
    tokens = [
        part
        for ids, positions in zip(rows, chosen, strict=True)
        for part in np.split(ids[positions], len(positions) if pooling == "token" else 1)
    ]
    return Activations(hook, pooling, values, np.repeat(np.arange(len(texts)), per_text), tuple(tokens), truncated)


def bag_of_embeddings(model: Any, activations: Activations) -> Activations:
    """The mean of the model's input embeddings over the pooled tokens: what the words alone tell, without their order.

    Args:
        model: the model whose tokenizer made the tokens.
    """
    ids = np.unique(np.concatenate(activations.tokens))
    with evaluating(model), torch.no_grad():
        embedding = embedding_of(model)
        table = embedding(torch.from_numpy(ids)[None].to(device_of(model)))[0].float().cpu().numpy()
    values = np.stack([table[np.searchsorted(ids, tokens)].mean(axis=0) for tokens in activations.tokens])
    return Activations(
        "embedding", activations.pooling, values, activations.texts, activations.tokens, activations.truncated
    )


def randomly_initialised(model: Any, seed: int = 0) -> Any:
    """A Hugging Face model with the same configuration and fresh weights, in eval mode.

    It shows what width and architecture tell without any training.
    """
    with seeded(seed):
        fresh = type(model)(model.config)
    return fresh.to(device_of(model)).eval()


def _rows(tokenizer: Any, texts: Sequence[str], context: int, prepend_bos: bool) -> tuple[list[NDArray[np.int64]], int]:
    """Token ids of each text within the context, and how many were longer."""
    bos = bos_of(tokenizer) if prepend_bos else None
    first = [] if bos is None else [bos]
    encoded = token_ids(tokenizer, list(texts))
    longer = sum(len(first) + len(ids) > context for ids in encoded)
    return [np.array([*first, *ids][:context], dtype=np.int64) for ids in encoded], longer


def _chosen(ids: NDArray[np.int64], rule: CountingRule, pooling: str, number: int) -> NDArray[np.int64]:
    """Positions of the tokens that are pooled or kept."""
    counted = np.flatnonzero(rule.counted(ids[None])[0])
    if not len(counted):
        raise CapacityError(
            f"text {number} has no token that counts: leave out texts that are empty or have only special tokens"
        )
    if pooling == "last":
        counted = counted[-1:]
    if pooling == "token" and len(counted) > TOKENS_PER_TEXT:
        counted = counted[np.linspace(0, len(counted) - 1, TOKENS_PER_TEXT).round().astype(int)]
    return np.asarray(counted)


def _sizes(positions: NDArray[np.int64], pooling: str) -> list[int]:
    """How many tokens go into each row of a text."""
    return [1] * len(positions) if pooling == "token" else [len(positions)]


def _batches(rows: Sequence[NDArray[np.int64]], size: int) -> Iterator[list[int]]:
    """Numbers of texts of about the same length, so that little is padded.

    The longest come first, so that a lack of memory shows at once.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(rows: Sequence[NDArray[np.int64]], filler: int) -> Tensor:
    """Rows padded on the right to one length. A causal model does not look there."""
    filled = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for row, ids in enumerate(rows):
        filled[row, : len(ids)] = ids
    return torch.from_numpy(filled)


def _activation(model: Any, point: TapPoint, tokens: Tensor) -> Tensor:
    """The activation at a hook point for a batch of tokens [row, position, ...]."""
    activation = activation_at(model, point, tokens)
    if activation is None:
        raise HookPointError(f"{point.name} did not fire: the model does not run it, tap another hook point")
    if activation.shape[:2] != tokens.shape:
        raise HookPointError(
            f"{point.name} has shape {tuple(activation.shape)}, but the tokens have shape {tuple(tokens.shape)}: tap a"
            " hook point with one vector per token"
        )
    return activation


def _activations(taken: Float32[Tensor, "token width"], group: Tensor) -> Tensor:
    """Means of activations over each group of tokens."""
    sums = torch.zeros(int(group[-1]) + 1, taken.shape[1], dtype=torch.float32, device=taken.device).index_add_(
        0, group, taken.float()
    )
    return sums / torch.bincount(group)[:, None]


def _latents(sae: SparseAutoencoder, hook: str) -> Any:
    """A function that pools an SAE's latents in the same way. It computes only the active ones."""
    check_dictionary(sae, hook)
    encoder = Encoder(sae)

    def pool(taken: Tensor, group: Tensor) -> Tensor:
        if taken.shape[1] != int(sae.cfg.d_in):
            raise HookPointError(
                f"{hook} has width {taken.shape[1]:,}, but the SAE's d_in is {sae.cfg.d_in:,}: pass an SAE that was"
                " trained on this hook point of this model"
            )
        taken, group = (part.to(sae.W_dec.device) for part in (taken, group))
        sums = torch.zeros(int(group[-1]) + 1, encoder.d_sae, dtype=torch.float32, device=taken.device)
        for tokens, features, values in encoder.entries(taken):
            sums.index_put_((group[tokens], features), values.float(), accumulate=True)
        return sums / torch.bincount(group)[:, None]

    return pool
