"""Feature recoverability: which features of the teacher's SAE a linear readout still finds in a student's residual
stream.

Latents are rectified and rare, so R² says little even of the teacher's own stream. What counts is how well a readout's
score tells when the feature fires, beside three baselines that are read out in the same way: the teacher itself, a
student with random weights, and as many principal components of the teacher as the student is wide.
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tl_capacity.dictionaries.adapter import dictionary_digest
from tl_capacity.dictionaries.encoding import Encoder
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError, TokenSourceError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.models.forward import activation_at, evaluating
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import kept_features
from tl_capacity.probing.ranking import Ranking, Scores
from tl_capacity.probing.ridge import Latents, Moments, Readout, fit, principal_axes
from tl_capacity.results.estimate import MIN_GROUPS_FOR_INTERVAL, Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.processes import ALONE, Processes
from tl_capacity.runtime.progress import token_progress
from tl_capacity.show.figures import add_series
from tl_capacity.show.palette import BLUE, GREEN, PURPLE, VERMILION
from tl_capacity.show.tables import html_table, table
from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.text.counting import Batch, special_token_ids
from tl_capacity.text.documents import DOCUMENT_GROUPS, document_groups
from tl_capacity.text.streams import PADDING, TokenBatch, as_batches
from tl_capacity.theory import budget

SCHEMA = 1
FIT, VALIDATION, HELD_OUT = "fit", "validation", "held-out"
TENTHS = (HELD_OUT,) * 3 + (VALIDATION,) + (FIT,) * 6
"""What each tenth of the documents is for."""
SPLIT_SALT = 2**41
"""Added to a document's number, so that the split is independent of the groups that the bootstrap resamples."""
MIN_FIRINGS = 10
"""Held-out tokens on which a feature must fire, and be silent, to be judged: with fewer, AUROC ≥ 0.95 comes about by
chance.
"""
TAU = 0.95
TAUS = tuple(round(0.80 + 0.01 * i, 2) for i in range(20))
TEACHER, RANDOM = "teacher", "with random weights"
COUNTS = {"student": "kept", "random": "kept_random", "pca": "kept_pca", "teacher": "kept_teacher"}
"""What is read out at each width, and the name of its number of kept features in JSON."""
SHOWN = (
    ("student", BLUE, "circle"),
    ("student with random weights", VERMILION, "square"),
    ("teacher's principal components, as many as d", GREEN, "diamond"),
    ("teacher", PURPLE, "cross"),
)


@dataclass(frozen=True)
class StudentRecovery:
    """What was read out of one student, and of what it is compared with.

    Attributes:
        name: as it was passed.
        width: of its activations.
        student: readout of the student.
        random: of the same student with random weights; None where none was given.
        pca: of the teacher's leading principal components, as many as the student is wide.
    """

    name: str
    width: int
    student: Scores
    random: Scores | None
    pca: Scores


