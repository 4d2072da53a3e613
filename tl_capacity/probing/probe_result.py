"""The result of probing models for concepts: each model's probes beside those of its baselines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from tl_capacity.probing.concepts import LabelledTexts
from tl_capacity.probing.probes import Probe
from tl_capacity.probing.read_at import ReadAt
from tl_capacity.probing.rows import COMPONENTS, EMBEDDINGS, RANDOM, TRAINED, ProbedConcept, ProbeRow
from tl_capacity.probing.saved_probes import Probes
from tl_capacity.probing.sparse import SparseProbe, falls_at
from tl_capacity.results.estimate import MIN_GROUPS_FOR_INTERVAL
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import table

MODELS_IN_A_TABLE = 3
TABLES = {"accuracy": "Accuracy", "auroc": "AUROC"}
"""The figures that are printed, each in tables of its own, with the name that the title has for it."""
MOST_FEATURES_SHOWN = 4
"""A sparse probe is printed if it reads at most this many features."""


@dataclass(frozen=True)
class Probed:
    """The probes of one kind on one model.

    Attributes:
        model: its name.
        kind: what was probed: the trained model, or a baseline.
        width: of the model, or of the student that the baseline stands beside.
        probes: one for each concept.
        truncated: texts that did not fit the context, by concept.
        read_at: where it was read, if elsewhere than the teacher, or if that was chosen of several hook points.
    """

    model: str
    kind: str
    width: int
    probes: tuple[Probe, ...]
    truncated: dict[str, int]
    read_at: ReadAt | None = None

    def rows(self) -> list[ProbeRow]:
        """The numbers for each concept."""
        about = {"kind": self.kind, "model": self.model, "baseline": self.kind != TRAINED, "width": self.width}
        return [ProbeRow(**(vars(probe.numbers) | about)) for probe in self.probes]


@dataclass(frozen=True)
class ProbeResult(ShownInNotebooks):
    """All fitted probes, with their weights and scores.

    Attributes:
        concepts: what was probed for.
        probed: the teacher, its students and the baselines.
        sparse: probes on few features of the teacher's SAE.
    """

    concepts: tuple[LabelledTexts, ...]
    probed: tuple[Probed, ...]
    sparse: tuple[SparseProbe, ...]

    @property
    def trained(self) -> list[Probed]:
        """The teacher and its students."""
        return [probed for probed in self.probed if probed.kind == TRAINED]

    @property
    def beside(self) -> list[dict[str, Probed]]:
        """Each model with its baselines, by what was probed; the teacher comes first."""
        models: list[dict[str, Probed]] = []
        for probed in self.probed:
            models += [{}] if probed.kind == TRAINED else []
            models[-1][probed.kind] = probed
        return models

    def falls(self) -> dict[str, int | None]:
        """For each concept, the widest student that is less accurate than the teacher beyond its interval."""
        teacher, students = self.trained[0], self.trained[1:]
        return {
            c.name: falls_at(teacher.probes[i], [s.probes[i] for s in students]) for i, c in enumerate(self.concepts)
        }

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        teacher = self.trained[0]
        few = [probe.concept for probe in teacher.probes if probe.accuracy.low is None]
        cut = sum(teacher.truncated.values())
        notes = [f"{cut:,} texts were longer than the context; only their beginning was read"] if cut else []
        notes += [
            f"{probed.model} was read at {probed.read_at.says('the validation texts')}"
            for probed in self.trained
            if probed.read_at is not None
        ]
        if few:
            notes.append(
                f"{', '.join(few)}: fewer than {MIN_GROUPS_FOR_INTERVAL} documents to test on, too few for intervals:"
                " add documents"
            )
        return notes

    def numbers(self, **about: Any) -> Probes:
        """Everything that is saved: all but weights and scores.

        Args:
            about: `settings`, `versions` and `seconds` of `Probes`.
        """
        falls, truncated = self.falls(), self.trained[0].truncated
        return Probes(
            tuple(
                ProbedConcept(c.name, c.classes, len(c.texts), truncated[c.name], falls[c.name]) for c in self.concepts
            ),
            tuple(row for probed in self.probed for row in probed.rows()),
            tuple(sparse.row(falls[sparse.probe.concept]) for sparse in self.sparse),
            **about,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything except weights and scores, as a JSON object."""
        return self.numbers().tables()

    def to_frame(self) -> Any:
        """The probes as a pandas DataFrame, with one row for each concept and each model or baseline."""
        return self.numbers().to_frame()

    def plot(self) -> Any:
        """A plotly figure of accuracy against width, with one panel for each concept."""
        return self.numbers().plot()

    def tables(self) -> Iterator[Any]:
        """Rich tables: accuracy and AUROC of a few models at a time, then the sparse probes."""
        has_baselines = len(self.probed) > len(self.trained)
        baselines = f" (of {RANDOM}; of the {COMPONENTS}, as many as d)" if has_baselines else ""
        for (score, name), first in product(TABLES.items(), range(0, len(self.trained), MODELS_IN_A_TABLE)):
            title = f"{name} of linear probes [95% interval over documents]{baselines}"
            yield table(title, *self.cells(score, first))
        if self.sparse:
            title = f"k-sparse probes on the SAE at {self.sparse[0].probe.hook}"
            yield table(title, *self.sparse_cells(), right=False)

    def cells(self, score: str, first: int = 0) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table: one row for each concept, and one column for each of a few models.

        Args:
            score: "accuracy" or "auroc".
            first: the model that the table begins with.
        """
        some, teacher = self.beside[first : first + MODELS_IN_A_TABLE], self.beside[0]
        is_accuracy = score == "accuracy"
        header = ["concept", *(["majority"] if is_accuracy else []), *([EMBEDDINGS] if EMBEDDINGS in teacher else [])]
        header += [f"{model[TRAINED].model} (d={model[TRAINED].width:,})" for model in some]
        rows = []
        for i, concept in enumerate(self.concepts):
            row = [concept.name, *([f"{teacher[TRAINED].probes[i].majority:.3f}"] if is_accuracy else [])]
            row += [getattr(teacher[EMBEDDINGS].probes[i], score).show(".3f")] if EMBEDDINGS in teacher else []
            for model in some:
                scores = {kind: getattr(probed.probes[i], score) for kind, probed in model.items()}
                baselines = [f"{scores[kind].value:.3f}" for kind in (RANDOM, COMPONENTS) if kind in scores]
                row.append(scores[TRAINED].show(".3f") + (f" ({'; '.join(baselines)})" if baselines else ""))
            rows.append(row)
        return header, rows

    def sparse_cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of sparse probes that read few features."""
        falls, ranked, has_students = self.falls(), bool(self.sparse[0].ranks), len(self.trained) > 1
        header = ["concept", "k", "accuracy", "features (importance rank)" if ranked else "features"]
        header += ["the law keeps all from width"] * ranked + ["the full probe falls at width"] * has_students
        rows = []
        for sparse in self.sparse:
            if len(sparse.features) > MOST_FEATURES_SHOWN:
                continue
            ranks = [f" ({rank or '–'})" for rank in sparse.ranks] if ranked else [""] * len(sparse.features)
            features = [f"{feature}{rank}" for feature, rank in zip(sparse.features, ranks, strict=True)]
            widths = [sparse.lost_below] * ranked + [falls[sparse.probe.concept]] * has_students
            shown = ["–" if width is None else f"{width:,}" for width in widths]
            accuracy = sparse.probe.accuracy.show(".3f")
            rows.append([sparse.probe.concept, str(len(features)), accuracy, " ".join(features), *shown])
        return header, rows
