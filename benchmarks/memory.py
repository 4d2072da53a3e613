"""How much memory a candidate takes beyond the loaded state, in the process or on the device."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

PROCESSES = 3
"""Processes whose memory is measured, one after another. How much memory the allocator reuses differs between them."""


def peak_growth_mb(candidate: Callable[[], object], loaded: Callable[[], object] = lambda: None) -> float:
    """Growth of the process's peak resident memory over its present size while `candidate` runs twice, in MB. Linux
    only.

    Args:
        loaded: runs before, so that the buffers of the libraries belong to the present size.
    """
    loaded()
    ctypes.CDLL(None).malloc_trim(0)  # what making the models took and left
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    candidate()
    candidate()
    return (_status("VmHWM") - before) / 1024


def growth_apart(
    script: str, which: str, processes: int = PROCESSES, environment: Mapping[str, str] | None = None
) -> list[float]:
    """Peak growth of one candidate in MB, measured in so many separate processes of its script, which prints it with
    `--memory-of`.

    Args:
        environment: further variables of these processes.
    """
    environment = os.environ | (environment or {})
    command = [sys.executable, script, "--memory-of", which]
    return [
        float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()[-1])
        for _ in range(processes)
    ]


def device_growth_mb(candidate: Callable[[], object]) -> float:
    """Growth of the GPU's peak allocated memory while `candidate` runs, in MB. Without a GPU it runs, and the growth is
    0.
    """
    import torch

    if not torch.cuda.is_available():
        candidate()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    candidate()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")