@dataclass(frozen=True)
class Recovery:
    """Which features of one SAE linear readouts find, in the teacher and in its students; shows itself in a terminal
    and a notebook.

    Attributes:
        measured: the measurement that says which features are alive and how important they are.
        importance: the importance estimator that the prediction rests on.
        teacher: readout of the teacher's own stream: the ceiling.
        students: in the order of their widths.
        tokens: counted tokens by what they were used for.
        tau: AUROC from which a feature counts as kept.
        seconds: what it cost, in wall-clock seconds.
    """

    measured: HookMeasurement
    importance: str
    teacher: Scores
    students: tuple[StudentRecovery, ...]
    tokens: Mapping[str, int] = field(default_factory=dict)
    tau: float = TAU
    seconds: float = 0.0

    @property
    def hook(self) -> str:
        """Where activations were read."""
        return self.measured.hook

    @cached_property
    def features(self) -> NDArray[np.int64]:
        """Number of each alive latent in the SAE [feature]; the order of every other array here."""
        return np.flatnonzero(self.measured.summary.alive)

    @cached_property
    def importances(self) -> NDArray[np.float64]:
        """Importance [feature]."""
        return self.measured.importance(self.importance)

    @cached_property
    def judged(self) -> NDArray[np.bool_]:
        """Whether each feature fires, and is silent, on enough held-out tokens to be judged [feature]."""
        firings = self.teacher.firings.sum(0)
        return np.asarray((firings >= MIN_FIRINGS) & (self.teacher.tokens - firings >= MIN_FIRINGS))

    def kept(self, scores: Scores, tau: float | None = None) -> NDArray[np.bool_]:
        """Whether each feature is judged, and found by a readout [feature]."""
        return scores.kept(self.tau if tau is None else tau) & self.judged

    def count(self, scores: Scores, tau: float | None = None) -> Estimate:
        """How many features a readout finds, with a 95% interval over documents."""
        return scores.count(self.tau if tau is None else tau, self.judged)

    def predicted(self, width: int, law: str = "compressed_sensing") -> NDArray[np.bool_]:
        """Whether each feature is among the F_S most important ones, which the theory lets a student of that width keep
        [feature].
        """
        kept = kept_features(self.importances, self.measured.summary.alpha.value, width, plugins().capacity_laws[law])
        return most_important(self.importances, kept)

    def overlap(self, student: StudentRecovery) -> dict[str, Any]:
        """How the kept set compares with the predicted one, among judged features, and with what chance would give.

        Returns:
            `predicted`: judged features among the F_S most important; `kept_of_predicted`: the share of them that is
            kept; `kept_of_all`: the share of all judged features that is kept, which it would be by chance; `ordered`:
            of the k kept, the share that is among the k most important; `ordered_by_chance`: k over the judged. None
            where there is nothing to take a share of.
        """
        kept, judged = self.kept(student.student)[self.judged], int(self.judged.sum())
        predicted = self.predicted(student.width)[self.judged]
        ordered = most_important(self.importances[self.judged], int(kept.sum()))

        def share(of: NDArray[np.bool_]) -> float | None:
            return float(kept[of].mean()) if of.any() else None

        return {
            "predicted": int(predicted.sum()),
            "kept_of_predicted": share(predicted),
            "kept_of_all": share(np.ones(judged, dtype=bool)),
            "ordered": share(ordered),
            "ordered_by_chance": float(kept.mean()) if judged and kept.any() else None,
        }

    def to_json(self) -> list[dict[str, Any]]:
        """One object per student."""
        alpha = self.measured.summary.alpha.value
        found = []
        for student in self.students:
            readouts = _readouts(self, student)
            counts = {name: self.count(scores) for name, scores in readouts.items()}
            found.append(
                {
                    "schema": SCHEMA,
                    "student": student.name,
                    "width": student.width,
                    "hook": self.hook,
                    "tau": self.tau,
                    **{key: int(counts[name].value) if name in counts else None for name, key in COUNTS.items()},
                    "budget": budget(student.width, alpha),
                    "equilibrium": (
                        student.width
                        * plugins().capacity_laws["equilibrium"].features_per_dimension(alpha, self.importances)
                    ),
                    "predicted": int(self.predicted(student.width).sum()),
                    "n_features": len(self.features),
                    "n_judged": int(self.judged.sum()),
                    "intervals": {
                        name: None if e.low is None or e.high is None else [e.low, e.high] for name, e in counts.items()
                    },
                    "overlap": self.overlap(student),
                    "by_tau": {
                        f"{tau:.2f}": {name: int(self.kept(scores, tau).sum()) for name, scores in readouts.items()}
                        for tau in TAUS
                    },
                    "readouts": {name: self._typical(scores) for name, scores in readouts.items()},
                    "tokens": dict(self.tokens),
                }
            )
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every figure of every feature, as it lies on disk: `teacher/auroc`, `STUDENT/pca/r2` and so on [feature]."""
        readouts = {"teacher": self.teacher}
        for student in self.students:
            readouts |= {
                f"{student.name}/{name}": scores
                for name, scores in _readouts(self, student).items()
                if name != "teacher"
            }
        figures = ("auroc", "auroc_error", "average_precision", "average_precision_error", "r2")
        of_readouts = {
            f"{name}/{figure}": getattr(scores, figure) for name, scores in readouts.items() for figure in figures
        }
        firings = self.teacher.firings.sum(0).astype(np.int64)
        return {
            "features": self.features,
            "importance": self.importances,
            "firings": firings,
            "judged": self.judged,
            **of_readouts,
        }

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table: a row for each student."""
        header = [
            "student",
            "kept",
            "random weights",
            "PCA",
            "teacher",
            "d·g(α)",
            "equilibrium",
            "of predicted (of all)",
            "median AP",
            "median R²",
        ]
        rows = []
        for student, row in zip(self.students, self.to_json(), strict=True):
            readouts, overlap = _readouts(self, student), row["overlap"]
            counts = [
                self.count(readouts[name]).show(",.0f") if name in readouts else "–"
                for name in ("student", "random", "pca", "teacher")
            ]
            shares = [
                "–" if overlap[name] is None else f"{overlap[name]:.0%}"
                for name in ("kept_of_predicted", "kept_of_all")
            ]
            typical = []
            for name in ("average_precision", "r2"):
                own, *others = (
                    _shown(row["readouts"][readout][name])
                    for readout in ("student", "random", "teacher")
                    if readout in readouts
                )
                typical.append(f"{own} ({' – '.join(others)})")
            budgets = [f"{row[name]:,.0f}" for name in ("budget", "equilibrium")]
            rows.append(
                [f"{student.name} (d={student.width})", *counts, *budgets, f"{shares[0]} ({shares[1]})", *typical]
            )
        return header, rows

    def title(self) -> str:
        """What the table shows."""
        return (
            f"Features with AUROC ≥ {self.tau:g} at {self.hook}, of {int(self.judged.sum()):,} judged and"
            f" {len(self.features):,} alive, on {self.tokens[HELD_OUT]:,} held-out tokens [95% interval over"
            " documents]; AP and R² of the student (of random weights – of the teacher)"
        )

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        groups = int((self.teacher.firings.sum(1) > 0).sum())
        if groups >= MIN_GROUPS_FOR_INTERVAL:
            return []
        return [
            f"features fire in {groups} of {DOCUMENT_GROUPS} groups of held-out documents, too few for intervals: read"
            " more documents"
        ]

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each student: counts with their intervals, budgets, overlap and medians."""
        import pandas

        flat = []
        for row in self.to_json():
            names = (
                "student",
                "width",
                "hook",
                "tau",
                *COUNTS.values(),
                "budget",
                "equilibrium",
                "predicted",
                "n_features",
                "n_judged",
            )
            cells = {name: row[name] for name in names}
            for readout, key in COUNTS.items():
                cells |= dict(
                    zip((f"{key} low", f"{key} high"), row["intervals"].get(readout) or (None, None), strict=True)
                )
            cells |= {f"overlap {name}": value for name, value in row["overlap"].items()}
            cells |= {
                f"{name} {readout}": value
                for readout, values in row["readouts"].items()
                for name, value in values.items()
            }
            flat.append(cells)
        return pandas.DataFrame(flat)

    def plot(self) -> Any:
        """A plotly figure of the features kept against the student's width; see `recovery_figure`."""
        return recovery_figure([self])

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table(self.title(), *self.cells())
        for note in self.notes():
            yield f"[yellow]note:[/yellow] {note}"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>note: {escape(note)}</p>" for note in self.notes())
        return f"<p>{escape(self.title())}</p>{html_table(*self.cells())}{notes}"

    def __repr__(self) -> str:
        return f"Recovery({self.hook}; {len(self.features):,} features in {', '.join(s.name for s in self.students)})"

    def _typical(self, scores: Scores) -> dict[str, float | None]:
        """Medians over judged features, and the largest error of an AUROC that binning may have caused."""
        found = {
            name: np.median(getattr(scores, name)[self.judged]) if self.judged.any() else None
            for name in ("auroc", "average_precision", "r2")
        }
        worst = scores.auroc_error[self.judged].max() if self.judged.any() else None
        return {
            **{name: None if v is None else float(v) for name, v in found.items()},
            "largest_auroc_error": worst,
            "ridge": scores.ridge,
        }


