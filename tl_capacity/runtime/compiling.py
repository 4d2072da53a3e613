"""Compiling: functions that `torch.compile` makes one pass of, where that works and pays off."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from tl_capacity.runtime.logs import log

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

COMPILE = "TL_CAPACITY_COMPILE"
"""An environment variable: 1 compiles at once on any device, 0 never compiles."""
GRAPHS = 64
"""Most forms that a function is compiled for: shapes, precisions and options of all SAEs of a session."""
COMPILED_AFTER = 256
"""Calls on CUDA before compiling pays off. Compiling takes as long as some thousands of them."""


def compiling_wanted() -> str | None:
    """The value of the environment variable; None where it is not set, so that CUDA alone compiles, where it pays."""
    return os.environ.get(COMPILE)


class Compiled(Generic[Arguments, Result]):
    """A function that is compiled once it was called often enough on a device.

    Until then, and where compiling fails, which is logged once, a call gives None, so that the caller goes another way.
    """

    def __init__(self, function: Callable[Arguments, Result], wanted: str | None) -> None:
        """
        Args:
            function: to be compiled. It must write to none of its arguments: PyTorch's compiler has put such a write
                before reads that come first (pytorch/pytorch#94693, #198270), and the result was silently wrong.
            wanted: what `compiling_wanted` said.
        """
        self._compiles_after: dict[str, int] = {"cuda": COMPILED_AFTER} if wanted is None else {}
        self._at_once, self._calls = wanted == "1", 0
        self._function, self._compiled = function, None
        self._fails = False

    def due(self, device: torch.device) -> bool:
        """Whether the next call compiles the function, or finds it compiled."""
        after = 0 if self._at_once else self._compiles_after.get(device.type)
        return not self._fails and after is not None and self._calls >= after

    def __call__(self, device: torch.device, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result | None:
        """What the function gives, or None where it is not compiled on this device yet.

        Raises:
            torch.OutOfMemoryError: where the device has too little memory.
        """
        due = self.due(device)
        self._calls += 1
        if not due:
            return None
        try:
            # A run holds compiled models back, whose graphs would go past hooks; there are none here.
            # A compiler that has compiled too often would run the function step by step, which nobody would notice.
            limits = torch._dynamo.config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True)
            with torch.compiler.set_stance("default"), limits, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a compiler warns of its own libraries, and of products not in here
                compiled: Any = self._compiled or torch.compile(self._function)
                self._compiled = compiled
                result: Result = compiled(*args, **kwargs)
                return result
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a compiler stumbles over
            self._fails, self._compiled = True, None
            log.warning(
                f"torch.compile does not work here ({type(problem).__name__}): everything is computed without it"
            )
            return None
