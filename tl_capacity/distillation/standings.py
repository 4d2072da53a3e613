"""The tables of a decomposition as text: the league, its candidates, and the floors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tl_capacity.distillation.candidates import Candidate
from tl_capacity.distillation.fitting import Fit
from tl_capacity.distillation.league import FEATURES, NEITHER, RIVALS, Group, Side

AHEAD = {FEATURES: "features ahead", RIVALS: "rivals ahead", NEITHER: NEITHER, None: "one side only"}


def league_cells(groups: Sequence[Group], short: Callable[[Candidate], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the league, with one row for each number of fitted constants.

    Args:
        short: how a candidate is called.
    """
    header = ["constants", "who is ahead", "features", "rivals", "rivals − features", "tries each", "with own tries"]
    return header, [
        [
            str(group.constants),
            AHEAD[group.ahead],
            _side(group.features, short),
            _side(group.rivals, short),
            "" if group.difference is None else group.difference[0].show(".4f"),
            f"{group.tries:,}" if group.tries else "",
            "" if group.difference is None else group.difference[1].show(".4f"),
        ]
        for group in groups
    ]


def _side(side: Side | None, short: Callable[[Candidate], str]) -> str:
    """The error of a side, and its best candidate."""
    return "none" if side is None else f"{side.error.show('.4f')}: {short(side.best)}"


def candidate_cells(
    shown: Sequence[tuple[str, Fit]], chosen: Fit, short: Callable[[Candidate], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of some candidates.

    Args:
        shown: candidates, each with its place.
        chosen: the prediction that was asked for.
        short: how a candidate is called.
    """
    header = ["constants", "place", "candidate", "error", "R²", "C", "B", "exponent"]
    return header, [
        [
            str(fit.candidate.constants),
            ", ".join(filter(None, (place, "asked for" if fit is chosen else ""))),
            short(fit.candidate),
            fit.show_error(),
            "too few widths" if fit.r2 is None else f"{fit.r2:.4f}",
            "" if fit.c is None else fit.c.show(".3g"),
            fit.b.show(".3g"),
            "" if fit.exponent is None else fit.exponent.show(".2f"),
        ]
        for place, fit in shown
    ]
