"""Layers: the hook point at which a student is read that has more or fewer layers than its teacher.

Where none is named, each of its layers is tried on the documents that fit readouts, and the best is taken. No document
that judges has a say in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tl_capacity.errors import CapacityError
from tl_capacity.models.defaults import layers_of
from tl_capacity.probing.passes import Passes
from tl_capacity.probing.read_at import ReadAt
from tl_capacity.probing.ridge import ridge_errors
from tl_capacity.results.naming import LAYER
from tl_capacity.storage.checkpoints import Checkpoint


def possible_hooks(teacher: Any, student: Any, hook: str) -> tuple[str, ...]:
    """The hook points at which a student may be read, for one hook point of its teacher.

    With as many layers as the teacher, it is the same hook point. Otherwise it is the same place in any of the
    student's layers.

    Args:
        teacher, student: models, or what has their configuration as `config` or `cfg`.
        hook: the teacher's.
    """
    layers, place = layers_of(student), LAYER.fullmatch(hook)
    if layers is None or place is None or layers == layers_of(teacher):
        return (hook,)
    return tuple(f"blocks.{layer}.{place[2]}" for layer in range(layers))


def named_hooks(given: Sequence[str], students: Sequence[str]) -> dict[str, str]:
    """The hook points that were named for students, by student.

    Args:
        given: each `STUDENT=HOOK`, or `HOOK` for all.

    Raises:
        CapacityError: where there is no such student.
    """
    hooks: dict[str, str] = {}
    for text in given:
        name, equals, hook = text.rpartition("=")
        if equals and name not in students:
            raise CapacityError(f"--student-hook {text!r} is for no student: choose one of {', '.join(students)}")
        hooks |= {name: hook} if equals else dict.fromkeys(students, hook)
    return hooks


def choose_layers(passes: Passes, hooks: Mapping[str, Sequence[str]], checkpoint: Checkpoint) -> dict[str, ReadAt]:
    """The best hook point of each student.

    It has the lowest mean over features of Σ(z − ẑ)² / Σ(z − z̄)² for a readout fitted on the fitting documents. The
    documents that choose the ridge judge it.

    Args:
        passes: that read each under the name `STUDENT at HOOK`.
        hooks: of each student by its name.
        checkpoint: goes on from where it left off.
    """
    sums = passes.sums(checkpoint, "trying layers")

    def error(name: str) -> float:
        return min(ridge_errors(sums[name].training(), sums[name].validation).values())

    return {
        student: ReadAt.best_of({hook: error(f"{student} at {hook}") for hook in several})
        for student, several in hooks.items()
    }
