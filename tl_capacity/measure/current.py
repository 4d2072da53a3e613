"""CurrentPasses: the forward pass of each thread, and the number of passes so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.measure.passes import ForwardPass
from tl_capacity.measure.tap import Tap
from tl_capacity.text.counting import CountedTokens

Pass = TypeVar("Pass", bound=ForwardPass)


class CurrentPasses:
    """The forward pass that each thread is running.

    Attributes:
        lock: held by whoever adds to what was counted.
        begun: how many passes began so far.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.lock, self.begun = threading.RLock(), 0
        self._taps, self._incomplete = taps, 0
        self._latest: dict[int, ForwardPass] = {}
        self._running: int | None = None

    @property
    def incomplete(self) -> int:
        """How many passes did not reach every tap."""
        return self._incomplete + sum(not self._reached_all(latest) for latest in self._latest.values())

    def begin(self, kind: Callable[..., Pass], tokens: CountedTokens) -> Pass:
        """Begin a pass of this thread, of the given kind.

        Raises:
            CapacityError: where another thread is running over a stream.
        """
        self._check_turn()
        self._forget(threading.get_ident())
        if self._latest:
            for ended in self._latest.keys() - {thread.ident for thread in threading.enumerate()}:
                self._forget(ended)
        self.begun += 1
        begun = kind(self.begun, tokens, self._taps)
        begun.beside(self._latest.values())
        self._latest[threading.get_ident()] = begun
        return begun

    def current(self, hook: str) -> ForwardPass:
        """The pass that this thread is running.

        Raises:
            CapacityError: where there is none, as no token ids were seen.
        """
        current = self._latest.get(threading.get_ident())
        if current is None:
            raise CapacityError(
                f"{hook} fired but no token ids were seen (inputs_embeds or start_at_layer?): run the model on token"
                " ids, so that special ones can be masked"
            )
        return current

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, no other thread begins a pass.

        Raises:
            CapacityError: where one of them runs already.
        """
        self._check_turn()
        before, self._running = self._running, threading.get_ident()
        try:
            yield
        finally:
            self._running = before

    def check_fired(self) -> None:
        """
        Raises:
            HookPointError: where passes have ended, and a tap has never fired.
        """
        for tap in self._taps:
            fired = not self._latest or any(latest.fired(tap) for latest in self._latest.values())
            if not fired and not tap.has_seen:
                raise HookPointError(
                    f"{tap.hook} did not fire in {self.begun:,} forward passes: the model does not run it, tap another"
                    " hook point"
                )

    def _forget(self, thread: int) -> None:
        latest = self._latest.pop(thread, None)
        self._incomplete += latest is not None and not self._reached_all(latest)

    def _reached_all(self, forward_pass: ForwardPass) -> bool:
        return all(map(forward_pass.fired, self._taps))

    def _check_turn(self) -> None:
        if self._running not in (None, threading.get_ident()):
            raise CapacityError(
                "these capacity hooks are running over a stream in another thread: wait until that has ended, or "
                "give each thread its own model"
            )
