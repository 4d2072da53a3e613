"""The two passes over the text: the first fits the readouts, the second judges them on held-out documents."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_capacity.dictionaries.adapter import inputs_for
from tl_capacity.dictionaries.encoding import Encoder, joined
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.errors import CapacityError, HookPointError, TokenSourceError
from tl_capacity.models.forward import activations_at
from tl_capacity.models.hook_points import TapPoint, find_tap_point
from tl_capacity.probing.ranking import Firings, Ranking
from tl_capacity.probing.ridge import FitSums, Latents, Moments, Readout, fit, principal_axes, step_among
from tl_capacity.probing.scores import Scores
from tl_capacity.probing.splitting import FIT, HELD_OUT, VALIDATION, split
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.runtime.devices import exact_device
from tl_capacity.runtime.processes import Processes
from tl_capacity.runtime.progress import token_progress
from tl_capacity.storage.checkpoints import Checkpoint
from tl_capacity.text.counting import CountedTokens, CountingRule
from tl_capacity.text.streams import TokenBatch

TEACHER, RANDOM = "teacher", "with random weights"
WHOLE = "whole"
"""What sums over the documents that fit and those that choose are called in a checkpoint."""
LATENTS = "held-out latents"
"""What the sums of the latents alone are called in one. Earlier versions kept them with every readout."""
EARLIER_FIT, EARLIER_VALIDATION = "earlier fit", "earlier validation"
"""The two parts apart and of all features, as checkpoints of version 0.1 have them."""


@dataclass(frozen=True)
class Reader:
    """A model that is run up to one or several hook points.

    Attributes:
        who: the model, in a sentence.
        points: hook points, by the names under which their activations are handed on.
    """

    who: str
    model: Any
    points: Mapping[str, TapPoint]

    @classmethod
    def at_hook(cls, model: Any, hook: str, who: str, name: str, sae: Any = None) -> Reader:
        """A reader at one hook point. With an SAE, it reads the activations that the SAE was trained on.

        Raises:
            HookPointError: where the model has no such hook point.
        """
        if sae is None:
            return cls.at_hooks(model, {name: hook}, who)
        try:
            return cls(who, model, {name: reading_of(model, sae, hook).point})
        except HookPointError as problem:
            raise HookPointError(f"{who} cannot be read at {hook}: {problem}") from problem

    @classmethod
    def at_hooks(cls, model: Any, hooks: Mapping[str, str], who: str) -> Reader:
        """A reader at several hook points of a model.

        Args:
            hooks: by the names under which their activations are handed on.

        Raises:
            HookPointError: where the model lacks one.
        """
        points = {}
        for name, hook in hooks.items():
            try:
                points[name] = find_tap_point(model, hook)
            except HookPointError as problem:
                raise HookPointError(f"{who} cannot be read at {hook}: {problem}") from problem
        return cls(who, model, points)

    def __call__(
        self, batch: CountedTokens, tokens: TokenBatch, filler: int, number: int
    ) -> dict[str, Float[Tensor, "token ..."]]:
        """Activations of the counted tokens at each hook point.

        Raises:
            HookPointError: where a hook point does not fire, or gives no vector per token.
            CapacityError: where an activation is NaN or infinite.
        """
        ids = torch.from_numpy(tokens.filled(filler))
        seen = activations_at(self.model, list(self.points.values()), ids)
        return {
            name: self._counted(point.name, activation, batch, number)
            for (name, point), activation in zip(self.points.items(), seen, strict=True)
        }

    def _counted(self, point: str, seen: Tensor | None, batch: CountedTokens, number: int) -> Tensor:
        """The checked vectors of the counted tokens."""
        if seen is None or seen.shape[:2] != batch.counted.shape:
            what = (
                "did not fire"
                if seen is None
                else f"has shape {tuple(seen.shape)} for tokens of shape {tuple(batch.counted.shape)}"
            )
            raise HookPointError(f"{point} of {self.who} {what}: choose a hook point with one vector per token")
        counted = seen.flatten(0, 1)[batch.counted.flatten().to(seen.device)]
        if not bool(torch.isfinite(counted.sum(dtype=torch.float32))):
            raise CapacityError(
                f"{self.who} has NaN or infinite activations at {point} in batch {number}: check its dtype and weights"
            )
        return counted


class Passes:
    """The two passes over the stream: the first fits the readouts, the second judges them.

    Attributes:
        tokens: counted tokens of each part.
        widths: of every model's activations, after the first pass.
        signed: whether a latent below zero was seen.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        sae: Any,
        measured: HookMeasurement,
        stream: Any,
        rule: CountingRule,
        max_tokens: int | None,
        progress: bool,
        processes: Processes,
        most_features: int | None = None,
    ) -> None:
        """
        Args:
            readers: of the teacher and all others; each hook point has a name of its own, the teacher's is `TEACHER`.
            most_features: read out at most so many of the alive features, evenly spaced; None for all.
        """
        self.processes = processes
        self.readers, self.sae, self.stream, self.rule, self.max_tokens = readers, sae, stream, rule, max_tokens
        self.names = [name for reader in readers for name in reader.points]
        self.progress = progress and processes.first
        self.encoder = Encoder(sae)
        device = sae.W_dec.device
        self.device = exact_device(device)
        alive = np.flatnonzero(measured.summary.alive)
        alive = alive if most_features is None else alive[:: max(1, -(-len(alive) // most_features))]
        self.n_features = len(alive)
        self.place = torch.full((measured.summary.d_sae,), -1, dtype=torch.int64, device=self.device)
        self.place[torch.from_numpy(alive).to(self.device)] = torch.arange(len(alive), device=self.device)
        self.tokens = dict.fromkeys((FIT, VALIDATION, HELD_OUT), 0)
        self.signed = False
        self.widths: dict[str, int] = {}

    def fit(self, students: Sequence[str], checkpoint: Checkpoint) -> tuple[dict[str, Readout], dict[str, str]]:
        """The readouts of every model and of the teacher's principal components, and whose activations each one
        reads.
        """
        sums = self.sums(checkpoint, "fitting readouts")
        readouts, sources = {}, {name: name for name in self.names}
        for width in {self.widths[name] for name in students}:
            axes = principal_axes(sums[TEACHER].training(), width)
            readouts[components_of(width)] = fit(sums[TEACHER], axes)
            sources[components_of(width)] = TEACHER
        for name in self.names:
            readouts[name] = fit(sums.pop(name), used_up=True)
        return readouts, sources

    def sums(self, checkpoint: Checkpoint, label: str) -> dict[str, FitSums]:
        """The sums that readouts are fitted from, by hook point's name."""
        sums = {name: kept for name in self.names if (kept := self._kept(checkpoint, name)) is not None}
        for part, activations, latents, _ in self._batches(
            (FIT, VALIDATION),
            label,
            checkpoint,
            lambda: {
                f"{name}/{which}": moments.to_tensors()
                for name, each in sums.items()
                for which, moments in ((WHOLE, each.whole), (VALIDATION, each.validation))
            },
        ):
            for name, x in activations.items():
                if name not in sums:
                    sums[name] = FitSums.zeros(x.shape[1], self.n_features, self.device)
                sums[name].update(x, latents, part == VALIDATION)
            del activations, latents, x  # before the next forward pass
        # A process that had no batch does not know how wide the models are.
        widths = {name: len(each.whole.x) for name, each in sums.items()}
        self.widths = dict(ChainMap(*self.processes.gather(widths)))
        for name in self.names:
            mine = sums.get(name) or FitSums.zeros(self.widths[name], self.n_features, self.device)
            sums[name] = mine.over_all(self.processes)
        return sums

    def _kept(self, checkpoint: Checkpoint, name: str) -> FitSums | None:
        """The sums that a checkpoint has of a hook point; None if it has none."""
        kept = {
            part: Moments.of_tensors(tensors, self.device)
            for part, tensors in (
                (WHOLE, checkpoint.part(f"{name}/{WHOLE}")),
                (VALIDATION, checkpoint.part(f"{name}/{VALIDATION}")),
                (EARLIER_FIT, checkpoint.part(f"{FIT}/{name}")),
                (EARLIER_VALIDATION, checkpoint.part(f"{VALIDATION}/{name}")),
            )
            if tensors
        }
        if not kept:
            return None
        if WHOLE in kept:
            return FitSums(kept[WHOLE], kept[VALIDATION], step_among(self.n_features))
        nothing = Moments.zeros(len(next(iter(kept.values())).x), self.n_features, self.device)
        return FitSums.of_parts(kept.get(EARLIER_FIT, nothing), kept.get(EARLIER_VALIDATION, nothing))

    def judge(
        self, readouts: dict[str, Readout], sources: Mapping[str, str], checkpoint: Checkpoint
    ) -> dict[str, Scores]:
        """The scores of every readout on the held-out documents. Each readout is taken out of `readouts`, the largest
        first: its ranking has a copy in float32, which takes half the memory.
        """
        largest_first = sorted(readouts, key=lambda name: -readouts[name].weight.numel())
        rankings = {name: Ranking(readouts.pop(name), signed=self.signed) for name in largest_first}
        held = Firings(self.n_features, self.device)
        for name, ranking in rankings.items():
            if kept := checkpoint.part(name):
                ranking.go_on_from(kept)
                held.go_on_from(checkpoint.part(LATENTS) or kept)
        for _, activations, latents, groups in self._batches(
            (HELD_OUT,),
            "judging readouts",
            checkpoint,
            lambda: {LATENTS: held.to_tensors()} | {name: each.to_tensors() for name, each in rankings.items()},
        ):
            held.update(latents, groups)
            for name, ranking in rankings.items():
                ranking.update(activations[sources[name]], latents, groups)
            del activations, latents  # before the next forward pass
        for sums in (held, *rankings.values()):
            sums.over_all(self.processes)
        return {name: rankings.pop(name).scores(held) for name in largest_first}

    def _batches(
        self,
        parts: Sequence[str],
        label: str,
        checkpoint: Checkpoint,
        sums: Callable[[], Mapping[str, Mapping[str, Tensor]]],
    ) -> Iterator[tuple[str, dict[str, Tensor], Latents, Tensor]]:
        """The batches of some parts: part, activations of every model, latents, and document groups.

        Args:
            checkpoint: batches that went into it are left out.
            sums: what was made of the batches so far, by name, to be kept in it.
        """
        filler = self.rule.filler
        done = int(checkpoint.about.get("batches", 0))
        self.tokens |= checkpoint.about.get("tokens", {})
        self.signed |= bool(checkpoint.about.get("signed"))
        checkpoint.tensors.clear()  # they live on in the sums

        def save(batches: int) -> None:
            tensors = {f"{name}/{key}": tensor for name, each in sums().items() for key, tensor in each.items()}
            about = {"batches": batches, "tokens": {part: self.tokens[part] for part in parts}, "signed": self.signed}
            checkpoint.save(tensors, about)

        number = 0
        with token_progress(None, self.progress, label) as advance:
            for number, (part, tokens) in enumerate(split(self.stream, parts, self.max_tokens), start=1):
                if number <= done or number % self.processes.count != self.processes.index:
                    continue
                batch = self.rule.apply(tokens)
                if not batch.n_counted:
                    continue
                activations = {
                    name: x for reader in self.readers for name, x in reader(batch, tokens, filler, number).items()
                }
                latents = self._latents(activations[TEACHER], number)
                self.tokens[part] += batch.n_counted
                groups = batch.groups[batch.row_of_token].to(self.device)
                yield part, {name: x.flatten(1).to(self.device) for name, x in activations.items()}, latents, groups
                del activations, latents
                advance(sum(self.tokens[p] for p in parts))
                if checkpoint.due:
                    save(number)
        if number > done:
            save(number)
        self.tokens |= {p: int(self.processes.sum(torch.tensor(self.tokens[p]))) for p in parts}
        self.signed = bool(self.processes.sum(torch.tensor(int(self.signed))))
        if missing := [p for p in parts if not self.tokens[p]]:
            raise TokenSourceError(
                f"no document is left for {missing[0]} (of every ten, 6 fit, 1 chooses the ridge and 3 judge): pass"
                " more documents"
            )

    def _latents(self, x: Float[Tensor, "token ..."], number: int) -> Latents:
        inputs = inputs_for(self.sae, x)
        parts = [(t.to(self.device), f.to(self.device), v.to(self.device)) for t, f, v in self.encoder.entries(inputs)]
        tokens, latents, values = joined(parts)
        if not bool(torch.isfinite(values.sum())):
            raise CapacityError(f"the SAE gives NaN or infinite latents in batch {number}: check its weights")
        self.signed = self.signed or bool((values < 0).any())
        return Latents.from_entries((tokens, latents, values), self.place, self.n_features, len(inputs))


def components_of(width: int) -> str:
    """The name of the readout of this many principal components of the teacher."""
    return f"teacher's {width} principal components"
