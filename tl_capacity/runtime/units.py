"""Sizes and times as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from tl_capacity.errors import CapacityError

BYTES = {"MB": 10**6, "GB": 10**9}
NATS = "nats per token"
"""The unit of a student's KL. A floor predicted in this unit needs no factor."""


def bytes_in(text: str) -> int:
    """The number of bytes that `500MB` or `4GB` means, exactly. A fraction of a byte is dropped.

    Raises:
        CapacityError: where the text is no size.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", text.strip())
    if not size:
        raise CapacityError(f"{text!r} is not a size: write it as 500MB or 4GB")
    return int(Fraction(size[1]) * BYTES[size[2]])


def show_bytes(count: int) -> str:
    """A number of bytes, in the unit that fits best."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def show_seconds(seconds: float) -> str:
    """A number of seconds, in the unit that fits best."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def per_token(unit: str) -> str:
    """A unit of importance with "per token", which is added if it is missing."""
    return unit if unit.endswith("per token") else f"{unit} per token"
