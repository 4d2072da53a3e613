"""Placement: what it costs in nats to make students keep chosen features, and which other features they lose
for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.placement.price import Price as Price
    from tl_capacity.placement.result import Placement as Placement

# A saved price list is read without importing torch.
__getattr__, __all__ = lazily(__name__, __file__)
