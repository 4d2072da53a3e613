"""What the demo prints at its end, in forty lines: the layers, the widths, a verdict, and where to go next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from tl_capacity.distillation.observed import ObservedFloor, observed_floors
from tl_capacity.distillation.run import DistillationRun
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.record import all_checks, record_of
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_floor import SplicedFloor
from tl_capacity.probing.recoverability import Recoverability
from tl_capacity.probing.recovery_row import RecoveryRow
from tl_capacity.results.columns import ALIVE, CRITICAL_WIDTH, FVU, L0
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import middle, short_hook
from tl_capacity.show.tables import table
from tl_capacity.show.terminal import console, print_text

PAGE = "report.html"
TARGET_LOSS = 0.5
"""A loss in nats per token that some of the students reach."""
MANY = 20_000_000
CONVERGED = "docs/results/embedded_floor.md"
"""Training tokens of the students in the package's record, and the page of their results."""
LEAGUE = (
    ("best forecast with nothing fitted (gradient, layer 5)", "0.0843 [0.0410, 0.1122]"),
    ("best of the paper's kind, with two fitted constants (fisher, layer 1)", "0.0287 [0.0109, 0.0472]"),
    ("best rival without features, with two fitted constants (1/√d)", "0.0346 [0.0087, 0.0621]"),
)
"""Errors at a left-out width in nats per token, with 95% intervals, as on that page."""
OPENERS = {"darwin": "open", "win32": "start"}
"""The command that opens a page from a terminal; on other systems xdg-open."""


@dataclass(frozen=True)
class Found:
    """The results that the stages have written.

    Attributes:
        folder: that they wrote to.
        floors: predicted at the middle hook point, in nats, a width each.
        observed: of the students, in the same order.
    """

    folder: Path
    measurement: Measurement
    floors: Sequence[SplicedFloor]
    observed: Sequence[ObservedFloor]
    tokens: int
    recovered: Recoverability

    @classmethod
    def load(cls, folder: Path) -> Found:
        """Read the results."""
        measurement, run = Measurement.load(folder), DistillationRun.load(folder / "students")
        floors = Spliced.load(folder / "splice").floors([middle(measurement)], run.widths)
        recovered = Recoverability.load(folder / "recover")
        return cls(folder, measurement, floors, observed_floors(run), run.students[0].tokens[-1], recovered)

    @property
    def hook(self) -> HookMeasurement:
        """The middle hook point, which the students are judged at."""
        return middle(self.measurement)

    @property
    def page(self) -> Path:
        """The path of the report."""
        return self.folder / PAGE


def say(found: Found, seconds: float) -> None:
    """Print the whole summary."""
    screen = console()
    screen.print(layers(found))
    screen.print(widths(found))
    print_text(" ".join(verdict(found, seconds)))
    for line in ("", *after_training(), "", *next_steps(found)):
        print_text(line)


def layers(found: Found) -> Table:
    """A table with one row for each layer."""
    columns = (ALIVE, L0, CRITICAL_WIDTH, FVU)
    rows = [
        [short_hook(found.measurement, hook.hook), *(column.brief(hook) for column in columns)]
        for hook in found.measurement
    ]
    title = f"What three layers hold, on {found.hook.summary.n_tokens:,} tokens [95% interval over documents]"
    needed = f"width for all, d* (of {found.hook.width:,})"
    return table(title, ["", "features", "active on a token", needed, "missed by the SAE"], rows)


def widths(found: Found) -> Table:
    """A table with one row for each student."""
    converged = trained_on_much(found)
    rows = [
        [
            f"{floor.width:,}",
            f"{floor.features_kept / floor.alive:.0%}",
            f"{_share(row):.0%}",
            floor.floor.show(".2f"),
            f"{student.last_tenth:.2f}",
            f"{converged[floor.width]:.2f}" if floor.width in converged else "",
        ]
        for floor, student, row in zip(found.floors, found.observed, found.recovered.rows, strict=True)
    ]
    title = (
        f"What narrower students keep of {short_hook(found.measurement, found.hook.hook)}'s features, and lose: KL from"
        " the teacher in nats per token"
    )
    header = ["width", "kept, predicted", "kept, found", "loss, predicted", f"loss at {found.tokens:,} tokens"]
    return table(title, [*header, f"at {MANY / 1e6:.0f} million"], rows)


def trained_on_much(found: Found) -> dict[int, float]:
    """The losses of students of each width after many tokens, from the package's record."""
    teacher = found.measurement.provenance.model
    return {check.width: check.observed for check in all_checks() if check.teacher == teacher}


def _share(row: RecoveryRow) -> float:
    """The share of judged features that a student kept."""
    return row.counts["kept"].value / max(1, row.n_judged)


def verdict(found: Found, seconds: float) -> list[str]:
    """Three sentences for a reader who has read nothing else."""
    hook, where = found.hook, short_hook(found.measurement, found.hook.hook)
    trained = list(zip(found.floors, found.observed, found.recovered.rows, strict=True))
    floor, student, row = min(trained, key=lambda of_width: abs(of_width[0].width - hook.width / 2))
    record = record_of(*floor.key)
    checked = (
        ""
        if record is None
        else (
            f"; where such predictions were checked on {MANY / 1e6:.0f} million tokens, students lost"
            f" {record.low:.1f} to {record.high:.1f} times as much as predicted"
        )
    )
    return [
        f"By the theory, the {hook.summary.n_alive.value:,.0f} features that this SAE finds at {where} need"
        f" {hook.summary.critical_width.value:,.0f} of the model's {hook.width:,} dimensions (another SAE gives another"
        " number), so a narrower student must drop some of them and predict worse.",
        f"A student of width {floor.width:,} should keep {floor.features_kept / floor.alive:.0%} of them and lose"
        f" {floor.floor.value:.2f} nats per token; the one that was trained here keeps {_share(row):.0%} and loses"
        f" {student.last_tenth:.2f}.",
        f"This was a smoke test of {seconds:,.0f} s, so its students are far from done and it says nothing about the"
        f" theory{checked}.",
    ]


def after_training() -> list[str]:
    """The errors of students trained on many tokens: three rows of the whole league."""
    wide = max(len(name) for name, _ in LEAGUE)
    return [
        f"What {MANY / 1e6:.0f} million tokens gave: errors at a width left out, nats per token [95%] ({CONVERGED})",
        *(f"  {name:{wide}}  {error}" for name, error in LEAGUE),
    ]


def next_steps(found: Found) -> list[str]:
    """The report, and the next commands to run."""
    opener = OPENERS.get(sys.platform, "xdg-open")
    return [
        f"The report, with training curves, kept features and examples: {opener} {shlex.quote(str(found.page))}",
        f"Which width you need:  tl-capacity plan {shlex.quote(str(found.folder))} --target-loss {TARGET_LOSS:g}",
        "Measure your model:    tl-capacity measure --model MODEL --sae SAE --source TEXT.jsonl --out runs/mine",
    ]
