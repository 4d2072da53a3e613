"""Wrong types of arguments, as a user meets them: in a process of its own, since while tests run another type checker
stands before every function.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tl_capacity.errors import ArgumentTypeError, CapacityError
from tl_capacity.runtime.checks import checked

MISTAKES = """
from tl_capacity import Measurement, add_capacity_hooks
from tl_capacity import load_sae
for mistake in (
    lambda: Measurement.load(3),
    lambda: add_capacity_hooks(None, [], fvu_every="8"),
    lambda: add_capacity_hooks(None, [], alive_threshold=None),
    lambda: add_capacity_hooks(None, [], importance=4),
    lambda: load_sae(None),
):
    try:
        mistake()
    except TypeError as problem:
        print(type(problem).__name__, problem)
"""


def test_public_functions_name_the_argument() -> None:
    said = subprocess.run(
        [sys.executable, "-c", MISTAKES], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(said) == 5
    for line, words in zip(
        said, ("folder=3", "fvu_every='8'", "alive_threshold=", "importance=4", "spec="), strict=True
    ):
        assert line.startswith("ArgumentTypeError")
        assert words in line


@pytest.mark.parametrize("width", ["128", None, 12.5])
def test_a_mismatch_is_a_type_error_and_a_capacity_error(width: object) -> None:
    @checked
    def narrow(width: int) -> int:
        return width

    with pytest.raises(ArgumentTypeError) as raised:
        narrow(width)  # type: ignore[arg-type]
    assert isinstance(raised.value, CapacityError)
    assert isinstance(raised.value, TypeError)
    assert "\n" not in str(raised.value)


def test_an_int_passes_for_a_float() -> None:
    @checked
    def half(value: float) -> float:
        return value / 2

    assert half(3) == 1.5
