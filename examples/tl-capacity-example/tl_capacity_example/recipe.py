"""A recipe: how far two importance estimators agree. It takes a measurement, so it needs neither the model nor the
text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import spearmanr

from tl_capacity import CapacityError, Measurement
from tl_capacity.recipe import option, run_file
from tl_capacity.storage.files import write_json


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    measurement: Path = field(metadata={"help": "A measurement."})
    importance: tuple[str, ...] = option(("second_moment", "mean_ablation"), "Two importance estimators.")
    out: Path | None = option(None, "A JSON file to write.")


def main(config: CompareConfig) -> dict[str, float]:
    """Print the rank correlation of two importances over the alive features of each hook point."""
    if len(config.importance) != 2:
        raise CapacityError(
            f"{','.join(config.importance)!r} is not two importance estimators: write them as"
            " second_moment,mean_ablation"
        )
    if config.out is not None and config.out.exists():
        raise CapacityError(f"{config.out} is there already: choose another --out")
    found = {}
    for at in Measurement.load(config.measurement):
        one, other = (at.importance(name) for name in config.importance)
        if min(len(set(one)), len(set(other))) < 2:
            raise CapacityError(
                f"the alive features at {at.hook} have no order, all being as important: choose other estimators, or"
                " measure more tokens"
            )
        found[at.hook] = float(spearmanr(one, other).statistic)
        print(f"{at.hook}: rank correlation {found[at.hook]:.3f} over {at.summary.alive.sum():,} alive features")
    if config.out is not None:
        write_json(config.out, {"schema": 1, "importance": list(config.importance), "rank_correlation": found})
    return found


if __name__ == "__main__":
    run_file(main)
