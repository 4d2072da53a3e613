"""Judge students that somebody else trained, beside their teacher, on held-out text.

One pass over the text serves all of them. What is written is a `DistillationRun`, so that every stage that reads one
reads it too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl_capacity.distillation.comparison import Predictor, compare_models
from tl_capacity.distillation.curves import GIVEN, StudentCurve
from tl_capacity.distillation.data import HELDOUT_EVERY, Rows, model_inputs, read_to_judge
from tl_capacity.distillation.judged import MEANS, Judged
from tl_capacity.distillation.run import JSON_NAME, DistillationRun
from tl_capacity.errors import CapacityError
from tl_capacity.models.defaults import width_of
from tl_capacity.models.forward import check_row_length, check_token_ids, device_of, evaluating
from tl_capacity.models.identity import Identity
from tl_capacity.models.loading import LoadedModel
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.logs import ended_early, log
from tl_capacity.runtime.processes import ALONE, Processes
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.runtime.versions import library_versions
from tl_capacity.storage.digests import fingerprint
from tl_capacity.text.counting import special_token_ids
from tl_capacity.text.same_tokens import check_same_tokens, last_token
from tl_capacity.text.streams import PADDING, source_of


@checked
def observe(
    teacher: Any,
    students: Mapping[str, Any],
    stream: Any,
    *,
    tokens: int = 50_000,
    held_out: bool = False,
    batch_rows: int = 8,
    out: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> DistillationRun:
    """A run that says how given students predict held-out text beside their teacher.

    For every document it has KL(teacher ‖ student) at T = 1, the cross-entropy of both, and top-1 agreement. Means have
    95% intervals over documents.

    Students may be of any family, depth and width. They must make the same tokens of a text as the teacher. Where
    models have more logits than others, as with embedding matrices that were padded, all are compared on the first that
    they have in common, and the log says so.

    Args:
        teacher: a Hugging Face causal language model, a `HookedTransformer`, a `TransformerBridge`, or what
            `load_model` returned.
        students: such models by name.
        stream: text that no student was trained on: a `TokenStream`, or rows of token ids [row, position].
        tokens: predicted tokens to judge on.
        held_out: read only those documents of the stream that `distill` holds out of its training text.
        batch_rows: rows in a forward pass.
        out: a folder for the result; None keeps it in memory.
        progress: show it once it takes longer than two seconds.
        processes: that share the batches; each gets the result.

    Raises:
        CapacityError: where a student needs other tokens or shorter rows than it is given, predicts NaN, or the folder
            holds a distillation already.
        TokenSourceError: where the text has no token to predict.
    """
    if not students:
        raise CapacityError("there is no student to judge: pass a mapping from names to models")
    if tokens < 1 or batch_rows < 1:
        raise CapacityError(f"tokens = {tokens} and batch_rows = {batch_rows} judge nothing: choose numbers above 0")
    folder = None if out is None else Path(out)
    check_new(folder)
    started = time.monotonic()
    judge = Party.of("the teacher", teacher)
    parties = [Party.of(f"the student {name!r}", student) for name, student in students.items()]
    rows = rows_to_judge(judge, parties, stream, tokens, held_out)
    judged, predictors, vocabulary = judge_students(judge, parties, rows, batch_rows, progress, processes)
    run = DistillationRun(
        students=tuple(
            party.as_student(name, seen) for name, party, seen in zip(students, parties, judged, strict=True)
        ),
        teacher=judge.name,
        teacher_width=judge.width,
        fingerprint=fingerprint(judge.model),
        heldout_source=source_of(stream),
        heldout_tokens=int(rows.predicted.sum()),
        heldout_digest=rows.digest,
        settings={
            "tokens": tokens,
            "held_out": held_out,
            "batch_rows": batch_rows,
            "context": int(rows.tokens.shape[1]),
            "compared_logits": vocabulary,
            "logits": {name: p.vocabulary for name, p in zip(("teacher", *students), predictors, strict=True)},
        },
        versions=library_versions(),
        seconds=round(time.monotonic() - started, 1),
    )
    if folder is not None and processes.first:
        run.save(folder)
    processes.wait()
    return run


def check_new(folder: Path | None) -> None:
    """Refuse a folder that already holds a distillation.

    Raises:
        CapacityError: where it does.
    """
    if folder is not None and (folder / JSON_NAME).exists():
        raise CapacityError(f"{folder} already holds a {JSON_NAME}: choose another --out")


@dataclass(frozen=True)
class Party:
    """The teacher, or a student to judge.

    Attributes:
        who: in a sentence.
        name: as it was loaded by.
        place, revision: where it was loaded from.
    """

    who: str
    name: str
    model: Any
    tokenizer: Any
    place: str = ""
    revision: str | None = None

    @classmethod
    def of(cls, who: str, given: Any) -> Party:
        """The party for a model that was passed, loaded or not.

        Raises:
            CapacityError: where it is no language model.
        """
        if isinstance(given, LoadedModel):
            return cls(who, given.name, given.model, given.tokenizer, _place(given.name), given.revision)
        if not isinstance(given, torch.nn.Module) or not (hasattr(given, "config") or hasattr(given, "cfg")):
            raise CapacityError(
                f"{who} is a {type(given).__name__}, which predicts no tokens: pass a causal language model, such as"
                " one from load_model"
            )
        return cls(who, Identity.according_to(given).name, given, getattr(given, "tokenizer", None))

    @property
    def width(self) -> int:
        """Dimensions of the residual stream, from the configuration."""
        cfg = getattr(self.model, "cfg", None)
        return int(cfg.d_model) if cfg is not None else width_of(self.model.config)

    def as_student(self, name: str, judged: Judged) -> StudentCurve:
        """The student's entry in a run."""
        kl = judged.figures["kl"].value
        return StudentCurve(
            name,
            self.width,
            0,
            GIVEN,
            *_parameters(self.model),
            tokens=(0,),
            heldout_kl=(kl,),
            place=self.place,
            revision=self.revision,
            judged=judged,
        )


