"""Run-time type checks of public functions, so that a wrong argument is named where it was passed. Nothing that runs
per batch is checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from beartype import BeartypeConf, BeartypeViolationVerbosity, beartype

from tl_capacity.errors import ArgumentTypeError

Function = TypeVar("Function", bound=Callable[..., Any])

# An int is accepted where a float is asked for, as type checkers do.
_check = beartype(
    conf=BeartypeConf(
        violation_param_type=ArgumentTypeError,
        violation_verbosity=BeartypeViolationVerbosity.MINIMAL,
        is_pep484_tower=True,
        is_color=False,
    )
)


def checked(function: Function) -> Function:
    """Check a public function's arguments against its annotations, including array shapes. A mismatch raises
    `ArgumentTypeError`.
    """
    return checked_but()(function)


def checked_but(*names: str) -> Callable[[Function], Function]:
    """`checked`, except for arguments that the function checks itself with a better message.

    Of a list, beartype checks one item, which it draws from `random`. So the check stands apart from the call, and the
    user's random numbers stay as they were.
    """

    def decorate(function: Function) -> Function:
        arguments: Any = wraps(function)(lambda *args, **kwargs: None)
        arguments.__annotations__ = {
            name: hint for name, hint in function.__annotations__.items() if name not in names
        } | {"return": None}
        check = _check(arguments)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            state = random.getstate()
            try:
                check(*args, **kwargs)
            finally:
                random.setstate(state)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
