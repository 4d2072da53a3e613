"""Probes of several models for several concepts, beside baselines. Fitted probes are kept in a checkpoint.

Each process takes some of the models. Of the activations only the teacher's outlive their model's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch

from tl_capacity.errors import HookPointError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.measure.setup import tapped_model
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.models.loading import LoadedModel
from tl_capacity.probing.activations import Activations, bag_of_embeddings, collect, randomly_initialised
from tl_capacity.probing.concepts import LabelledTexts
from tl_capacity.probing.probe_result import Probed, ProbeResult
from tl_capacity.probing.probes import Probe, fit_probes, on_principal_components
from tl_capacity.probing.read_at import ReadAt
from tl_capacity.probing.rows import COMPONENTS, EMBEDDINGS, RANDOM, TRAINED
from tl_capacity.probing.sparse import SparseProbe, sparse_probes
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.processes import ALONE, Processes
from tl_capacity.runtime.progress import token_progress
from tl_capacity.storage.checkpoints import Checkpoint

Reader = Callable[[str], Activations]
"""A function from a concept's name to the activations of its texts."""
Fitted = tuple[list[Probe], dict[str, Any]]
"""Probes, and further facts about them as JSON."""


@dataclass(frozen=True)
class ProbeSettings:
    """What is read, and how probes are fitted.

    Attributes:
        hook: the hook point.
        pooling, context, batch_rows: see `collect`.
        baselines: also probe models with random weights, the teacher's principal components, its embeddings, and the
            control task.
        importance, law: of the ranks of sparse probes; None for the default ones.
        seed: of folds, random weights, control labels and resamples.
    """

    hook: str
    pooling: str = "mean"
    context: int | None = None
    batch_rows: int = 32
    baselines: bool = True
    importance: str | None = None
    law: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class TappedModel:
    """A model, and the hook points at which it may be read.

    Attributes:
        hooks: one, or several of which the best is to be chosen.
    """

    loaded: LoadedModel
    module: Any
    hooks: tuple[str, ...]

    @classmethod
    def at(cls, model: LoadedModel, *hooks: str) -> TappedModel:
        """A model that has the hook points.

        Raises:
            HookPointError: where it has none of such a name; names the model.
        """
        try:
            module = tapped_model(model, [], [], hooks)
            for hook in hooks:
                find_tap_point(module, hook)
        except HookPointError as problem:
            raise HookPointError(f"{model.name}: {problem}") from problem
        return cls(model, module, hooks)


def probe_models(
    settings: ProbeSettings,
    concepts: Sequence[LabelledTexts],
    models: Sequence[TappedModel],
    sae: SparseAutoencoder | None = None,
    measured: HookMeasurement | None = None,
    checkpoint: Checkpoint | None = None,
    processes: Processes = ALONE,
) -> ProbeResult:
    """The probes of each concept on each model, beside their baselines.

    Args:
        models: the teacher first.
        sae: of the teacher, for sparse probes.
        measured: of that SAE, for importance ranks.
        checkpoint: goes on from where it left off.
        processes: that share the models; each gets the result.

    Raises:
        CapacityError: where texts cannot be probed.
    """
    kinds = 3 if settings.baselines else 1
    trials = sum(len(model.hooks) for model in processes.share(models) if len(model.hooks) > 1)
    mine = len(processes.share(models)) * kinds + trials + (sae is not None and processes.first)
    with token_progress(mine * len(concepts), processes.first, "probing", "probes") as advance:
        fits = CheckpointedFits(checkpoint or Checkpoint(None, {}), advance)
        experiment = Experiment(settings, {concept.name: concept for concept in concepts}, models, fits)
        probed = processes.map(experiment.probe_model, range(len(models)))
        sparse = processes.map(lambda each: experiment.probe_latents(each, measured), [] if sae is None else [sae])
    return ProbeResult(
        tuple(concepts),
        tuple(each for of_model in probed for each in of_model),
        tuple(each for of_sae in sparse for each in of_sae),
    )


class CheckpointedFits:
    """Keeps fitted probes in a checkpoint, so that a killed run does not fit them again."""

    def __init__(self, checkpoint: Checkpoint, advance: Callable[[int], None]) -> None:
        self.checkpoint, self.advance, self.done = checkpoint, advance, 0

    def fitted(self, name: str, fit: Callable[[], Fitted]) -> Fitted:
        """What was fitted under this name, now or before the run was killed, and further facts about it."""
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


