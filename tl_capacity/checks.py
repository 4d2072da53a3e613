"""Run-time type checks of public functions, so that a wrong argument in a notebook is named where it was passed; nothing that runs per batch is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, BeartypeViolationVerbosity, beartype

from tl_capacity.errors import ArgumentTypeError

Function = TypeVar("Function", bound=Callable[..., Any])

# An int is accepted where a float is asked for, as type checkers do.
_check = beartype(
    conf=BeartypeConf(violation_param_type=ArgumentTypeError, violation_verbosity=BeartypeViolationVerbosity.MINIMAL, is_pep484_tower=True, is_color=False)
)


def checked(function: Function) -> Function:
    """Check a public function's arguments against its annotations, array shapes included; a mismatch raises `ArgumentTypeError`."""
    return _check(function)
