"""Threads: independent pieces of work side by side on a CPU, each on one core.

PyTorch spreads one operation over all cores, and waits for them after each. What it does not spread then runs on one
core alone. A piece of work on a core of its own waits for nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores_for(device: torch.device) -> int:
    """How many pieces of work to do side by side: as many as PyTorch has threads, on a CPU; otherwise one."""
    return torch.get_num_threads() if device.type == "cpu" and _each_thread_has_its_own_number() else 1


@torch.no_grad()
def side_by_side(work: Callable[[int, Item], Result], items: Sequence[Item], cores: int) -> list[Result]:
    """What `work` makes of each item, in the order of the items.

    Up to `cores` items are worked on at a time, in any order, each by a thread that PyTorch gives one core, without
    gradients. `work` is also given the number of its thread, from 0, for memory that a thread keeps.

    An error ends the work and is raised, as is an interruption of the caller.
    """
    cores = min(cores, len(items))
    if cores <= 1:
        return [work(0, item) for item in items]
    results: dict[int, Result] = {}
    remaining, taking = iter(enumerate(items)), threading.Lock()

    def take() -> tuple[int, Item] | None:
        with taking:
            return next(remaining, None)

    def leave_the_rest() -> None:
        while take() is not None:
            pass

    @torch.no_grad()
    def thread(number: int) -> None:
        try:
            while (taken := take()) is not None:
                place, item = taken
                results[place] = work(number, item)
        except BaseException:
            leave_the_rest()
            raise

    running = [_pool(cores, os.getpid()).submit(thread, number) for number in range(cores)]
    try:
        for each in running:
            each.result()
    finally:
        leave_the_rest()
        wait(running)
    return [results[place] for place in range(len(items))]


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """So many threads, to which PyTorch gives one core each. A forked process has none of its parent's."""
    all_there = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tl-capacity")

    def start(_: int) -> None:
        torch.get_num_threads()  # the first operation of a thread sets the number that holds for all, once
        torch.set_num_threads(1)
        all_there.wait()  # so that each of the threads gets one of these

    before = torch.get_num_threads()
    list(pool.map(start, range(threads)))
    torch.set_num_threads(before)  # threads that others start later take the last number that was set
    return pool


@lru_cache(maxsize=1)
def _each_thread_has_its_own_number() -> bool:
    """Whether `torch.set_num_threads` is for the calling thread, as with OpenMP."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
