"""What the core asks of a dictionary: the protocol that every SAE fulfils."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any


class _ByItems(type(Protocol)):  # type: ignore[misc]
    """An instance is anything that has the members. From Python 3.12 on, a protocol's own check misses the parameters
    of PyTorch's modules, which no class holds.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        return all(hasattr(instance, name) for name in ("W_dec", "cfg", "encode", "decode"))


@runtime_checkable
class SparseAutoencoder(Protocol, metaclass=_ByItems):
    """A dictionary as the core sees it. Every SAELens inference class is one.

    `encode` maps activations [token, d_in] to latents [token, feature]; an entry is active where it is not zero.
    `decode` maps them back. `cfg` has `d_in` and `d_sae`; where it also has SAELens' `metadata`, the hook name is read
    from it.
    """

    W_dec: Tensor
    cfg: Any

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, feature_acts: Tensor, /) -> Tensor: ...


BASES = ("neurons", "pca")
"""How the architecture name of a basis begins. A basis has as many features as the hook point has dimensions, whatever
the model holds.
"""
