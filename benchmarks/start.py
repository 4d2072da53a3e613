"""How long Python takes to import the package, and the command to print its help.

python benchmarks/start.py: each turn is a process of its own, from its start to its end, with the files in the page
cache; two threads.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import Claim, Sitting, arguments, at_most

COMMAND = Path(sys.executable).with_name("tl-capacity")


def process(*command: str) -> Callable[[], object]:
    """Run a process from its start to its end."""
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def benchmark(sitting: Sitting) -> None:
    """Time importing and help, each in seconds."""
    bare, importing, asking = "python -c pass", "import tl_capacity", "tl-capacity --help"
    sitting.time(
        {
            bare: process(sys.executable, "-c", "pass"),
            importing: process(sys.executable, "-c", "import tl_capacity"),
            asking: process(str(COMMAND), "--help"),
        },
        [
            Claim(f"{bare}, seconds", (bare,)),
            Claim(f"{importing}, seconds", (importing,), (), at_most(0.25)),
            Claim(f"{asking}, seconds", (asking,), (), at_most(0.35)),
        ],
    )


def main() -> None:
    with Sitting("start", arguments(__doc__, 20)) as sitting:
        benchmark(sitting)


if __name__ == "__main__":
    main()