def rows_to_judge(judge: Party, students: Sequence[Party], stream: Any, tokens: int, held_out: bool = False) -> Rows:
    """The rows on which students are judged. All models can read them.

    Args:
        judge: the teacher.
        stream, tokens, held_out: as for `observe`.

    Raises:
        CapacityError: where a student needs other tokens, or shorter rows.
        TokenSourceError: where the text has no token to predict.
    """
    for party in students:
        check_same_tokens(judge.tokenizer, party.tokenizer, party.who, stream)
    rows = read_to_judge(
        stream, tokens, HELDOUT_EVERY if held_out else 1, special_token_ids(judge.model, judge.tokenizer)
    )
    for party in (judge, *students):
        check_token_ids(party.model, rows.tokens[rows.tokens != PADDING], party.who)
        check_row_length(party.model, rows.tokens, party.who)
    if (predicted := int(rows.predicted.sum())) < tokens:
        log.warning(ended_early(predicted, tokens))
    return rows


def judge_students(
    judge: Party,
    students: Sequence[Party],
    rows: Rows,
    batch_rows: int = 8,
    progress: bool = False,
    processes: Processes = ALONE,
) -> tuple[list[Judged], list[Predictor], int]:
    """The result of each student, the predictors of teacher and students, and how many logits were compared.

    Models are left in the modes that they were in.

    Raises:
        CapacityError: where a model predicts NaN, or too few tokens, or they are on several devices.
    """
    parties = (judge, *students)
    with ExitStack() as modes:
        for party in parties:
            modes.enter_context(evaluating(party.model))
        first = torch.from_numpy(rows.trimmed(slice(0, 1))).to(device_of(judge.model))
        predictors = [Predictor.of(party.model, first) for party in parties]
        vocabulary = _common_vocabulary(parties, predictors, rows)
        return _judge(predictors, rows, vocabulary, batch_rows, progress, processes), predictors, vocabulary


