"""Which concepts a model and its students still tell:
`tl-capacity run probe --model TEACHER --model STUDENT … --hook H --concepts embedded --out DIR`.

Linear probes of each concept at one hook point of each model, beside a majority vote, a bag of embeddings, models with
random weights, a control task, and as many principal components of the teacher as a student is wide; and, with an SAE,
the few features that carry a concept. A run that was interrupted goes on where it was; under
`accelerate launch -m tl_capacity run probe …` each process takes some of the models.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import Any

import torch

from tl_capacity.dictionaries.adapter import dictionary_digest
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.distillation.run import JSON_NAME as DISTILLATION_JSON
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.measure.setup import measured_dictionary, tapped_model
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.models.loading import LoadedModel, load_model
from tl_capacity.probing.activations import Activations, bag_of_embeddings, collect, randomly_initialised
from tl_capacity.probing.concepts import LabelledTexts, load_concepts
from tl_capacity.probing.probes import Probe, fit_probes, on_principal_components
from tl_capacity.probing.sparse import SparseProbe, falls_at, sparse_probes
from tl_capacity.recipe import already_there, option, run_file, settings_of
from tl_capacity.results.estimate import MIN_GROUPS_FOR_INTERVAL, Estimate
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.processes import ALONE, Processes
from tl_capacity.runtime.progress import token_progress
from tl_capacity.runtime.versions import library_versions
from tl_capacity.show.figures import add_series
from tl_capacity.show.palette import BLUE, GREEN, VERMILION
from tl_capacity.show.tables import table
from tl_capacity.storage.checkpoints import Checkpoint, remove_checkpoint
from tl_capacity.storage.files import digest, make_folder, write_bytes, write_json

SCHEMA = 1
JSON_NAME, TABLE_NAME, FIGURE_NAME = "probes.json", "probes.csv", "probes.html"
TRAINED, RANDOM, COMPONENTS, EMBEDDINGS = (
    "trained",
    "random weights",
    "teacher's principal components",
    "bag of embeddings",
)
SHOWN = {TRAINED: (BLUE, "circle"), RANDOM: (VERMILION, "square"), COMPONENTS: (GREEN, "diamond")}
LEVELS = {"majority": ("dot", "cross"), "control task (teacher)": ("dashdot", "x"), EMBEDDINGS: ("dash", "star")}
"""Dash and symbol of what needs no width; of a single width only the symbol is seen."""
PANELS_IN_A_ROW = 4
MODELS_IN_A_TABLE = 3
TABLES = {"accuracy": "Accuracy", "auroc": "AUROC"}
"""What is printed of a probe, each in tables of its own, and its name in a title."""

Reader = Callable[[str], Activations]
"""Gives the activations of a concept's texts, by its name."""


@dataclass(frozen=True)
class ProbeConfig:
    """Everything that decides the result."""

    model: tuple[str, ...] = option(
        ("embedded",),
        "A model name, folder or hub id, or the folder of a distillation; may be repeated. The first is the teacher.",
    )
    hook: str = option("blocks.3.hook_resid_post", "The hook point, in TransformerLens' names.")
    concepts: tuple[str, ...] = option(
        ("embedded",),
        "Concepts, collections of them, .jsonl files or datasets ids; `tl-capacity plugins` lists the first two.",
    )
    out: Path = option(Path("runs/probes"), "The folder to write.")
    pooling: str = option(
        "mean", "Of a text's activations: mean, last (its last token) or token (up to eight tokens, each by itself)."
    )
    sae: str = option(
        "", "An SAE of the teacher at that hook point, for k-sparse probes; by default the one that comes with it."
    )
    measurement: Path | None = option(
        None,
        "A measurement of the teacher: names the SAE, ranks its features, and says at which width the law lets"
        " them go.",
    )
    importance: str = option("second_moment", "Importance estimator of the ranks.")
    law: str = option("compressed_sensing", "Capacity law of the widths.")
    baselines: bool = option(
        True,
        "Also probe models with random weights, the teacher's principal components, its embeddings, and the control"
        " task.",
    )
    context: int | None = option(
        None, "Positions in a row, BOS included; by default what the model takes, at most 512."
    )
    batch_rows: int = option(32, "Texts in a forward pass.")
    seed: int = option(0, "Of folds, random weights, control labels and resamples.")
    device: str = option("cpu", "Where the models run.")
    threads: int = option(0, "CPU threads of the models; 0 leaves it to torch.")


