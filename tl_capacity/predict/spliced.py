"""Spliced: KL in nats per token of a teacher in which only the most important features pass a hook point, against how
many pass.

The floor of any width, by any capacity law, is read from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.interfaces import CapacityLaw
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import checked_widths, sparsity
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.predict.spliced_floor import SplicedFloor
from tl_capacity.predict.spliced_floor import floor_cells as floor_cells
from tl_capacity.results.estimate import significant
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.results.naming import places_told_apart
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.units import NATS
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, table, terminal_notes
from tl_capacity.storage.files import check_schema, file_in, read_result, save_into, write_record

JSON_NAME = "splice.json"
SCHEMA = 1


@dataclass(frozen=True)
class Spliced(ShownInNotebooks):
    """Curves of some hook points, dictionaries and orders of one teacher.

    They show themselves in a terminal and a notebook.

    Attributes:
        curves: one for each hook point, dictionary and order.
        about: model, text, settings, versions and seconds, for the record.
    """

    curves: tuple[SplicedCurve, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[SplicedCurve]:
        return iter(self.curves)

    def curve_of(self, hook: HookMeasurement, importance: str | None = None) -> SplicedCurve | None:
        """The curve of a hook point and SAE by one importance, by default the default one; None if there is none."""
        wanted = (hook.hook, hook.sae_digest, hook.estimator(importance).name)
        return next((c for c in self.curves if (c.hook, c.sae_digest, c.order) == wanted), None)

    @checked
    def floors(
        self, hooks: Iterable[HookMeasurement], widths: Sequence[int], law: str | None = None
    ) -> list[SplicedFloor]:
        """The floor of each width from each curve, by one capacity law, by default the default one.

        Args:
            hooks: the measurement that the curves were made from, or some of its hook points: of these come sparsity
                and importance, on which a law rests.

        Raises:
            CapacityError: where a width is below 1, or no curve is of these hook points and dictionaries.
        """
        chosen = plugins().capacity_laws.named(law)
        widths = checked_widths(widths)
        floors = [
            _floor(curve, hook, width, chosen)
            for hook in hooks
            for curve in self.curves
            if (curve.hook, curve.sae_digest) == (hook.hook, hook.sae_digest)
            for width in widths
        ]
        if widths and not floors:
            raise CapacityError(
                "the splice has no curve for a hook point and SAE of this measurement: pass the measurement that was"
                " spliced"
            )
        return floors

    def notes(self) -> list[str]:
        """What a reader must know before trusting the curves."""
        name = places_told_apart((curve.hook, curve.sae) for curve in self.curves)
        notes = [
            f"{name(curve.hook, curve.sae)}: with every latent kept the KL is"
            f" {curve.error.show(significant(curve.error.value))} {NATS}: no floor read here is lower, so below that"
            " the dictionary is the limit and not the width"
            for curve in self.curves
            if not curve.keep_error
        ]
        if any(curve.replicates is None for curve in self.curves):
            notes.append("there are too few documents for an interval: splice on more text")
        return list(dict.fromkeys(notes))

    def to_json(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {"schema": SCHEMA, "about": dict(self.about), "curves": [curve.to_json() for curve in self.curves]}

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write `splice.json` into a folder.

        Raises:
            CapacityError: where it cannot be written.
        """
        return save_into(folder, JSON_NAME, self.to_json(), write_record)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Spliced:
        """Read the file, or the one in a folder.

        Raises:
            MeasurementError: where it cannot be read, is of a newer version, or was altered.
        """
        file = file_in(path, JSON_NAME)
        content = read_result(file, SCHEMA, "splice again")
        try:
            check_schema(file, content["schema"], SCHEMA)
            return cls(tuple(map(SplicedCurve.from_json, content["curves"])), dict(content["about"]))
        except MeasurementError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise MeasurementError(f"{file} lacks or garbles {problem}: splice again") from problem

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row for each curve and number of kept features."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "hook": curve.hook,
                    "sae": curve.sae,
                    "order": curve.order,
                    "lost": curve.lost,
                    "keep_error": curve.keep_error,
                    "kept": kept,
                    "kl": estimate.value,
                    "kl_low": estimate.low,
                    "kl_high": estimate.high,
                }
                for curve in self.curves
                for kept, estimate in ((kept, curve.at(kept)) for kept in curve.kept)
            ]
        )

    def plot(self) -> Any:
        """A plotly figure of KL against the number of kept features, one line for each curve."""
        from tl_capacity.predict.figures import spliced_figure

        return spliced_figure(self.curves)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table, with one row for each curve and number of kept features."""
        return ["hook", "SAE", "order", "kept", f"KL ({NATS})"], [
            [curve.hook, curve.sae, curve.order, f"{kept:,}", estimate.show(significant(estimate.value))]
            for curve in self.curves
            for kept, estimate in ((kept, curve.at(kept)) for kept in curve.kept)
        ]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table(_TITLE, *self.cells())
        yield from terminal_notes(self.notes())

    def _repr_html_(self) -> str:
        return f"<p>{escape(_TITLE)}</p>{html_table(*self.cells())}{html_notes(self.notes())}"


_TITLE = "KL(teacher ‖ teacher with only the most important features) [95% interval over documents]"


def _floor(curve: SplicedCurve, hook: HookMeasurement, width: int, law: CapacityLaw) -> SplicedFloor:
    at = context_at(hook, hook.importance(curve.importance), sparsity(hook))
    kept = min(kept_features(law, width, at), curve.alive)
    return SplicedFloor(hook.hook, hook.sae, curve.order, law.name, width, kept, curve.alive, curve.at(kept))