@checked
def recover_features(
    teacher: Any,
    sae: SparseAutoencoder,
    students: Mapping[str, Any],
    stream: Any,
    *,
    measured: HookMeasurement,
    random: Mapping[str, Any] | None = None,
    importance: str = "second_moment",
    tau: float = TAU,
    max_tokens: int | None = None,
    mask_token_ids: Sequence[int] | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    checkpoints: tuple[Checkpoint, Checkpoint] | None = None,
) -> Recovery:
    """How well linear readouts of students' activations predict each alive feature of the teacher's SAE on held-out
    documents.

    Documents are split by a hash of their number: six tenths fit the readouts, one chooses each model's ridge penalty,
    three judge. Each token passes once through every model, and once through the SAE, whatever the number of students.

    Args:
        teacher: a hooked or Hugging Face model.
        sae: the SAE that was measured.
        students: models by name, read at the hook point of the same name.
        stream: a `TokenStream`, rows of token ids [row, position], or another iterable of batches that can be gone over
            twice.
        measured: of the teacher with the SAE: which features are alive, their importance and sparsity.
        random: for students by name, the same model with random weights: the floor.
        importance: estimator by which the theory's kept set is taken.
        tau: AUROC from which a feature counts as kept.
        max_tokens: read no more tokens of the stream than this, padding and special ones included.
        mask_token_ids: ids not to count; by default every special token of the teacher's tokenizer.
        progress: show it once it takes longer than two seconds.
        processes: that share the batches; each gets the result.
        checkpoints: of this process, for the pass that fits readouts and for the one that judges them; both go on from
            where they left off.

    Raises:
        HookPointError: where a model lacks the hook point, or it does not fire.
        DictionaryError: where the SAE is not the one that was measured.
        CapacityError: where an activation is NaN or infinite, or there are too few documents or tokens.
    """
    if max_tokens is not None and max_tokens < 1:
        raise CapacityError(
            f"{max_tokens:,} tokens are nothing to read features from: ask for at least 1, in ten documents or more"
        )
    if not 0.5 <= tau <= 1:
        raise CapacityError(f"tau = {tau:g} is no AUROC to ask for: choose one from 0.5, which chance gives, to 1")
    if not students:
        raise CapacityError("there is no student to read features from: pass a mapping from names to models")
    if unknown := set(random or {}) - set(students):
        raise CapacityError(
            f"random weights are given for {', '.join(sorted(unknown))}, which is no student: use the students' names"
        )
    if dictionary_digest(sae) != measured.sae_digest:
        raise DictionaryError(
            f"the SAE is not the one that was measured at {measured.hook}: its weights differ, pass the same"
        )
    if isinstance(stream, Iterator):
        raise TokenSourceError(
            "the stream can be gone over only once, but it is read twice: pass a TokenStream, or a list of batches"
        )
    started = time.monotonic()
    readers = {TEACHER: Reader.of(teacher, measured.hook, "the teacher")}
    for name, model in students.items():
        readers[name] = Reader.of(model, measured.hook, f"the student {name!r}")
    for name, model in (random or {}).items():
        readers[f"{name} {RANDOM}"] = Reader.of(model, measured.hook, f"the student {name!r} with random weights")
    mask = (
        special_token_ids(teacher, getattr(teacher, "tokenizer", None))
        if mask_token_ids is None
        else list(mask_token_ids)
    )
    passes = _Passes(
        readers, sae, measured, stream, np.array(sorted(mask), dtype=np.int64), max_tokens, progress, processes
    )
    fitting, judging = checkpoints or (Checkpoint(None, {}), Checkpoint(None, {}))
    with ExitStack() as modes:
        for reader in readers.values():
            modes.enter_context(evaluating(reader.model))
        readouts, sources = passes.fit(tuple(students), fitting)
        rankings = passes.judge(readouts, sources, judging)
    scores = {name: ranking.scores() for name, ranking in rankings.items()}
    found = [
        StudentRecovery(name, width, scores[name], scores.get(f"{name} {RANDOM}"), scores[_pca(width)])
        for name, width in ((name, passes.widths[name]) for name in students)
    ]
    return Recovery(
        measured,
        importance,
        scores[TEACHER],
        tuple(sorted(found, key=lambda student: student.width)),
        passes.tokens,
        tau,
        round(time.monotonic() - started, 1),
    )


