"""The examples in docstrings: what they show is what comes out."""

from __future__ import annotations

import doctest

from tl_capacity import theory


def test_examples_hold() -> None:
    failed, attempted = doctest.testmod(theory)
    assert not failed
    assert attempted >= len(theory.__all__)


def test_every_public_function_has_an_example() -> None:
    shown = {test.name.rpartition(".")[2] for test in doctest.DocTestFinder().find(theory) if test.examples}
    assert set(theory.__all__) <= shown