@dataclass(frozen=True)
class Probed:
    """The probes of one kind on one model.

    Attributes:
        model: its name.
        kind: what was probed: the trained model, or a baseline.
        width: of the model, or of the student that the baseline stands beside.
        probes: one for each concept.
        truncated: texts that did not fit the context, by concept.
    """

    model: str
    kind: str
    width: int
    probes: tuple[Probe, ...]
    truncated: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """One flat object for each concept."""
        about = {"kind": self.kind, "model": self.model, "baseline": self.kind != TRAINED}
        return [about | probe.to_json() | {"width": self.width} for probe in self.probes]


@dataclass(frozen=True)
class ProbeResult:
    """What was found.

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
        """Each model, the teacher first, with the baselines beside it, by what was probed."""
        found: list[dict[str, Probed]] = []
        for probed in self.probed:
            found += [{}] if probed.kind == TRAINED else []
            found[-1][probed.kind] = probed
        return found

    def falls(self) -> dict[str, int | None]:
        """For each concept, the widest student that is less accurate than the teacher by more than its interval."""
        teacher, students = self.trained[0], self.trained[1:]
        return {
            c.name: falls_at(teacher.probes[i], [s.probes[i] for s in students]) for i, c in enumerate(self.concepts)
        }

    def notes(self) -> list[str]:
        """What a reader must know before trusting these figures."""
        teacher = self.trained[0]
        few = [probe.concept for probe in teacher.probes if probe.accuracy.low is None]
        cut = sum(teacher.truncated.values())
        notes = [f"{cut:,} texts were longer than the context, and only their beginning was read"] if cut else []
        if few:
            notes.append(
                f"{', '.join(few)}: fewer than {MIN_GROUPS_FOR_INTERVAL} documents to test on, too few for intervals:"
                " add documents"
            )
        return notes

    def to_frame(self) -> Any:
        """The probes as a pandas DataFrame, one row for each concept and model or baseline."""
        import pandas

        return pandas.DataFrame([row for probed in self.probed for row in probed.rows()])

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        falls, truncated = self.falls(), self.trained[0].truncated
        return {
            "concepts": [
                {
                    "name": c.name,
                    "classes": list(c.classes),
                    "texts": len(c.texts),
                    "truncated": truncated[c.name],
                    "falls_at": falls[c.name],
                }
                for c in self.concepts
            ],
            "probes": [row for probed in self.probed for row in probed.rows()],
            "sparse": [sparse.to_json() | {"falls_at": falls[sparse.probe.concept]} for sparse in self.sparse],
        }


def main(config: ProbeConfig) -> ProbeResult | None:
    """Probe models for concepts, and write accuracy and AUROC beside their baselines.

    Returns:
        What was found; None where `out` already holds it.

    Raises:
        CapacityError: on an unknown model, concept or hook point, texts that cannot be probed, or a folder that already
            holds other probes.
    """
    processes = Processes.of_launch()
    own = processes.own(config.out)
    state = own.with_name(f"{own.name}.checkpoint.safetensors")
    if already_there(config.out / JSON_NAME, config.out / JSON_NAME, settings_of(config, "out")):
        remove_checkpoint(state)
        return None
    processes = processes.connected(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.monotonic()
    concepts = load_concepts(config.concepts)
    measurement = None if config.measurement is None else Measurement.load(config.measurement)
    models = [load_model(name, device=config.device) for name in named(config.model)]
    tapped = [
        _tapped(model, config.hook) for model in models
    ]  # all of them before anything is collected, in case one lacks the hook
    sae, measured = _dictionary(config, models[0], measurement)
    texts = digest(
        "\n".join(
            repr((c.name, c.texts, c.labels.tolist(), c.documents.tolist(), c.splits.tolist())) for c in concepts
        ).encode()
    )
    decides = settings_of(config, "out") | {"weights": [model.revision for model in models], "texts": texts}
    make_folder(config.out)
    checkpoint = Checkpoint(state, decides)
    result = probe(config, concepts, models, tapped, sae, measured, checkpoint, processes)
    if processes.first:
        versions = library_versions() | {"scikit-learn": importlib.metadata.version("scikit-learn")}
        about = {
            "schema": SCHEMA,
            "settings": settings_of(config, "out"),
            "versions": versions,
            "seconds": round(time.monotonic() - started, 1),
        }
        write(result, about, config.out)
        show(result)
        print(f"written to {config.out}")
    processes.wait()
    remove_checkpoint(state)
    return result


def named(models: Sequence[str]) -> list[str]:
    """The models that are meant: a distillation stands for its teacher, unless another model comes first, and its
    students, controls left out.

    Raises:
        CapacityError: where none is named.
    """
    found: list[str] = []
    for name in models:
        if (Path(name) / DISTILLATION_JSON).is_file():
            run = DistillationRun.load(name)
            found += [] if found else [run.teacher]
            found += [str(Path(name) / "students" / student.name) for student in run if student.start != "teacher"]
        else:
            found.append(name)
    if not found:
        raise CapacityError("no model is named: pass --model, the teacher first")
    return found


def probe(
    config: ProbeConfig,
    concepts: list[LabelledTexts],
    models: list[LoadedModel],
    tapped: list[Any],
    sae: SparseAutoencoder | None,
    measured: HookMeasurement | None,
    checkpoint: Checkpoint,
    processes: Processes = ALONE,
) -> ProbeResult:
    """Collect and fit, model by model, each in one of the processes; of the activations only the teacher's outlive
    their model's turn.
    """
    own = len(processes.share(models)) * (3 if config.baselines else 1) + (sae is not None and processes.first)
    with token_progress(own * len(concepts), processes.first, "probing", "probes") as advance:
        prober = Prober(config, concepts, models, tapped, checkpoint, advance)
        probed = processes.map(prober.of_model, range(len(models)))
        sparse = processes.map(lambda dictionary: prober.on_latents(dictionary, measured), [] if sae is None else [sae])
    return ProbeResult(
        tuple(concepts), tuple(p for some in probed for p in some), tuple(p for some in sparse for p in some)
    )


class Prober:
    """Fits probes, and keeps what it has fitted in a checkpoint, so that a run that was killed
    does not fit it again.
    """

    def __init__(
        self,
        config: ProbeConfig,
        concepts: list[LabelledTexts],
        models: list[LoadedModel],
        tapped: list[Any],
        checkpoint: Checkpoint,
        advance: Callable[[int], None],
    ) -> None:
        self.config, self.concepts, self.models, self.tapped = config, {c.name: c for c in concepts}, models, tapped
        self.checkpoint, self.advance, self.done = checkpoint, advance, 0
        self.of_teacher = self.reader(models[0], tapped[0])

    def of_model(self, number: int) -> list[Probed]:
        """The probes on one model, and on the baselines that stand beside it."""
        model, module = self.models[number], self.tapped[number]
        own = self.reader(model, module) if number else self.of_teacher
        read = {TRAINED: own}
        if self.config.baselines:
            untrained = cache(lambda: randomly_initialised(model.model, self.config.seed))
            twin = cache(lambda: LoadedModel(untrained(), model.tokenizer, model.name, None))
            read[RANDOM] = lambda name: self.reader(twin(), _tapped(twin(), self.config.hook))(name)
            if number:
                read[COMPONENTS] = lambda name: on_principal_components(
                    self.of_teacher(name), self.concepts[name], own(name).width
                )
            else:
                read[EMBEDDINGS] = lambda name: bag_of_embeddings(module, own(name))
        return [self.probed(number, kind, activations, own) for kind, activations in read.items()]

    def probed(self, number: int, kind: str, read: Reader, own: Reader) -> Probed:
        """The probes of one kind on what `read` gives for each concept, beside a model whose own
        activations are `own`.
        """
        found, about = [], {}
        for name, concept in self.concepts.items():

            def fit(name: str = name, concept: LabelledTexts = concept) -> tuple[list[Probe], dict[str, Any]]:
                control = kind == TRAINED and self.config.baselines
                probes = fit_probes({name: read(name)}, [concept], control=control, seed=self.config.seed)
                return probes, {"width": own(name).width, "truncated": own(name).truncated}

            probes, about[name] = self.kept(f"{number} {kind} {name}", fit)
            found += probes
        self.save()
        width = next(iter(about.values()))["width"]
        return Probed(
            _short(self.models[number].name),
            kind,
            width,
            tuple(found),
            {name: of["truncated"] for name, of in about.items()},
        )

    def on_latents(self, sae: SparseAutoencoder, measured: HookMeasurement | None) -> list[SparseProbe]:
        """Probes on few latents of the teacher's SAE."""
        read, found = self.reader(self.models[0], self.tapped[0], sae), []
        for name, concept in self.concepts.items():

            def fit(name: str = name, concept: LabelledTexts = concept) -> tuple[list[Probe], dict[str, Any]]:
                config = self.config
                sparse = sparse_probes(
                    {name: read(name)},
                    [concept],
                    measured,
                    importance=config.importance,
                    law=config.law,
                    seed=config.seed,
                )
                return [one.probe for one in sparse], {
                    "read": [[one.features, one.ranks, one.widths] for one in sparse]
                }

            probes, about = self.kept(f"sparse {name}", fit)
            found += [SparseProbe(probe, *map(tuple, of)) for probe, of in zip(probes, about["read"], strict=True)]
        return found

    def reader(self, model: LoadedModel, module: Any, sae: SparseAutoencoder | None = None) -> Reader:
        """A function that collects a model's activations, or latents, of the texts of one concept
        by name, each once.
        """
        config = self.config

        @cache
        def read(name: str) -> Activations:
            return collect(
                module,
                config.hook,
                self.concepts[name].texts,
                config.pooling,
                tokenizer=model.tokenizer,
                sae=sae,
                context=config.context,
                batch_rows=config.batch_rows,
                progress=False,
            )

        return read

    def kept(
        self, name: str, fit: Callable[[], tuple[list[Probe], dict[str, Any]]]
    ) -> tuple[list[Probe], dict[str, Any]]:
        """What was fitted under this name, now or before the run was killed, and what else is known of it."""
        tensors, about = self.checkpoint.tensors, self.checkpoint.about
        if name not in about:
            probes, others = fit()
            states = [probe.to_state() for probe in probes]
            tensors |= {
                f"{name} {i}/{field}": torch.from_numpy(array)
                for i, (_, arrays) in enumerate(states)
                for field, array in arrays.items()
            }
            about[name] = {**others, "probes": [values for values, _ in states]}
            if self.checkpoint.due:
                self.save()
        self.done += 1
        self.advance(self.done)
        arrays = ({key: tensor.numpy() for key, tensor in self.checkpoint.part(f"{name} {i}").items()} for i in count())
        return [Probe.of_state(*state) for state in zip(about[name]["probes"], arrays, strict=False)], about[name]

    def save(self) -> None:
        """Write the checkpoint."""
        self.checkpoint.save(self.checkpoint.tensors, self.checkpoint.about)