@dataclass(frozen=True)
class Reader:
    """A model that is run up to one hook point."""

    who: str
    model: Any
    point: TapPoint

    @classmethod
    def of(cls, model: Any, hook: str, who: str) -> Reader:
        """A reader of some model.

        Raises:
            HookPointError: where the model has no such hook point.
        """
        try:
            return cls(who, model, TapPoint.of(model, hook))
        except HookPointError as problem:
            raise HookPointError(f"{who} cannot be read at {hook}: {problem}") from problem

    def __call__(self, batch: Batch, tokens: TokenBatch, filler: int) -> Float[Tensor, "token ..."]:
        """Activations of the counted tokens.

        Raises:
            HookPointError: where the hook point does not fire, or gives no vector per token.
            CapacityError: where an activation is NaN or infinite.
        """
        ids = torch.from_numpy(np.where(tokens.tokens == PADDING, filler, tokens.tokens))
        seen = activation_at(self.model, self.point, ids)
        if seen is None or seen.shape[:2] != batch.counted.shape:
            what = (
                "did not fire"
                if seen is None
                else f"has shape {tuple(seen.shape)} for tokens of shape {tuple(batch.counted.shape)}"
            )
            raise HookPointError(
                f"{self.point.name} of {self.who} {what}: choose a hook point with one vector per token"
            )
        found = seen.flatten(0, 1)[batch.counted.flatten().to(seen.device)]
        if not bool(torch.isfinite(found.sum(dtype=torch.float32))):
            raise CapacityError(
                f"{self.who} has NaN or infinite activations at {self.point.name} in batch {batch.number}: check its"
                " dtype and weights"
            )
        return found


