"""Placement: the price list of chosen features, as stored in `placement.json`; torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tl_capacity.errors import MeasurementError
from tl_capacity.placement.price import ESTIMATES, Price, numbers_of
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.runtime.units import NATS
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, table, terminal_notes
from tl_capacity.storage.files import check_schema, file_in, read_result, save_into, write_record

JSON_NAME = "placement.json"
SCHEMA = 1


@dataclass(frozen=True)
class Placement(ShownInNotebooks):
    """The price list of some chosen features. It shows itself in a terminal and a notebook.

    Attributes:
        prices: one for each width and weight.
        hook, sae, sae_digest: the dictionary, and where it reads.
        features: numbers of the chosen features.
        concept: the concept whose features they are; empty where they were named one by one.
        n_chosen, n_others: how many of the chosen and of the other features could be judged.
        teacher: of the teacher itself, `chosen`, `others` and, where there is a concept, `probe`: the ceiling.
        tau: AUROC from which a feature counts as kept.
        about: model, texts, settings, for the record.
        remarks: what was seen on the way that a reader must know.
    """

    prices: tuple[Price, ...]
    hook: str
    sae: str
    sae_digest: str
    features: tuple[int, ...]
    concept: str
    n_chosen: int
    n_others: int
    teacher: Mapping[str, Estimate]
    tau: float
    about: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Price]:
        return iter(self.prices)

    def of_width(self, width: int) -> tuple[Price, ...]:
        """The prices of one width; the students without chosen features come first."""
        return tuple(sorted((p for p in self.prices if p.width == width), key=lambda price: price.weight))

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths, ascending."""
        return tuple(sorted({price.width for price in self.prices}))

    def share(self, count: Estimate, of: int) -> Estimate:
        """A count as a share of `of`."""
        ends = (None if end is None else end / of for end in (count.low, count.high))
        return Estimate(count.value / of, *ends) if of else Estimate(float("nan"))

    def notes(self) -> list[str]:
        """What a reader must know before trusting the figures."""
        notes = list(self.remarks)
        if missing := len(self.features) - self.n_chosen:
            notes.append(
                f"{missing:,} of the {len(self.features):,} chosen features fire too rarely in the held-out text to be"
                " judged: read more of it"
            )
        for price in self.prices:
            if price.gained is not None and not price.gained.value > 0:
                notes.append(
                    f"width {price.width:,}, weight {price.weight:g}: students keep no more of the chosen features"
                    " than without training for them, so there is no price"
                )
            elif price.per_feature is not None and price.per_feature.low is None:
                notes.append(
                    f"width {price.width:,}, weight {price.weight:g}: on these documents the gain may be zero, so the"
                    " price has no interval"
                )
        if any(price.kl.low is None for price in self.prices):
            notes.append("there are too few held-out documents for intervals: read more")
        if any(len(price.seeds) > 1 for price in self.prices):
            notes.append("intervals are over documents; by_seed shows how much seeds differ")
        elif self.prices:
            notes.append("students have one seed, so it is not known how much seeds differ: pass --seeds 0,1")
        return notes

    def to_json(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "schema": SCHEMA,
            "hook": self.hook,
            "sae": self.sae,
            "sae_digest": self.sae_digest,
            "features": list(self.features),
            "concept": self.concept,
            "n_chosen": self.n_chosen,
            "n_others": self.n_others,
            "tau": self.tau,
            "teacher": {name: estimate.to_json() for name, estimate in self.teacher.items()},
            "prices": [price.to_json() for price in self.prices],
            "remarks": list(self.remarks),
            "about": dict(self.about),
        }

    @classmethod
    def from_json(cls, content: Any) -> Placement:
        """The checked result that `to_json` wrote.

        Raises:
            MeasurementError: where it is of a newer version, or no price list.
        """
        try:
            check_schema(JSON_NAME, content["schema"], SCHEMA)
            made = cls(
                prices=tuple(map(Price.from_json, content["prices"])),
                features=tuple(int(feature) for feature in content["features"]),
                teacher={name: Estimate(**numbers_of(numbers)) for name, numbers in content["teacher"].items()},
                remarks=tuple(str(remark) for remark in content["remarks"]),
                about=dict(content["about"]),
                n_chosen=int(content["n_chosen"]),
                n_others=int(content["n_others"]),
                tau=float(content["tau"]),
                **{name: str(content[name]) for name in ("hook", "sae", "sae_digest", "concept")},
            )
        except MeasurementError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
            raise MeasurementError(f"{JSON_NAME} lacks or garbles {problem}: run placement again") from problem
        if not made.prices:
            raise MeasurementError(f"{JSON_NAME} has no prices: run placement again")
        return made

    def save(self, folder: str | Path) -> Path:
        """Write `placement.json` into a folder, and return the folder.

        Raises:
            CapacityError: where it cannot be written.
        """
        return save_into(folder, JSON_NAME, self.to_json(), write_record)

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read the file, or the one in a folder.

        Raises:
            MeasurementError: where it cannot be read, or is none, as in `from_json`.
        """
        file = file_in(path, JSON_NAME)
        return cls.from_json(read_result(file, SCHEMA, "run placement again"))

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each width and weight."""
        import pandas

        rows = []
        for price in self.prices:
            row: dict[str, Any] = {"width": price.width, "weight": price.weight, "budget": price.budget}
            for name in ESTIMATES:
                each = getattr(price, name) or Estimate(float("nan"))
                row |= {name: each.value, f"{name} low": each.low, f"{name} high": each.high}
            rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure of nats paid against chosen features kept, one line for each width."""
        from tl_capacity.placement.figures import price_figure

        return price_figure(self.prices, self.n_chosen, self.teacher["chosen"])

    def title(self) -> str:
        """The title of the table."""
        whose = f"the concept {self.concept!r}" if self.concept else "features chosen one by one"
        return (
            f"The price of {len(self.features):,} features at {self.hook} ({whose}); kept: AUROC ≥ {self.tau:g}, of"
            f" {self.n_chosen:,} chosen and {self.n_others:,} others judged [95% interval over documents]"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table: one row for each width and weight, then the teacher's."""
        header = ["width", "weight", "chosen kept", "others kept", f"KL ({NATS})", "paid", "per feature"]
        probed = any(price.probe is not None for price in self.prices)
        rows = [_cells(self, price) + ([_shown(price.probe, ".1%")] if probed else []) for price in self.prices]
        ceiling = [
            _kept(self, self.teacher["chosen"], self.n_chosen),
            _kept(self, self.teacher["others"], self.n_others),
        ]
        rows.append(
            ["teacher", "", *ceiling, "0", "", ""] + ([_shown(self.teacher.get("probe"), ".1%")] if probed else [])
        )
        return header + (["probe"] if probed else []), rows

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table(self.title(), *self.cells())
        yield from terminal_notes(self.notes())

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.title())}</p>{html_table(*self.cells())}{html_notes(self.notes())}"

    def __repr__(self) -> str:
        widths = ", ".join(f"{width:,}" for width in self.widths)
        return f"Placement({len(self.features):,} features at {self.hook}; widths {widths})"


def _cells(placement: Placement, price: Price) -> list[str]:
    """A row of the table."""
    return [
        f"{price.width:,}",
        f"{price.weight:g}",
        _kept(placement, price.chosen, placement.n_chosen),
        _kept(placement, price.others, placement.n_others),
        price.kl.show(significant(price.kl.value)),
        _shown(price.paid, ".4f"),
        _shown(price.per_feature, ".2g"),
    ]


def _kept(placement: Placement, count: Estimate, of: int) -> str:
    """A count of kept features as a share."""
    return placement.share(count, of).show(".1%")


def _shown(estimate: Estimate | None, digits: str) -> str:
    return "–" if estimate is None else estimate.show(digits)
