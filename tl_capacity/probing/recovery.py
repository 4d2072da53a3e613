"""Recovery: which features of the teacher's SAE are found in its students, beside what the theory predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.interfaces import CapacityContext, CapacityLaw
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import budgets, context_at, kept_features
from tl_capacity.probing.read_at import ReadAt
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery_row import COUNTS, RecoveryRow
from tl_capacity.probing.scores import Scores
from tl_capacity.probing.splitting import HELD_OUT
from tl_capacity.results.estimate import MIN_GROUPS_FOR_INTERVAL, Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, table, terminal_notes
from tl_capacity.storage.files import write_bytes
from tl_capacity.text.documents import DOCUMENT_GROUPS

MIN_FIRINGS = 10
"""A feature is judged if it fires, and is silent, on at least this many held-out tokens.

With fewer, AUROC ≥ 0.95 can be chance.
"""
TAU = 0.95
TAUS = tuple(round(0.80 + 0.01 * i, 2) for i in range(20))


@dataclass(frozen=True)
class StudentRecovery:
    """The readouts of one student, and of what it is compared with.

    Attributes:
        name: as it was passed.
        width: of its activations.
        student: readout of the student.
        random: of the same student with random weights; None where none was given.
        pca: of the teacher's leading principal components, as many as the student is wide.
        read_at: the hook point that it was read at, where that is not the teacher's or was chosen; None else.
    """

    name: str
    width: int
    student: Scores
    random: Scores | None
    pca: Scores
    read_at: ReadAt | None = None


@dataclass(frozen=True)
class Recovery(ShownInNotebooks):
    """Which features of one SAE linear readouts find in the teacher and in its students.

    It shows itself in a terminal and a notebook.

    Attributes:
        measured: the measurement that says which features are alive and how important they are.
        importance: the importance estimator that the prediction rests on.
        teacher: readout of the teacher's own stream: the ceiling.
        students: in the order of their widths.
        tokens: counted tokens by what they were used for.
        tau: AUROC from which a feature counts as kept.
        seconds: what it cost, in wall-clock seconds.
        laws: each registered capacity law that knows the widths it looks at, the default one first.
    """

    measured: HookMeasurement
    importance: str
    teacher: Scores
    students: tuple[StudentRecovery, ...]
    tokens: Mapping[str, int] = field(default_factory=dict)
    tau: float = TAU
    seconds: float = 0.0
    laws: tuple[CapacityLaw, ...] = ()

    @property
    def hook(self) -> str:
        """The hook point of the teacher."""
        return self.measured.hook

    @cached_property
    def features(self) -> NDArray[np.int64]:
        """Number of each alive latent in the SAE [feature]. All other arrays here have the same order."""
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
        """Whether each feature is judged and found by a readout [feature]."""
        return scores.kept(self.tau if tau is None else tau) & self.judged

    def count(self, scores: Scores, tau: float | None = None) -> Estimate:
        """How many features a readout finds, with a 95% interval over documents."""
        return scores.count(self.tau if tau is None else tau, self.judged)

    def budgets(self, width: int) -> dict[str, float]:
        """How many features each capacity law allows a student of that width, by the law's name."""
        return {law.name: float(budgets(law, [width], self._at)[0]) for law in self.laws}

    def predicted(self, width: int, law: str | None = None) -> NDArray[np.bool_]:
        """Whether the theory lets a student of that width keep each feature [feature].

        It keeps the F_S most important ones. If no law is named, F_S is the default law's.
        """
        kept = kept_features(plugins().capacity_laws.named(law), width, self._at)
        return most_important(self.importances, kept)

    def overlap(self, student: StudentRecovery) -> dict[str, Any]:
        """How far the kept features are the predicted ones, beside what chance gives; judged features only.

        Returns:
            `predicted`: judged features among the F_S most important; `kept_of_predicted`: the share of them that is
            kept; `kept_of_all`: the share of all judged features that is kept, which it would be by chance; `ordered`:
            of the k kept, the share that is among the k most important; `ordered_by_chance`: k over the judged. None
            where there is nothing to take a share of.
        """
        kept, judged = self.kept(student.student)[self.judged], int(self.judged.sum())
        predicted = self.predicted(student.width)[self.judged]
        ordered = most_important(self.importances[self.judged], int(kept.sum()))

        def share(features: NDArray[np.bool_]) -> float | None:
            return float(kept[features].mean()) if features.any() else None

        return {
            "predicted": int(predicted.sum()),
            "kept_of_predicted": share(predicted),
            "kept_of_all": share(np.ones(judged, dtype=bool)),
            "ordered": share(ordered),
            "ordered_by_chance": float(kept.mean()) if judged and kept.any() else None,
        }

    @cached_property
    def rows(self) -> tuple[RecoveryRow, ...]:
        """The numbers of each student, without those of single features."""
        return tuple(self._row(student) for student in self.students)

    def to_json(self) -> list[dict[str, Any]]:
        """One object per student."""
        return Recoverability(self.rows).to_json()

    def save_arrays(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write all figures of every feature to `features-HOOK.safetensors` in a folder, with what they were made from.

        Raises:
            CapacityError: where it cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays().items()}
        write_bytes(folder / f"features-{self.hook}.safetensors", save(arrays, {"about": json.dumps(about)}))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All figures of every feature, as stored on disk: `teacher/auroc`, `STUDENT/pca/r2` and so on [feature]."""
        readouts = {"teacher": self.teacher}
        for student in self.students:
            readouts |= {
                f"{student.name}/{name}": scores
                for name, scores in _readouts(self, student).items()
                if name != "teacher"
            }
        figures = ("auroc", "auroc_error", "average_precision", "average_precision_error", "r2")
        by_readout = {
            f"{name}/{figure}": getattr(scores, figure) for name, scores in readouts.items() for figure in figures
        }
        firings = self.teacher.firings.sum(0).astype(np.int64)
        return {
            "features": self.features,
            "importance": self.importances,
            "firings": firings,
            "judged": self.judged,
            **by_readout,
        }

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table, with one row for each student."""
        header = ["student", "kept", "random weights", "PCA", "teacher"]
        header += ["d·g(α)" if law.name == plugins().capacity_laws.default.name else law.name for law in self.laws]
        header += ["of predicted (of all)", "median AP", "median R²"]
        return header, [_cells(row) for row in self.rows]

    def title(self) -> str:
        """The title of the table."""
        return (
            f"Features with AUROC ≥ {self.tau:g} at {self.hook}, of {int(self.judged.sum()):,} judged and"
            f" {len(self.features):,} alive, on {self.tokens[HELD_OUT]:,} held-out tokens [95% interval over"
            " documents]; AP and R² of the student (of random weights – of the teacher)"
        )

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        groups = int((self.teacher.firings.sum(1) > 0).sum())
        notes = [
            f"{student.name} was read at {student.read_at.says('the documents that fit')}"
            for student in self.students
            if student.read_at is not None
        ]
        if groups >= MIN_GROUPS_FOR_INTERVAL:
            return notes
        return [
            *notes,
            f"features fire in {groups} of {DOCUMENT_GROUPS} groups of held-out documents, too few for intervals: read"
            " more documents",
        ]

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each student: counts with intervals, budgets, overlap and medians."""
        return Recoverability(self.rows).to_frame()

    def plot(self) -> Any:
        """A plotly figure of the features kept against the student's width; see `recovery_figure`."""

        return recovery_figure([self])

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table(self.title(), *self.cells())
        yield from terminal_notes(self.notes())

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.title())}</p>{html_table(*self.cells())}{html_notes(self.notes())}"

    def __repr__(self) -> str:
        return f"Recovery({self.hook}; {len(self.features):,} features in {', '.join(s.name for s in self.students)})"

    @property
    def _at(self) -> CapacityContext:
        return context_at(self.measured, self.importances, self.measured.summary.alpha.value)

    def _row(self, student: StudentRecovery) -> RecoveryRow:
        readouts, elsewhere = _readouts(self, student), student.read_at
        return RecoveryRow(
            student=student.name,
            width=student.width,
            hook=self.hook,
            tau=self.tau,
            n_features=len(self.features),
            n_judged=int(self.judged.sum()),
            counts={COUNTS[name]: self.count(scores) for name, scores in readouts.items()},
            budgets={law: Estimate(budget) for law, budget in self.budgets(student.width).items()},
            predicted=int(self.predicted(student.width).sum()),
            overlap={name: float(share) for name, share in self.overlap(student).items() if share is not None},
            readouts={name: self._typical(scores) for name, scores in readouts.items()},
            by_tau={
                tau: {name: float(self.kept(scores, tau).sum()) for name, scores in readouts.items()} for tau in TAUS
            },
            tokens=dict(self.tokens),
            student_hook=None if elsewhere is None else elsewhere.hook,
            tried={} if elsewhere is None else dict(elsewhere.tried),
        )

    def _typical(self, scores: Scores) -> dict[str, float]:
        """Medians over judged features, and the largest AUROC error that binning can have caused."""
        if not self.judged.any():
            return {"ridge": scores.ridge}
        return {
            **{
                name: float(np.median(getattr(scores, name)[self.judged]))
                for name in ("auroc", "average_precision", "r2")
            },
            "largest_auroc_error": float(scores.auroc_error[self.judged].max()),
            "ridge": scores.ridge,
        }


