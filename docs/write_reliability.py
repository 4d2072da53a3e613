"""Writes the results of the tests of faults into docs/fault-tests.md: `python docs/write_reliability.py RESULTS.xml …`.
The files are from pytest's `--junitxml`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from write_results import filled, table

PAGE = Path(__file__).parent / "fault-tests.md"


def figures(results: Sequence[Path]) -> str:
    """What the tests recorded. Whole numbers of one name are added up over tests."""
    found: dict[str, str] = {}
    for path in results:
        for recorded in ElementTree.parse(path).iter("property"):
            name, value = recorded.attrib["name"], recorded.attrib["value"]
            found[name] = str(int(found.get(name, "0")) + int(value)) if value.isdecimal() else value
    if not found:
        raise ValueError(
            'there are no figures in these files: write them with pytest -m "slow or not slow" tests/faults'
            " --junitxml=RESULTS.xml"
        )
    return table(
        ["what", "measured"],
        [[name, f"{int(value):,}" if value.isdecimal() else value] for name, value in found.items()],
    )


if __name__ == "__main__":
    measured = figures([Path(name) for name in sys.argv[1:]])
    PAGE.write_text(
        filled(PAGE.read_text(encoding="utf-8"), "figures", measured, by="docs/write_reliability.py"), encoding="utf-8"
    )
