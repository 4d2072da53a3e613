"""Trains the toy models of 48 configurations in one batch, and judges every predictor of the floors that they reach.

Students are trained on the data and distilled from teachers.

`tl-capacity run toy-sweep --preset paper --out runs/toy`; after an interruption, the same command goes on from its
checkpoint. With `--report FOLDER` it also writes `toy.md`, `toy.json` and the figures, from a finished sweep without
training anything.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_capacity.errors import CapacityError
from tl_capacity.recipe import option, run_file
from tl_capacity.runtime.paths import beside
from tl_capacity.runtime.progress import token_progress
from tl_capacity.storage.checkpoints import remove_checkpoint
from tl_capacity.storage.files import make_folder
from tl_capacity.storage.same_run import earlier_values

if TYPE_CHECKING:
    from tl_capacity import toy

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 2, "steps": 600, "evaluation_rows": 2**14},
    "paper": {"seeds": 20, "steps": 10_000, "evaluation_rows": 2**17},
}


@dataclass(frozen=True)
class ToySweepConfig:
    """Everything that decides the sweep. The preset supplies what is not given."""

    preset: str = option(
        "quick", "quick (2 seeds, 600 steps) or paper (20 seeds, 10,000 steps), both over all 48 configurations."
    )
    out: Path = option(
        Path("runs/toy"),
        "Folder to write. A checkpoint is beside it until it is complete. A complete sweep is only judged.",
    )
    report: Path | None = option(
        None, "Folder to write toy.md, toy.json and the figures to. It needs kaleido and Chromium."
    )
    features: tuple[int, ...] = option((), "Numbers of features n. Default: 10,20,40.")
    alphas: tuple[float, ...] = option((), "Sparsities α. Default: 0.8,0.9,0.95,0.99.")
    teacher_widths: tuple[int, ...] = option((), "Widths d_T of teachers. Default: 3,5,8,10.")
    widths: tuple[int, ...] = option((), "Widths d_S of students. Default: all from 1 to d_T.")
    slope: float = option(1.0, "Slope s of the importances i^−s: 1 for Zipf's law, 0 for uniform ones.")
    correlation: str = option("independent", "independent, correlated or anticorrelated pairs of features.")
    distilled: bool = option(True, "Also train students of the teachers.")
    seeds: int | None = option(None, "Number of seeds.")
    first_seed: int = option(0, "The first seed.", least=0)
    steps: int | None = option(None, "Steps of Adam.")
    batch: int = option(128, "Samples in a step, of those that are not all zero.")
    lr: float = option(1e-2, "Learning rate at the start. It falls to zero along half a cosine.")

    def settings(self) -> toy.SweepSettings:
        """The settings of the sweep.

        Raises:
            CapacityError: on an unknown preset or a value outside its domain.
        """
        from tl_capacity import toy

        if self.preset not in PRESETS:
            raise CapacityError(f"{self.preset!r} is not a preset: choose one of {', '.join(PRESETS)}")
        names = (
            "features",
            "alphas",
            "teacher_widths",
            "widths",
            "slope",
            "correlation",
            "distilled",
            "seeds",
            "first_seed",
            "steps",
            "batch",
            "lr",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in ((), None)}
        return toy.SweepSettings(**{**PRESETS[self.preset], **given})

    def arguments(self) -> str:
        """The given command line arguments that decide the sweep."""
        given = {
            field.name.replace("_", "-"): getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        words = []
        for name, value in given.items():
            if name in ("out", "report"):
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words.append(f"--{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(words)


def main(config: ToySweepConfig) -> None:
    """Train toy models of superposition and judge every predictor of their floors.

    Raises:
        CapacityError: on settings that do not fit, a folder that holds another sweep, or when interrupted.
    """
    from rich.console import Console

    from tl_capacity import toy
    from tl_capacity.show.tables import table
    from tl_capacity.toy.claims import TRAINED, claims
    from tl_capacity.toy.report import write_report
    from tl_capacity.toy.tables import pivot

    result = _sweep(config.settings(), config.out)
    students = toy.predictions(result)
    console = Console()
    for kind in result.settings.kinds:
        judged = toy.accuracy(toy.cells(students, kind))
        by_sparsity = judged[~judged.stratum.str.startswith(("d/d*", "0.8"))]
        console.print(
            table(
                f"Students {TRAINED[kind]}: median of 1 − |predicted − observed|/observed",
                *pivot(by_sparsity, "relative"),
            )
        )
    for claim in claims(result, students):
        console.print(claim, highlight=False)
    seconds = ", ".join(f"{stage} {value:,.0f} s" for stage, value in result.seconds.items())
    console.print(
        f"{config.out}: {len(result.students):,} students of {result.settings.configurations:,} configurations;"
        f" {seconds}",
        highlight=False,
    )
    if config.report is not None:
        write_report(result, config.report, f"tl-capacity run toy-sweep {config.arguments()}".strip())
        console.print(f"{config.report / 'toy.md'}: the tables, beside it toy.json and the figures", highlight=False)


def _sweep(settings: toy.SweepSettings, out: Path) -> toy.SweepResult:
    """The sweep in `out`, trained first if it is not there."""
    from tl_capacity import toy

    checkpoint = beside(out, "checkpoint.safetensors")
    if out.exists():
        result = toy.SweepResult.load(out)
        if changed := earlier_values(result.settings.to_json(), settings.to_json()):
            raise CapacityError(
                f"{out} holds a sweep with other settings ({changed}): pass those, or choose another --out"
            )
        remove_checkpoint(checkpoint)  # of a run that was killed once it had its result
        return result
    make_folder(out.parent)
    try:
        with token_progress(settings.total_steps, label="training", unit="steps") as advance:
            result = toy.run(settings, checkpoint, advance)
    except KeyboardInterrupt as problem:
        raise CapacityError(
            f"the sweep was interrupted, and its state is kept in {checkpoint}: run the same command again to resume"
        ) from problem
    result.save(out)
    remove_checkpoint(checkpoint)
    return result


if __name__ == "__main__":
    run_file(main)