def _common_vocabulary(parties: Sequence[Party], predictors: Sequence[Predictor], rows: Rows) -> int:
    """The number of logits that all models have, with a message if some have more.

    Raises:
        CapacityError: where the text has a token that one cannot predict, or devices differ.
    """
    devices = {str(device_of(party.model)) for party in parties}
    if len(devices) > 1:
        raise CapacityError(f"the models are on {' and '.join(sorted(devices))}: move them to one device")
    last = max(int(rows.tokens.max()), last_token(parties[0].tokenizer))
    for party, predictor in zip(parties, predictors, strict=True):
        if predictor.vocabulary <= last:
            raise CapacityError(
                f"{party.who} has {predictor.vocabulary:,} logits, but there are {last + 1:,} tokens to predict: judge"
                " students of the teacher's vocabulary"
            )
    common = min(predictor.vocabulary for predictor in predictors)
    wider = [
        f"{party.who} has {predictor.vocabulary:,} logits"
        for party, predictor in zip(parties, predictors, strict=True)
        if predictor.vocabulary > common
    ]
    if wider:
        log.warning(f"{', '.join(wider)}: all models are compared on the first {common:,}, which they have in common")
    return common


def _judge(
    predictors: Sequence[Predictor],
    rows: Rows,
    vocabulary: int,
    batch_rows: int,
    progress: bool,
    processes: Processes,
) -> list[Judged]:
    """Each student, judged on every row.

    Raises:
        CapacityError: where a prediction is NaN or infinite.
    """
    assert rows.documents is not None  # as `read_to_judge` gives them
    documents, place = np.unique(rows.documents, return_inverse=True)
    sums = np.zeros((len(MEANS), len(predictors) - 1, len(documents)))
    tokens = np.zeros(len(documents), dtype=np.int64)
    np.add.at(tokens, place, rows.predicted)
    scratch, seen = Scratch(), 0
    with torch.no_grad(), token_progress(int(tokens.sum()), progress and processes.first, "judging") as advance:
        for some in processes.share(list(_batches(predictors, rows, batch_rows))):
            tokens_of_batch = model_inputs(rows.trimmed(some), device_of(predictors[0].model))
            values = compare_models(predictors, *tokens_of_batch, vocabulary, scratch).figures().cpu().numpy()
            if not np.isfinite(values).all():
                raise CapacityError(
                    f"a prediction is NaN or infinite in document {int(rows.documents[some][0])} or one near it: check"
                    " the models' dtype and weights"
                )
            for document, of_document in _by_document(place[some], rows.predicted[some], values):
                sums[:, :, document] += of_document
            seen += int(rows.predicted[some].sum())
            advance(seen)
    sums = processes.sum(torch.from_numpy(sums)).numpy()
    return [
        Judged.of_sums(documents, tokens, dict(zip(MEANS, sums[:, student], strict=True)))
        for student in range(len(predictors) - 1)
    ]


def _by_document(
    places: NDArray[np.int64], predicted: NDArray[np.int64], values: NDArray[np.float64]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The sums [figure, student] over the tokens of each row, with its document."""
    for place, row in zip(places.tolist(), np.split(values, np.cumsum(predicted)[:-1], axis=2), strict=True):
        yield place, row.sum(2)


def _batches(predictors: Sequence[Predictor], rows: Rows, batch_rows: int) -> Iterator[slice]:
    """Rows that pass through the models together; one at a time if logits cannot be computed in chunks."""
    at_once = 1 if any(predictor.head is None for predictor in predictors) else batch_rows
    for start in range(0, len(rows.tokens), at_once):
        yield slice(start, start + at_once)


def _parameters(model: Any) -> tuple[int, int]:
    """Number of parameters: all, and without embeddings and head."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if hasattr(model, "hook_dict"):
        ends = [model.embed, model.unembed]
    else:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(p): p.numel() for end in ends if end is not None for p in end.parameters()}
    return total, total - sum(outside.values())


def _place(name: str) -> str:
    """A folder as an absolute path; a hub id or a plugin's name stays as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name
