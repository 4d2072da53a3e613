"""How long the demo takes once everything is installed, and how many lines it prints.

python benchmarks/demo.py: each turn is `tl-capacity run demo` in an empty folder, a process of its own, from its start
to its last line; two cores.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from common import Claim, Sitting, arguments, at_most, fact
from start import COMMAND


def demo() -> list[str]:
    """The lines that the demo prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(COMMAND), "run", "demo", "--out", str(Path(folder) / "demo")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def benchmark(sitting: Sitting) -> None:
    """Time the demo, in seconds, and count its lines."""
    printed: list[list[str]] = []
    name = "tl-capacity run demo"
    sitting.time({name: lambda: printed.append(demo())}, [Claim(f"{name}, seconds", (name,), (), at_most(60))])
    sitting.rows.append(fact("lines that it prints", max(map(len, printed)), at_most(40)))


def main() -> None:
    with Sitting("demo", arguments(__doc__, 150)) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
