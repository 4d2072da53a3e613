"""Forward passes: what a pass knows of its tokens, and what the taps have seen in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.measure.tap import Tap
from tl_capacity.measure.wanted_gradients import WantedGradients
from tl_capacity.measure.written import Written
from tl_capacity.models.forward import NothingMoreToSeeError, forward_options
from tl_capacity.text.counting import CountedTokens


class ForwardPass:
    """One forward pass: a call of the model, whoever makes it.

    Attributes:
        number: of the pass, the first being 1.
        tokens: which of its tokens count.
    """

    def __init__(self, number: int, tokens: CountedTokens, taps: Sequence[Tap]) -> None:
        self.number, self.tokens, self._taps = number, tokens, taps
        self._firings: Counter[Tap] = Counter()
        self._awaiting_target: dict[Tap, list[Written]] = {}
        self._targets = set[Tap]()
        self._beside: Collection[ForwardPass] = ()

    def beside(self, others: Collection[ForwardPass]) -> None:
        """Keep open the documents of other passes. Other threads may continue them."""
        self._beside = others

    def see(self, tap: Tap, activation: Tensor) -> None:
        """Receive the activation of a tap's hook point.

        Raises:
            HookPointError: where it has fired before.
        """
        self._note_firing(tap)
        elsewhere = {document for other in self._beside for document in other.tokens.unique_documents}
        self._keep(tap, tap.observe(activation.detach(), self.tokens, self.number, open_elsewhere=elsewhere))

    def see_target(self, tap: Tap, activation: Tensor) -> None:
        """Receive the activation of the hook point that a tap's transcoder writes to."""
        self._targets.add(tap)
        written = self._awaiting_target.pop(tap, None)
        if written is not None:
            tap.observe_target(activation, self.tokens, written)

    def fired(self, tap: Tap) -> bool:
        """Whether a tap's hook point has fired."""
        return self._firings[tap] > 0

    @property
    def complete(self) -> bool:
        """Whether every tap has seen everything that it waits for."""
        return all(map(self.fired, self._taps)) and not self._awaiting_target

    def check_targets(self) -> None:
        """Refuse a finished pass in which a transcoder's target did not fire.

        Raises:
            HookPointError: where it did not.
        """
        for tap in self._awaiting_target:
            raise HookPointError(
                f"{tap.target_hook} did not fire after {tap.hook}, so the transcoder cannot be checked there: pass"
                " another hook_name_out"
            )

    def _note_firing(self, tap: Tap) -> None:
        self._firings[tap] += 1
        if self._firings[tap] > 1:
            raise HookPointError(
                f"{tap.hook} fired {self._firings[tap]:,} times in one forward pass, so it cannot be counted: tap a"
                " hook point that fires once"
            )

    def _keep(self, tap: Tap, written: list[Written]) -> None:
        if written:
            self._awaiting_target[tap] = written


class StreamingPass(ForwardPass):
    """A pass over a batch of a stream. It ends as soon as every tap has seen its part."""

    @torch.no_grad()
    def run(self, model: Any, ids: Tensor, seed: int) -> None:
        """Run the model on ids [row, position]; its hook points call `see`. The seed is not used."""
        with suppress(NothingMoreToSeeError):
            model(ids, **forward_options(model))

    def see(self, tap: Tap, activation: Tensor) -> None:
        """As in `ForwardPass`.

        Raises:
            NothingMoreToSeeError: where nothing more is to be seen.
        """
        super().see(tap, activation)
        self._end_when_complete()

    def see_target(self, tap: Tap, activation: Tensor) -> None:
        """As in `ForwardPass`.

        Raises:
            NothingMoreToSeeError: where nothing more is to be seen.
        """
        super().see_target(tap, activation)
        self._end_when_complete()

    def _end_when_complete(self) -> None:
        if self.complete:
            raise NothingMoreToSeeError


class SteadyPass(StreamingPass):
    """A pass that always ends at the same place, whatever its tokens. Other processes must gather the same blocks."""

    @property
    def complete(self) -> bool:
        """Whether every watched hook point has fired."""
        return all(self.fired(tap) and (tap.target_hook is None or tap in self._targets) for tap in self._taps)


class IdlePass(SteadyPass):
    """A pass that counts nothing. A process without text left runs it beside those that still have text."""

    def see(self, tap: Tap, activation: Tensor) -> None:
        """Note that a hook point has fired.

        Raises:
            NothingMoreToSeeError: where no other is to fire.
        """
        self._note_firing(tap)
        self._end_when_complete()


class RefusedCall(ForwardPass):
    """A plain call of the model while an importance estimator needs gradients. Only `run` provides them."""

    def __init__(self, number: int, tokens: CountedTokens, taps: Sequence[Tap], wanted: WantedGradients) -> None:
        super().__init__(number, tokens, taps)
        self._wanted = wanted

    def see(self, tap: Tap, activation: Tensor) -> None:
        """
        Raises:
            CapacityError: always.
        """
        raise CapacityError(
            f"the importance estimator {self._wanted.asking!r} needs the gradient of {self._wanted}, which a plain "
            "call of the model does not provide: use run()"
        )