class _Passes:
    """The two passes over the stream: one fits readouts, the other judges them."""

    def __init__(
        self,
        readers: Mapping[str, Reader],
        sae: Any,
        measured: HookMeasurement,
        stream: Any,
        mask_ids: NDArray[np.int64],
        max_tokens: int | None,
        progress: bool,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.readers, self.sae, self.stream, self.mask_ids, self.max_tokens = readers, sae, stream, mask_ids, max_tokens
        self.progress = progress and processes.first
        self.encoder = Encoder(sae)
        device = sae.W_dec.device
        # MPS has no float64, so there the sums live on the CPU.
        self.device = torch.device("cpu") if device.type == "mps" else device
        alive = np.flatnonzero(measured.summary.alive)
        self.n_features = len(alive)
        self.place = torch.full((measured.summary.d_sae,), -1, dtype=torch.int64, device=self.device)
        self.place[torch.from_numpy(alive).to(self.device)] = torch.arange(len(alive), device=self.device)
        self.tokens = dict.fromkeys((FIT, VALIDATION, HELD_OUT), 0)
        self.widths: dict[str, int] = {}

    def fit(self, students: Sequence[str], checkpoint: Checkpoint) -> tuple[dict[str, Readout], dict[str, str]]:
        """The readout of every model and of the teacher's principal components, and whose activations each reads."""
        moments: dict[tuple[str, str], Moments] = {}
        for part, name in product((FIT, VALIDATION), self.readers):
            if kept := checkpoint.part(f"{part}/{name}"):
                moments[part, name] = Moments.of_tensors(kept, self.device)
        for part, activations, latents, _ in self._batches(
            (FIT, VALIDATION),
            "fitting readouts",
            checkpoint,
            lambda: {"/".join(key): own.to_tensors() for key, own in moments.items()},
        ):
            for name, x in activations.items():
                if (part, name) not in moments:
                    moments[part, name] = Moments.zeros(x.shape[1], self.n_features, self.device)
                moments[part, name].update(x, latents)
        # A process that had no batch does not know how wide the models are.
        self.widths = dict(
            ChainMap(*self.processes.gather({name: len(found.x) for (_, name), found in moments.items()}))
        )
        for part, name in product((FIT, VALIDATION), self.readers):
            own = moments.get((part, name)) or Moments.zeros(self.widths[name], self.n_features, self.device)
            moments[part, name] = own.over_all(self.processes)
        readouts, sources = {}, {name: name for name in self.readers}
        for width in {self.widths[name] for name in students}:
            training, validation = moments[FIT, TEACHER], moments[VALIDATION, TEACHER]
            readouts[_pca(width)] = fit(training, validation, principal_axes(training, width))
            sources[_pca(width)] = TEACHER
        for name in self.readers:
            readouts[name] = fit(moments.pop((FIT, name)), moments.pop((VALIDATION, name)))
        return readouts, sources

    def judge(
        self, readouts: Mapping[str, Readout], sources: Mapping[str, str], checkpoint: Checkpoint
    ) -> dict[str, Ranking]:
        """Every readout's scores on the held-out documents."""
        rankings = {name: Ranking(readout) for name, readout in readouts.items()}
        for name, ranking in rankings.items():
            if kept := checkpoint.part(name):
                ranking.go_on_from(kept)
        for _, activations, latents, groups in self._batches(
            (HELD_OUT,),
            "judging readouts",
            checkpoint,
            lambda: {name: ranking.to_tensors() for name, ranking in rankings.items()},
        ):
            for name, ranking in rankings.items():
                ranking.update(activations[sources[name]], latents, groups)
        return {name: ranking.over_all(self.processes) for name, ranking in rankings.items()}

    def _batches(
        self,
        parts: Sequence[str],
        label: str,
        checkpoint: Checkpoint,
        sums: Callable[[], Mapping[str, Mapping[str, Tensor]]],
    ) -> Iterator[tuple[str, dict[str, Tensor], Latents, Tensor]]:
        """The part, every model's activations, the latents and the document groups of each batch of the documents of
        some parts.

        Args:
            checkpoint: batches that went into it are left out.
            sums: what was made of the batches so far, by name, to be kept in it.
        """
        filler = int(self.mask_ids[0]) if len(self.mask_ids) else 0
        done = int(checkpoint.about.get("batches", 0))
        self.tokens |= checkpoint.about.get("tokens", {})
        checkpoint.tensors.clear()  # they live on in the sums

        def save(batches: int) -> None:
            tensors = {f"{name}/{key}": tensor for name, own in sums().items() for key, tensor in own.items()}
            checkpoint.save(tensors, {"batches": batches, "tokens": {part: self.tokens[part] for part in parts}})

        number = 0
        with token_progress(None, self.progress, label) as advance:
            for number, (part, tokens) in enumerate(split(self.stream, parts, self.max_tokens), start=1):
                if number <= done or number % self.processes.count != self.processes.index:
                    continue
                batch = Batch(tokens, self.mask_ids, 0, number)
                if not batch.n_counted:
                    continue
                activations = {name: reader(batch, tokens, filler) for name, reader in self.readers.items()}
                latents = self._latents(activations[TEACHER], number)
                self.tokens[part] += batch.n_counted
                groups = batch.groups[batch.row_of_token].to(self.device)
                yield part, {name: x.flatten(1).to(self.device) for name, x in activations.items()}, latents, groups
                advance(sum(self.tokens[p] for p in parts))
                if checkpoint.due:
                    save(number)
        if number > done:
            save(number)
        self.tokens |= {p: int(self.processes.sum(torch.tensor(self.tokens[p]))) for p in parts}
        if missing := [p for p in parts if not self.tokens[p]]:
            raise TokenSourceError(
                f"no document is left for {missing[0]}: of every ten, 6 fit, 1 chooses the ridge and 3 judge, so give"
                " more documents"
            )

    def _latents(self, x: Float[Tensor, "token ..."], number: int) -> Latents:
        inputs = x if getattr(self.sae, "hook_z_reshaping_mode", False) else x.flatten(1)
        found = []
        for start in range(0, len(inputs), self.encoder.chunk):
            tokens, latents, values = (
                t.to(self.device) for t in self.encoder(inputs[start : start + self.encoder.chunk])
            )
            found.append((tokens + start, latents, values))
        tokens, latents, values = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        if not bool(torch.isfinite(values.sum())):
            raise CapacityError(f"the SAE gives NaN or infinite latents in batch {number}: check its weights")
        return Latents.of((tokens, latents, values), self.place, self.n_features, len(inputs))


def split(stream: Any, parts: Sequence[str], max_tokens: int | None = None) -> Iterator[tuple[str, TokenBatch]]:
    """Batches of the documents that belong to some parts, each of one part and with as many rows
    as the stream's own.
    """
    waiting: dict[str, list[tuple[NDArray[np.int64], int]]] = {part: [] for part in parts}
    seen, rows = 0, 1
    for batch in as_batches(stream):
        rows = max(rows, len(batch.tokens))
        for row, document, part in zip(batch.tokens, batch.documents.tolist(), parts_of(batch.documents), strict=True):
            if part in waiting:
                waiting[part].append((row, document))
        for part, some in waiting.items():
            while len(some) >= rows:
                yield part, _stacked(some[:rows])
                del some[:rows]
        seen += int((batch.tokens != PADDING).sum())
        if max_tokens is not None and seen >= max_tokens:
            break
    for part, some in waiting.items():
        if some:
            yield part, _stacked(some)


def parts_of(documents: NDArray[np.int64]) -> list[str]:
    """What each document is for, by a hash of its number."""
    return [TENTHS[tenth] for tenth in document_groups(documents + SPLIT_SALT, len(TENTHS)).tolist()]


def most_important(importances: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Whether each feature is among the `count` most important ones [feature]."""
    chosen = np.zeros(len(importances), dtype=bool)
    chosen[np.argsort(-importances, kind="stable")[:count]] = True
    return chosen


def recovery_figure(recoveries: Sequence[Recovery]) -> Any:
    """A plotly figure, a panel per hook point: features kept against the student's width, beside the budget and the
    baselines.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        cols=len(recoveries), subplot_titles=[r.hook for r in recoveries], shared_yaxes=True, horizontal_spacing=0.04
    )
    for column, recovery in enumerate(recoveries, start=1):
        at = {"row": 1, "col": column, "showlegend": column == 1}
        rows = recovery.to_json()
        widths = [row["width"] for row in rows]
        for (readout, key), (name, colour, symbol) in zip(COUNTS.items(), SHOWN, strict=True):
            with_it = [row for row in rows if row[key] is not None]
            kept = [Estimate(float(row[key]), *(row["intervals"][readout] or (None, None))) for row in with_it]
            add_series(
                figure,
                [row["width"] for row in with_it],
                kept,
                name,
                {"color": colour},
                {"color": colour, "symbol": symbol, "size": 8},
                **at,
            )
        for key, name, dash in (("budget", "d·g(α), at most F", "dash"), ("equilibrium", "equilibrium law", "dot")):
            limits = [Estimate(float(min(row[key], row["n_features"]))) for row in rows]
            # With a single width there is no line, only the marker.
            add_series(
                figure,
                widths,
                limits,
                name,
                {"color": "black", "dash": dash},
                {"color": "black", "symbol": "line-ew-open", "size": 9},
                **at,
            )
    figure.update_xaxes(title="student width d_S (dimensions)")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=f"features with AUROC ≥ τ = {recoveries[0].tau:g}", col=1)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.2})
    return figure


def _readouts(recovery: Recovery, student: StudentRecovery) -> dict[str, Scores]:
    """What is compared at one width."""
    found = {"student": student.student, "random": student.random, "pca": student.pca, "teacher": recovery.teacher}
    return {name: scores for name, scores in found.items() if scores is not None}


def _pca(width: int) -> str:
    return f"teacher's {width} principal components"


def _stacked(rows: Sequence[tuple[NDArray[np.int64], int]]) -> TokenBatch:
    """Rows of any lengths as one batch."""
    tokens = np.full((len(rows), max(len(row) for row, _ in rows)), PADDING, dtype=np.int64)
    for place, (row, _) in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return TokenBatch(
        tokens[:, : max(1, int((tokens != PADDING).sum(1).max()))],
        np.array([document for _, document in rows], dtype=np.int64),
    )


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"  # what rounds to zero has no sign
