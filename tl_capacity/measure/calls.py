"""Calls: the token ids of each plain call of a model, read at its embedding. So it does not matter how the model is
called.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tl_capacity.errors import CapacityError
from tl_capacity.measure.sequences import BLOCK_CACHE_ARGUMENT, CACHE_ARGUMENTS, Sequence, Sequences, cached_places
from tl_capacity.models.forward import embedding_of
from tl_capacity.models.hooks import ModelHook
from tl_capacity.text.streams import PADDING

HIDDEN = -1e3
"""What a mask adds to the score of a token that is hidden: less than this. Masks have −10⁴, the least number or −∞."""


@dataclass(frozen=True)
class Call:
    """The tokens, mask and cache of one plain call of a model.

    Attributes:
        tokens: int64 [row, position] token ids, `PADDING` where the attention mask says so.
        before: int64 [row] how many tokens of the row were given to earlier calls, whose keys and values are cached.
        documents: int64 [row] the documents of the rows where they go on with an earlier call's, else None.
        masked: whether an attention mask came with the tokens.
    """

    tokens: NDArray[np.int64]
    before: NDArray[np.int64]
    documents: NDArray[np.int64] | None
    masked: bool


class _Thread(threading.local):
    """What is known of a thread's current call: which module was called, its mask and cache, token ids not yet turned
    into a call, the rows of the call before, and whether calls are watched.
    """

    called: nn.Module | None = None
    mask: Any = None
    cache: Any = None
    waiting: NDArray[np.int64] | None = None
    before: NDArray[np.int64] | None = None
    watched = True


class Calls:
    """Watches a model's calls until it is removed.

    The embedding sees the token ids, whichever way they come. The model is given the attention mask and the cache, and
    hands them to the model inside it, whose hooks are asked too: `TransformerBridge.run_with_cache` goes past those of
    the bridge, and users of a Hugging Face model call it without its head. `HookedTransformer.generate` goes past the
    hooks of the model itself, so that both are seen at its first block.
    """

    def __init__(self, model: Any, on_call: Callable[[Call], NDArray[np.int64] | None]) -> None:
        """
        Args:
            model: the model.
            on_call: is given each call, and returns the documents [row] that its rows are counted as; None where they
                are not.
        """
        self._on_call, self._sequences = on_call, Sequences()
        self._models = {each: list(inspect.signature(each.forward).parameters) for each in _models_in(model)}
        self._thread, self._warned, self._warned_of_mask = _Thread(), False, False
        watched = [*((each, self._see_options) for each in self._models), (embedding_of(model), self._see_ids)]
        first_block = _block_with_cache(model)
        self._waits = first_block is not None
        if first_block is not None:
            watched.append((first_block, self._see_block))
        self._handles = [module.register_forward_pre_hook(ModelHook(see), with_kwargs=True) for module, see in watched]
        self._handles += [
            each.register_forward_hook(ModelHook(self._see_end), always_call=True) for each in self._models
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch the calls that this thread makes inside the block."""
        self._thread.watched = False
        try:
            yield
        finally:
            self._thread.watched = True

    def remove(self) -> None:
        """Remove our hooks and no others."""
        for handle in self._handles:
            handle.remove()

    def _see_options(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._models[module], args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        cache = next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)
        thread, inside = self._thread, self._thread.called not in (None, module)
        if inside:  # what the model outside made of its own arguments
            thread.mask = mask if _is_of_tokens(mask) or thread.mask is None else thread.mask
            thread.cache = thread.cache if cache is None else cache
            return
        thread.called, thread.mask, thread.cache = module, mask, cache
        if thread.watched:
            self._begin_embedded(given.get("inputs_embeds"))

    def _see_end(self, module: nn.Module, *_: Any) -> None:
        if self._thread.called is module:
            self._thread.called = self._thread.mask = self._thread.cache = None

    def _begin_embedded(self, embedded: Any) -> None:
        """Begin a call that is given embeddings, whose ids the model's embedding was given just before it.

        Raises:
            CapacityError: where it was not.
        """
        rows, self._thread.waiting = self._thread.waiting, None
        if not isinstance(embedded, Tensor):
            return
        if rows is None or rows.shape != embedded.shape[:2]:
            raise CapacityError(
                f"the model is called with inputs_embeds {list(embedded.shape)} that its own embedding did not just"
                " make, so it is not known which tokens they are: pass input_ids, or inputs_embeds ="
                " model.get_input_embeddings()(input_ids)"
            )
        self._begin(rows)

    def begin_waiting(self) -> None:
        """Begin the call whose token ids were seen, if it still waits for its cache."""
        if self._thread.waiting is not None:
            self._begin(self._thread.waiting)

    def _see_ids(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        ids = next((value for value in given if isinstance(value, Tensor) and not value.is_floating_point()), None)
        if ids is None or not self._thread.watched:
            return
        rows = ids.detach().cpu().numpy().astype(np.int64)
        if self._waits or self._thread.called is None:  # or the user embeds tokens, and gives them to the model later
            self._thread.waiting = rows
        else:
            self._begin(rows)

    def _see_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread.waiting is not None:
            mask = kwargs.get("attention_mask")
            self._thread.mask = self._thread.mask if mask is None else mask
            self._thread.cache = kwargs.get(BLOCK_CACHE_ARGUMENT)
            self._begin(self._thread.waiting)

    def _begin(self, rows: NDArray[np.int64]) -> None:
        mask, cache = self._thread.mask, self._thread.cache
        if isinstance(mask, Mapping):  # one for each kind of layer, or none where nothing is to be masked
            mask = next((each for each in mask.values() if each is not None), None)
        # The next call may go past the model's own forward, and then has neither.
        self._thread.mask = self._thread.cache = self._thread.waiting = None
        present = _present(rows.shape, mask, cached_places(cache))
        if present is not None:
            rows[~present[:, -rows.shape[1] :]] = PADDING
        elif mask is not None:
            self._warn_of_mask(mask)
        self._warn_of_repetition(rows, cache)
        earlier = self._sequences.continued(cache, len(rows))
        documents = None if earlier is None else earlier.documents
        if earlier is None:
            earlier = Sequence.unknown(cached_places(cache) or 0, rows, present)
        documents = self._on_call(Call(rows, earlier.tokens, documents, present is not None))
        if documents is not None:
            self._sequences.note(cache, earlier.with_more(rows != PADDING, documents))

    def _warn_of_mask(self, mask: Any) -> None:
        """Warn once if an attention mask does not say where padding is."""
        if not self._warned_of_mask:
            self._warned_of_mask = True
            kind = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            warnings.warn(
                f"a call of the model has an attention mask {kind}, which does not say which tokens are padding, so all"
                " of them count: pass one with a number for each token [row, position]",
                stacklevel=2,
            )

    def _warn_of_repetition(self, rows: NDArray[np.int64], cache: Any) -> None:
        """Warn once if a call begins with all the tokens of the call before."""
        before, self._thread.before = self._thread.before, rows
        longer = before is not None and cache is None and rows.shape == (len(before), before.shape[1] + 1)
        if longer and not self._warned and bool((rows[:, :-1] == before).all()):
            self._warned = True
            warnings.warn(
                "a call of the model begins with all the tokens of the call before, and counts them again (generate "
                "without a cache?): use the cache, so that each token counts once",
                stacklevel=2,
            )


def _block_with_cache(model: Any) -> nn.Module | None:
    """The first block of a HookedTransformer. It receives its part of the cache."""
    first = next(iter(getattr(model, "blocks", None) or ()), None)
    takes = isinstance(first, nn.Module) and BLOCK_CACHE_ARGUMENT in inspect.signature(first.forward).parameters
    return first if takes else None


def _models_in(model: nn.Module) -> list[nn.Module]:
    """A model, and those inside it that are given its attention mask: a bridge's, and a Hugging Face model's without
    its head.
    """
    whole = getattr(model, "original_model", model)
    base = whole if hasattr(model, "hook_dict") and whole is model else getattr(whole, "base_model", whole)
    return list(dict.fromkeys(each for each in (model, whole, base) if isinstance(each, nn.Module)))


def _is_of_tokens(mask: Any) -> bool:
    """Whether an attention mask has a number for each token."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def _present(shape: tuple[int, ...], mask: Any, cached: int | None) -> NDArray[np.bool_] | None:
    """Where an attention mask says that there is a token, for the last positions of each row; None if it does not say.

    A mask [row, head, query, key] is asked whether a token may attend to itself.

    Args:
        cached: positions of a cache, which come before.
    """
    if not isinstance(mask, Tensor) or len(mask) not in (1, shape[0]):
        return None
    if _is_of_tokens(mask) and len(mask) == shape[0] and mask.shape[1] >= shape[1]:
        return np.asarray(mask.numpy(force=True) != 0)
    if mask.ndim == 4 and cached is not None and mask.shape[2] == shape[1] and mask.shape[3] >= cached + shape[1]:
        own = mask[:, 0].diagonal(cached, 1, 2)[:, : shape[1]]
        lets = own if own.dtype == torch.bool else own > HIDDEN
        return np.asarray(lets.expand(shape[0], -1).numpy(force=True))
    return None
