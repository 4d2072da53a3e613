"""What a benchmark ran on, and what else the machine did meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "triton", "liger-kernel", "trl")
MOST_OTHERS, MOST_STEAL = 0.05, 0.01
"""Shares of the processors' time above which others make the machine count as busy."""


def description() -> dict[str, Any]:
    """The processors, the memory and, if one was used, the GPU."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    flags = named.get("flags", "").split()
    instructions = [shown for flag, shown in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags]
    found: dict[str, Any] = {
        "processor": named.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": instructions or [flag.upper() for flag in ("avx2",) if flag in flags],
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
    }
    import torch

    if torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9)
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The folder's commit, marked if tracked code files have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs")
        return git("rev-parse", "--short", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _own() -> float:
    """Processor seconds of this process and of its finished children."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, -1)))


def _all() -> tuple[float, float]:
    """Processor seconds of the whole machine: worked, and stolen by other machines on the same host."""
    times = psutil.cpu_times()
    worked = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return worked, getattr(times, "steal", 0.0)


@dataclass
class Load:
    """What others did on the machine since this object was made."""

    average: tuple[float, float, float] = field(default_factory=os.getloadavg)
    started: float = field(default_factory=time.monotonic)
    own: float = field(default_factory=_own)
    all: tuple[float, float] = field(default_factory=_all)

    def summary(self) -> dict[str, Any]:
        """What others took so far, by `shares`, and over how many seconds."""
        worked, stolen = (now - before for now, before in zip(_all(), self.all, strict=True))
        seconds = time.monotonic() - self.started
        taken = shares(worked, stolen, _own() - self.own, seconds * (psutil.cpu_count() or 1))
        return {"seconds": round(seconds, 1), "load_before": round(self.average[0], 2), **taken}


def shares(worked: float, stolen: float, own: float, total: float) -> dict[str, Any]:
    """Shares of all processors' time that other processes and other machines took, and whether that was much.

    Args:
        worked, stolen: seconds of all processors.
        own: seconds of this process and its children.
        total: seconds that the processors had.
    """
    others, steal = max(0.0, worked - own) / max(total, 1e-9), stolen / max(total, 1e-9)
    return {
        "others": round(others, 4),
        "steal": round(steal, 4),
        "busy": others > MOST_OTHERS or steal > MOST_STEAL,
    }