def most_important(importances: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Whether each feature is among the `count` most important ones [feature]."""
    chosen = np.zeros(len(importances), dtype=bool)
    chosen[np.argsort(-importances, kind="stable")[:count]] = True
    return chosen


def _readouts(recovery: Recovery, student: StudentRecovery) -> dict[str, Scores]:
    """The readouts that are compared at one width."""
    readouts = {"student": student.student, "random": student.random, "pca": student.pca, "teacher": recovery.teacher}
    return {name: scores for name, scores in readouts.items() if scores is not None}


def _cells(row: RecoveryRow) -> list[str]:
    """A row of the table."""
    counts = [row.counts[key].show(",.0f") if key in row.counts else "–" for key in COUNTS.values()]
    budgets = [f"{budget.value:,.0f}" for budget in row.budgets.values()]
    predicted, by_chance = (
        f"{row.overlap[name]:.0%}" if name in row.overlap else "–" for name in ("kept_of_predicted", "kept_of_all")
    )
    typical = []
    for name in ("average_precision", "r2"):
        student, *others = (
            _shown(row.readouts[readout].get(name))
            for readout in ("student", "random", "teacher")
            if readout in row.readouts
        )
        typical.append(f"{student} ({' – '.join(others)})")
    where = "" if row.student_hook is None else f", {row.student_hook}{', chosen' if row.tried else ''}"
    return [f"{row.student} (d={row.width:,}{where})", *counts, *budgets, f"{predicted} ({by_chance})", *typical]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"  # what rounds to zero has no sign


def recovery_figure(recoveries: Sequence[Recovery]) -> Any:
    """A plotly figure of the features kept against the student's width, one panel for each hook point.

    The budget and the baselines stand beside it.
    """
    from tl_capacity.probing.figures import recoverability_figure

    return recoverability_figure([recovery.rows for recovery in recoveries])