def write(result: ProbeResult, about: dict[str, Any], out: Path) -> None:
    """The table, the figure, and last the JSON, as it says that all is there."""
    make_folder(out)
    content = about | result.to_json()
    write_bytes(out / TABLE_NAME, result.to_frame().to_csv(index=False).encode())
    write_bytes(out / FIGURE_NAME, figure(content).to_html(include_plotlyjs=True).encode())
    write_json(out / JSON_NAME, content)


def figure(content: Mapping[str, Any]) -> Any:
    """Accuracy against width, of what a `probes.json` holds: a panel for each concept, models and baselines of the same
    widths with 95% intervals, and what needs no width as lines, the bag of embeddings with its own interval at both
    ends.
    """
    from plotly.subplots import make_subplots

    concepts, probes = content["concepts"], content["probes"]
    columns = min(PANELS_IN_A_ROW, len(concepts))
    n_rows = -(-len(concepts) // columns)
    titles = [" or ".join(c["classes"]) for c in concepts]
    made = make_subplots(
        rows=n_rows, cols=columns, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.3 / n_rows
    )
    widths = sorted({row["width"] for row in probes if row["kind"] == TRAINED})
    for i, concept in enumerate(concepts):
        at = {"row": i // columns + 1, "col": i % columns + 1, "showlegend": i == 0}
        of_concept = [row for row in probes if row["concept"] == concept["name"]]
        for kind, (colour, symbol) in SHOWN.items():
            shown = [row for row in of_concept if row["kind"] == kind]
            found = [Estimate(row["accuracy"], row["low"], row["high"]) for row in shown]
            add_series(
                made,
                [row["width"] for row in shown],
                found,
                kind,
                {"color": colour},
                {"color": colour, "symbol": symbol},
                **at,
            )
        teacher = next(row for row in of_concept if row["kind"] == TRAINED)
        lines = {"majority": Estimate(teacher["majority"])}
        lines |= (
            {}
            if teacher["control_accuracy"] is None
            else {"control task (teacher)": Estimate(teacher["control_accuracy"])}
        )
        lines |= {
            row["kind"]: Estimate(row["accuracy"], row["low"], row["high"])
            for row in of_concept
            if row["kind"] == EMBEDDINGS
        }
        for name, value in lines.items():
            dash, symbol = LEVELS[name]
            add_series(
                made,
                [widths[0], widths[-1]],
                [value] * 2,
                name,
                {"color": "gray", "dash": dash},
                {"color": "gray", "symbol": symbol},
                **at,
            )
    made.update_xaxes(title={"text": "width (dimensions)", "standoff": 2}, type="log", tickvals=widths)
    made.update_yaxes(range=[0.4, 1.02])
    made.update_yaxes(title="accuracy", col=1)
    made.update_layout(
        template="plotly_white",
        height=130 + 260 * n_rows,
        legend={"orientation": "h", "y": 1 + 0.2 / n_rows, "yanchor": "bottom"},
    )
    return made


def show(result: ProbeResult) -> None:
    """Print the tables."""
    from rich.console import Console

    console, falls = Console(width=180), result.falls()
    for (of, name), first in product(TABLES.items(), range(0, len(result.trained), MODELS_IN_A_TABLE)):
        baselines = (
            f" (of {RANDOM}; of the {COMPONENTS}, as many as d)" if len(result.probed) > len(result.trained) else ""
        )
        console.print(
            table(f"{name} of linear probes [95% interval over documents]{baselines}", *cells(result, of, first))
        )
    if result.sparse:
        ranked, has_students = bool(result.sparse[0].ranks), len(result.trained) > 1
        header = ["concept", "k", "accuracy", "features (importance rank)" if ranked else "features"]
        header += ["the law keeps all from width"] * ranked + ["the full probe falls at width"] * has_students
        body = [
            [
                found.probe.concept,
                str(len(found.features)),
                found.probe.accuracy.show(".3f"),
                (
                    " ".join(f"{f} ({r or '–'})" for f, r in zip(found.features, found.ranks, strict=True))
                    if ranked
                    else " ".join(map(str, found.features))
                ),
                *(["–" if found.lost_below is None else f"{found.lost_below:,}"] * ranked),
                *(["–" if falls[found.probe.concept] is None else f"{falls[found.probe.concept]:,}"] * has_students),
            ]
            for found in result.sparse
            if len(found.features) <= 4
        ]
        console.print(table(f"k-sparse probes on the SAE at {result.sparse[0].probe.hook}", header, body, right=False))
    for note in result.notes():
        console.print(f"note: {note}", highlight=False, markup=False)


def cells(result: ProbeResult, of: str, first: int = 0) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, a row for each concept and a column for each of a few models.

    Args:
        of: "accuracy" or "auroc".
        first: the model that the table begins with.
    """
    some, teacher = result.beside[first : first + MODELS_IN_A_TABLE], result.beside[0]
    header = ["concept", *(["majority"] if of == "accuracy" else []), *([EMBEDDINGS] if EMBEDDINGS in teacher else [])]
    header += [f"{each[TRAINED].model} (d={each[TRAINED].width:,})" for each in some]
    rows = []
    for i, concept in enumerate(result.concepts):
        row = [concept.name, *([f"{teacher[TRAINED].probes[i].majority:.3f}"] if of == "accuracy" else [])]
        row += [getattr(teacher[EMBEDDINGS].probes[i], of).show(".3f")] if EMBEDDINGS in teacher else []
        for each in some:
            baselines = [
                f"{getattr(each[kind].probes[i], of).value:.3f}" for kind in (RANDOM, COMPONENTS) if kind in each
            ]
            row.append(
                getattr(each[TRAINED].probes[i], of).show(".3f") + (f" ({'; '.join(baselines)})" if baselines else "")
            )
        rows.append(row)
    return header, rows


def _tapped(model: LoadedModel, hook: str) -> Any:
    """What a hook point of a model is tapped on.

    Raises:
        HookPointError: where it has none of that name; names the model.
    """
    try:
        module = tapped_model(model, [], [], [hook])
        TapPoint.of(module, hook)
    except HookPointError as problem:
        raise HookPointError(f"{model.name}: {problem}") from problem
    return module


def _dictionary(
    config: ProbeConfig, teacher: LoadedModel, measurement: Measurement | None
) -> tuple[SparseAutoencoder | None, HookMeasurement | None]:
    """The SAE of the k-sparse probes, and what was measured of it.

    Raises:
        CapacityError: where the measurement is of another model, or of other weights than the SAE has that is given.
    """
    own = teacher.named.saes.get(config.hook) if teacher.named else None
    given = config.sae or (str(own) if own is not None and measurement is None else "")
    sae = load_sae(given, config.device)[1] if given else None
    if measurement is None:
        return sae, None
    measured, of = measurement[config.hook], measurement.provenance
    if of.revision != teacher.revision:
        raise CapacityError(
            f"{config.measurement} was measured on {of.model!r} with other weights than {teacher.name!r} has: pass the"
            " teacher's measurement"
        )
    if sae is None:
        return measured_dictionary(measured, teacher, of), measured
    if dictionary_digest(sae) != measured.sae_digest:
        raise CapacityError(
            f"{config.measurement} was measured with another SAE at {config.hook}: pass its own with --sae, or leave"
            " that out"
        )
    return sae, measured


def _short(name: str) -> str:
    """A folder's own name; any other as it is."""
    return Path(name).name if Path(name).is_dir() else name


if __name__ == "__main__":
    run_file(main)
