"""Which tokens count: padding, special tokens and first positions do not. The only mask of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.text.documents import document_groups
from tl_capacity.text.streams import PADDING, TokenBatch

MASK_REASONS = ("padding", "special", "position")


class Batch:
    """What every tap must know of one forward pass: which tokens count, and which documents they are from."""

    def __init__(self, tokens: TokenBatch, mask_ids: NDArray[np.int64], skip_first: int, number: int) -> None:
        padding = tokens.tokens == PADDING
        special = np.isin(tokens.tokens, mask_ids) & ~padding
        position = (
            np.broadcast_to(np.arange(tokens.tokens.shape[1]) < skip_first, tokens.tokens.shape) & ~padding & ~special
        )
        unwanted = special | position
        counted = ~(padding | unwanted)
        self.number = number
        self.valid = torch.from_numpy(~padding)
        self.counted, self.unwanted = torch.from_numpy(counted), torch.from_numpy(unwanted)
        self.masked = torch.tensor([int(m.sum()) for m in (padding, special, position)])
        assert len(self.masked) == len(MASK_REASONS)
        self.n_counted = int(counted.sum())
        self._documents = tokens.documents
        self.documents = torch.from_numpy(tokens.documents)
        self.groups = torch.from_numpy(document_groups(tokens.documents))
        self.row_of_token, self.position_of_token = (torch.from_numpy(place) for place in np.nonzero(counted))
        self.unique_documents: list[int] = list(dict.fromkeys(tokens.documents.tolist()))
        self.counted_documents: list[int] = tokens.documents[counted.any(1)].tolist()

    def checked(self, every: int) -> Tensor:
        """bool [row]: whether the reconstruction is checked on the row's document; the first document always is, the
        others by another hash.
        """
        chosen = (document_groups(self._documents + 2**40, every) == 0) | (self._documents == 0)
        return torch.from_numpy(chosen)


def special_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of every special token that the tokenizer or the model's configuration names. Id 0 is valid (GPT-NeoX); some
    configurations list several, some -1 for none.
    """
    ids = set(getattr(tokenizer, "all_special_ids", None) or ())
    for holder in (getattr(model, "config", None), tokenizer):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            ids |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return sorted(int(i) for i in ids if int(i) >= 0)
