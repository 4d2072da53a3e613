"""Where tests run: on the device that `pytest --device` names, the CPU by default."""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "TL_CAPACITY_TEST_DEVICE"
"""Holds the device for helpers that are no fixtures, and for processes that tests start."""


def device() -> str:
    """The device under test, as torch names it."""
    return os.environ.get(VARIABLE, "cpu")


def on_cpu() -> bool:
    return device() == "cpu"


def placed(thing: Any) -> Any:
    """A model, SAE or tensor on the device under test; where that is the CPU, the very same object."""
    return thing if on_cpu() else thing.to(device())