class Experiment:
    """Probes models one after the other. The teacher's activations are collected once and kept."""

    def __init__(
        self,
        settings: ProbeSettings,
        concepts: dict[str, LabelledTexts],
        models: Sequence[TappedModel],
        fits: CheckpointedFits,
    ) -> None:
        self.settings, self.concepts, self.models, self.fits = settings, concepts, models, fits
        self.teacher_reader = self.reader(models[0], settings.hook)

    def probe_model(self, number: int) -> list[Probed]:
        """The probes on one model and on its baselines."""
        model = self.models[number]
        read_at = self.layer_of(number)
        read = self.reader(model, read_at.hook) if number else self.teacher_reader
        readers = {TRAINED: read}
        if self.settings.baselines:
            readers |= self.baseline_readers(number, model, read, read_at.hook)
        return [self.probe_kind(number, kind, reader, read, read_at) for kind, reader in readers.items()]

    def layer_of(self, number: int) -> ReadAt:
        """The hook point at which a model is read.

        Of several, it is the one with the lowest mean of 1 − AUROC over concepts on the validation split. The test
        split has no say.
        """
        model = self.models[number]
        if len(model.hooks) == 1:
            return ReadAt(model.hooks[0], {})
        errors = {}
        for hook in model.hooks:
            read, missed = self.reader(model, hook), []
            for name, concept in self.concepts.items():

                def fit(name: str = name, concept: LabelledTexts = concept, read: Reader = read) -> Fitted:
                    activations = {name: read(name)}
                    seed = self.settings.seed
                    return fit_probes(activations, [concept], split="validation", control=False, seed=seed), {}

                [probe], _ = self.fits.fitted(f"{number} {hook} {name}", fit)
                missed.append(1 - probe.auroc.value)
            errors[hook] = sum(missed) / len(missed)
        return ReadAt.best_of(errors)

    def baseline_readers(self, number: int, model: TappedModel, read: Reader, hook: str) -> dict[str, Reader]:
        """Readers of a model's baselines at a hook point. `read` gives the model's own activations."""
        loaded = model.loaded
        untrained = cache(lambda: randomly_initialised(loaded.model, self.settings.seed))
        twin = cache(lambda: LoadedModel(untrained(), loaded.tokenizer, loaded.name, None))
        readers: dict[str, Reader] = {RANDOM: lambda name: self.reader(TappedModel.at(twin(), hook), hook)(name)}
        if number:
            readers[COMPONENTS] = lambda name: on_principal_components(
                self.teacher_reader(name), self.concepts[name], read(name).width
            )
        else:
            readers[EMBEDDINGS] = lambda name: bag_of_embeddings(model.module, read(name))
        return readers

    def probe_kind(self, number: int, kind: str, read: Reader, read_model: Reader, read_at: ReadAt) -> Probed:
        """The probes of one kind, on the activations that `read` gives. `read_model` gives the model's own."""
        fitted, about = [], {}
        for name, concept in self.concepts.items():

            def fit(name: str = name, concept: LabelledTexts = concept) -> Fitted:
                control = kind == TRAINED and self.settings.baselines
                probes = fit_probes({name: read(name)}, [concept], control=control, seed=self.settings.seed)
                return probes, {"width": read_model(name).width, "truncated": read_model(name).truncated}

            probes, about[name] = self.fits.fitted(f"{number} {kind} {name}", fit)
            fitted += probes
        self.fits.save()
        width = next(iter(about.values()))["width"]
        truncated = {name: known["truncated"] for name, known in about.items()}
        name = _short(self.models[number].loaded.name)
        elsewhere = None if read_at == ReadAt(self.settings.hook, {}) else read_at
        return Probed(name, kind, width, tuple(fitted), truncated, elsewhere)

    def probe_latents(self, sae: SparseAutoencoder, measured: HookMeasurement | None) -> list[SparseProbe]:
        """Probes on a few latents of the teacher's SAE."""
        read, settings, fitted = self.reader(self.models[0], self.settings.hook, sae), self.settings, []
        for name, concept in self.concepts.items():

            def fit(name: str = name, concept: LabelledTexts = concept) -> Fitted:
                sparse = sparse_probes(
                    {name: read(name)},
                    [concept],
                    measured,
                    importance=settings.importance,
                    law=settings.law,
                    seed=settings.seed,
                )
                return [each.probe for each in sparse], {
                    "read": [[each.features, each.ranks, each.widths] for each in sparse]
                }

            probes, about = self.fits.fitted(f"sparse {name}", fit)
            fitted += [SparseProbe(probe, *map(tuple, each)) for probe, each in zip(probes, about["read"], strict=True)]
        return fitted

    def reader(self, model: TappedModel, hook: str, sae: SparseAutoencoder | None = None) -> Reader:
        """A function that collects a concept's activations at a hook point, or an SAE's latents, once for each
        concept.
        """
        settings = self.settings

        @cache
        def read(name: str) -> Activations:
            return collect(
                model.module,
                hook,
                self.concepts[name].texts,
                settings.pooling,
                tokenizer=model.loaded.tokenizer,
                sae=sae,
                context=settings.context,
                batch_rows=settings.batch_rows,
                progress=False,
            )

        return read


def _short(name: str) -> str:
    """The last part of a folder's path; any other name as it is."""
    return Path(name).name if Path(name).is_dir() else name
