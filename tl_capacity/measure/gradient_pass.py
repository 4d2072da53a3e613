"""Passes with gradients: activations are kept until the model has run forward and back, and are then counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_capacity.dictionaries.adapter import decoder_bias
from tl_capacity.interfaces import PathGradient
from tl_capacity.measure.backward import differentiable, frozen, gradients, path_gradient
from tl_capacity.measure.ending import Ending, Slope
from tl_capacity.measure.passes import ForwardPass, IdlePass, SteadyPass, StreamingPass
from tl_capacity.measure.tap import Tap
from tl_capacity.measure.wanted_gradients import WantedGradients
from tl_capacity.models.forward import embedding_of, forward_options
from tl_capacity.text.counting import CountedTokens


class GradientPass(ForwardPass):
    """A pass over a batch of a stream, forward to the model's end and back."""

    def __init__(
        self, number: int, tokens: CountedTokens, taps: Sequence[Tap], wanted: WantedGradients, ending: Ending
    ) -> None:
        super().__init__(number, tokens, taps)
        self._wanted, self._ending = wanted, ending
        self._seen: list[tuple[Tap, Tensor]] | None = []

    def see(self, tap: Tap, activation: Tensor) -> None:
        """Keep a tap's activation until its gradient is known. Passes along a path are not recorded."""
        if self._seen is not None:
            self._seen.append((tap, activation))

    def run(self, model: Any, ids: Tensor, seed: int) -> None:
        """Run the model forward and back, and count.

        Args:
            model: the model, whose hook points call `see`.
            ids: [row, position].
            seed: for the losses that draw.
        """
        options = forward_options(model)
        seen, self._seen = self._seen, None
        self._ending.decide(model, ids, options)
        self._seen = seen
        with differentiable(model, embedding_of(model)):
            slopes = self._ending.slopes(model, ids, options, self.tokens.valid, self._wanted.losses, seed)
            seen, self._seen = self._seen, None
            if not seen:
                return
            taps, activations = zip(*seen, strict=True)
            del seen
            by_tap = gradients(slopes, activations, self._wanted.losses)
        del slopes  # and with them the graph, before others are built
        for tap, activation, by_loss in zip(taps, activations, by_tap, strict=True):
            by_path = {path.name: self._along(path, tap, model, ids, options, seed) for path in self._wanted.paths}
            self._note_firing(tap)
            self._count(tap, activation.detach(), {**by_loss, **by_path})

    def _count(self, tap: Tap, activation: Tensor, along: Mapping[str, Tensor]) -> None:
        self._keep(tap, tap.observe(activation, self.tokens, self.number, along))

    def _along(
        self, path: PathGradient, tap: Tap, model: Any, ids: Tensor, options: dict[str, Any], seed: int
    ) -> Tensor:
        """The gradient at a tap, averaged along the path from the decoder's bias. Other taps keep their activations."""
        tap.refuse_unless_linear()

        def slope_with(move: Callable[[Tensor], Tensor]) -> Slope:
            with _edited(tap, move):
                [slope] = self._ending.slopes(model, ids, options, self.tokens.valid, [path.loss], seed)
            return slope

        bias = decoder_bias(tap.sae)
        baseline = torch.zeros(tap.d_in) if bias is None else bias
        with frozen(model):
            return path_gradient(slope_with, baseline, self.tokens.counted, path.steps)


class IdleGradientPass(GradientPass):
    """A forward and backward pass that counts nothing. It keeps in step with processes that still have text."""

    def _count(self, tap: Tap, activation: Tensor, along: Mapping[str, Tensor]) -> None:
        """Count nothing."""


def kind_of_pass(
    wanted: WantedGradients, ending: Ending, together: bool, idle: bool = False
) -> Callable[[int, CountedTokens, Sequence[Tap]], StreamingPass | GradientPass]:
    """The class of pass that a batch of a stream needs.

    Args:
        wanted: gradients.
        ending: where a pass with gradients ends.
        together: whether other processes run the same pass.
        idle: whether it is run for these only.
    """
    if wanted:
        return partial(IdleGradientPass if idle else GradientPass, wanted=wanted, ending=ending)
    return IdlePass if idle else SteadyPass if together else StreamingPass


@contextmanager
def _edited(tap: Tap, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    take_away = tap.point.again().edit(change)
    try:
        yield
    finally:
        take_away()
