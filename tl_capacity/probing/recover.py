"""Recoverability: which features of the teacher's SAE a linear readout finds in a student's residual stream.

Latents are rectified and rare, so R² says little even of the teacher's own stream. What counts is how well a readout's
score tells when the feature fires, beside three baselines that are read out in the same way: the teacher itself, a
student with random weights, and as many principal components of the teacher as the student is wide.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from tl_capacity.dictionaries.adapter import dictionary_digest
from tl_capacity.dictionaries.rows import counted_positions
from tl_capacity.errors import CapacityError, DictionaryError, TokenSourceError
from tl_capacity.interfaces import CapacityLaw, SparseAutoencoder
from tl_capacity.models.forward import evaluating
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import budgets, context_at, knows_enough
from tl_capacity.probing.layers import choose_layers, possible_hooks
from tl_capacity.probing.passes import RANDOM, TEACHER, Passes, Reader, components_of
from tl_capacity.probing.read_at import ReadAt
from tl_capacity.probing.recovery import TAU, Recovery, StudentRecovery
from tl_capacity.probing.ridge import CHOOSING_FEATURES
from tl_capacity.probing.splitting import check_parts
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.out_of_memory import within_device_memory
from tl_capacity.runtime.processes import ALONE, Processes
from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.text.counting import CountingRule

FEWER = "name fewer students, or choose another --device"
"""Advice for when the models do not all fit on a device."""


@checked
def recover_features(
    teacher: Any,
    sae: SparseAutoencoder,
    students: Mapping[str, Any],
    stream: Any,
    *,
    measured: HookMeasurement,
    random: Mapping[str, Any] | None = None,
    importance: str | None = None,
    tau: float = TAU,
    max_tokens: int | None = None,
    rule: CountingRule | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    checkpoints: tuple[Checkpoint, Checkpoint] | None = None,
    student_hooks: Mapping[str, str] | None = None,
    trying: Checkpoint | None = None,
) -> Recovery:
    """How well linear readouts of students' activations predict each alive feature of the teacher's SAE on held-out
    documents.

    Documents are split by a hash of their number: six tenths fit the readouts, one chooses each model's ridge penalty,
    three judge. Each token passes once through every model, and once through the SAE, whatever the number of students.

    Args:
        teacher: a hooked or Hugging Face model.
        sae: the SAE that was measured.
        students: models by name, read at the hook point of the same name. One that has more layers than the teacher,
            or fewer, is read at whichever of its layers tells the features best on the documents that fit.
        stream: a `TokenStream`, rows of token ids [row, position], or another iterable of batches that can be gone over
            twice.
        measured: of the teacher with the SAE: which features are alive, their importance and sparsity.
        random: for students by name, the same model with random weights: the floor.
        importance: estimator by which the theory's kept set is taken; None for the default one.
        tau: AUROC from which a feature counts as kept.
        max_tokens: read no more tokens of the stream than this, padding and special ones included.
        rule: which tokens count, best the one that the measurement recorded (`CountingRule.recorded`); by default all
            but special tokens of the teacher's tokenizer, at the positions that the SAE was trained on.
        progress: show it once it takes longer than two seconds.
        processes: that share the batches; each gets the result.
        checkpoints: of this process, for the pass that fits readouts and for the one that judges them; both go on from
            where they left off.
        student_hooks: where students are read, by their names; others as said above.
        trying: a checkpoint of the pass that tries layers, where there is one.

    Raises:
        HookPointError: where a model lacks the hook point, or it does not fire.
        DictionaryError: where the SAE is not the one that was measured.
        CapacityError: where an activation is NaN or infinite, or there are too few documents or tokens.
    """
    if max_tokens is not None and max_tokens < 1:
        raise CapacityError(
            f"{max_tokens:,} tokens are too few to read features from: ask for at least 1, in ten documents or more"
        )
    if not 0.5 <= tau <= 1:
        raise CapacityError(f"tau = {tau:g} is not an AUROC to ask for: choose one from 0.5 (chance) to 1")
    if not students:
        raise CapacityError("there is no student to read features from: pass a mapping from names to models")
    if unknown := set(student_hooks or {}) - set(students):
        raise CapacityError(
            f"a hook point is named for {', '.join(sorted(unknown))}, which is not a student: use the students' names"
        )
    if unknown := set(random or {}) - set(students):
        raise CapacityError(
            f"random weights are given for {', '.join(sorted(unknown))}, which is not a student: use the students'"
            " names"
        )
    if dictionary_digest(sae) != measured.sae_digest:
        raise DictionaryError(
            f"the SAE is not the one that was measured at {measured.hook}: its weights differ, so pass the measured one"
        )
    if isinstance(stream, Iterator):
        raise TokenSourceError(
            "the stream can be read only once, but is needed twice: pass a TokenStream, or a list of batches"
        )
    started = time.monotonic()
    estimator = measured.estimator(importance).name
    laws = _laws(measured, estimator)
    of_teacher = Reader.at_hook(teacher, measured.hook, "the teacher", TEACHER, sae)
    given = student_hooks or {}
    hooks = {
        name: (given[name],) if name in given else possible_hooks(teacher, model, measured.hook)
        for name, model in students.items()
    }
    trials = [
        Reader.at_hooks(students[name], {f"{name} at {hook}": hook for hook in several}, f"the student {name!r}")
        for name, several in hooks.items()
    ]
    if rule is None:
        rule = CountingRule.for_model(teacher, getattr(teacher, "tokenizer", None)).at(counted_positions(None, [sae]))
    check_parts(stream, rule, max_tokens)
    fitting, judging = checkpoints or (Checkpoint(None, {}), Checkpoint(None, {}))
    passes_of = partial(
        Passes,
        sae=sae,
        measured=measured,
        stream=stream,
        rule=rule,
        max_tokens=max_tokens,
        progress=progress,
        processes=processes,
    )
    with ExitStack() as modes:
        modes.enter_context(within_device_memory(f"the teacher with {len(students)} students", FEWER))
        for model in (teacher, *students.values(), *(random or {}).values()):
            modes.enter_context(evaluating(model))
        read_at = {name: ReadAt(several[0], {}) for name, several in hooks.items()}
        if trying_some := [reader for reader in trials if len(reader.points) > 1]:
            passes = passes_of([of_teacher, *trying_some], most_features=CHOOSING_FEATURES)
            to_choose = {name: several for name, several in hooks.items() if len(several) > 1}
            read_at |= choose_layers(passes, to_choose, trying or Checkpoint(None, {}))
        readers = [of_teacher]
        for name, model in students.items():
            readers.append(Reader.at_hook(model, read_at[name].hook, f"the student {name!r}", name))
        for name, model in (random or {}).items():
            who = f"the student {name!r} with random weights"
            readers.append(Reader.at_hook(model, read_at[name].hook, who, f"{name} {RANDOM}"))
        passes = passes_of(readers)
        readouts, sources = passes.fit(tuple(students), fitting)
        scores = passes.judge(readouts, sources, judging)
    recovered = [
        StudentRecovery(
            name,
            width,
            scores[name],
            scores.get(f"{name} {RANDOM}"),
            scores[components_of(width)],
            None if read_at[name] == ReadAt(measured.hook, {}) else read_at[name],
        )
        for name, width in ((name, passes.widths[name]) for name in students)
    ]
    return Recovery(
        measured,
        estimator,
        scores[TEACHER],
        tuple(sorted(recovered, key=lambda student: student.width)),
        passes.tokens,
        tau,
        round(time.monotonic() - started, 1),
        laws,
    )


def _laws(measured: HookMeasurement, importance: str) -> tuple[CapacityLaw, ...]:
    """The registered capacity laws that apply to the hook point's width; the default one comes first.

    Raises:
        PluginError: where a law fails, before anything is read.
    """
    at = context_at(measured, measured.importance(importance), measured.summary.alpha.value)
    laws = plugins().capacity_laws
    able = [law for law in sorted(laws, key=lambda law: law is not laws.default) if knows_enough(law, at)]
    for law in able:
        budgets(law, [measured.width], at)
    return tuple(able)
