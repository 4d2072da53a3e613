"""Forecasts: floors of student widths that were predicted before training, one record each, saved as forecasts.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.predict.spliced import JSON_NAME as SPLICE_NAME
from tl_capacity.predict.spliced import Spliced
from tl_capacity.results.estimate import Estimate, significant
from tl_capacity.runtime.checks import checked
from tl_capacity.runtime.units import NATS
from tl_capacity.show.notebook import ShownInNotebooks
from tl_capacity.show.tables import html_notes, html_table, table, terminal_notes
from tl_capacity.storage.files import check_schema, file_in, read_record, save_into, write_record

JSON_NAME = "forecasts.json"
SCHEMA = 1


@dataclass(frozen=True)
class Forecast:
    """What one predictor says of one width.

    Attributes:
        predictor: the name of the floor predictor.
        width: d_S.
        floor: in `unit`, with its interval over documents where one is known.
        hook, sae: the hook point and the dictionary that it is of; empty where it is of the whole model, or needs no
            dictionary.
        law: the capacity law that said how many features the width keeps; empty where none did.
        order: the importance by which features were ranked; empty where they were not.
        unit: nats per token, or that of a shape that still needs a factor.

    Raises:
        CapacityError: where a name or a unit is missing, a width is below 1, or the floor is negative or not finite or
            outside its own interval.
    """

    predictor: str
    width: int
    floor: Estimate
    hook: str = ""
    sae: str = ""
    law: str = ""
    order: str = ""
    unit: str = NATS

    def __post_init__(self) -> None:
        about = f"the forecast of {self.predictor!r} for width {self.width!r}"
        if not self.predictor or not self.unit:
            raise CapacityError(f"{about} lacks the predictor's name or the unit: give both")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise CapacityError(f"{about} is not for a student width: give a whole number of at least 1")
        low, high = self.floor.low, self.floor.high
        if not (isfinite(self.floor.value) and self.floor.value >= 0):
            raise CapacityError(f"{about} is {self.floor.value:g}: a floor is a finite number of at least 0")
        if (low is None) != (high is None):
            raise CapacityError(f"{about} has one end of an interval without the other: give both or neither")
        if low is not None and high is not None and not (low <= self.floor.value <= high and isfinite(high)):
            raise CapacityError(f"{about} is {self.floor.value:g}, outside its own interval [{low:g}, {high:g}]")

    @property
    def series(self) -> tuple[str, str, str, str, str]:
        """What it has in common with the forecasts of other widths: predictor, hook, SAE, law and order."""
        return self.predictor, self.hook, self.sae, self.law, self.order

    def to_json(self) -> dict[str, Any]:
        """The forecast as a flat JSON object."""
        return {
            "predictor": self.predictor,
            "hook": self.hook,
            "sae": self.sae,
            "law": self.law,
            "order": self.order,
            "width": self.width,
            "value": self.floor.value,
            "low": self.floor.low,
            "high": self.floor.high,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Forecast:
        """The checked forecast that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: where it lacks or garbles something.
        """
        text = {name: saved.get(name, "") if name == "sae" else saved[name] for name in _TEXT}
        if wrong := [name for name, value in text.items() if not isinstance(value, str)]:
            raise TypeError(f"{wrong[0]} = {text[wrong[0]]!r}")
        value, low, high = saved["value"], saved["low"], saved["high"]
        for name, number in (("value", value), ("low", low), ("high", high)):
            absent = number is None and name != "value"
            if not absent and (not isinstance(number, int | float) or isinstance(number, bool)):
                raise TypeError(f"{name} = {number!r}")
        return cls(width=saved["width"], floor=Estimate(value, low, high), **text)


_TEXT = ("predictor", "hook", "sae", "law", "order", "unit")


@dataclass(frozen=True)
class Forecasts(ShownInNotebooks):
    """Floors that predictors forecast for one teacher. They show themselves in a terminal and a notebook.

    Attributes:
        records: one for each predictor, hook point, SAE, law, order and width.
        about: model, revision, source, tokens, seconds and versions, for the record.
        notes: what a reader must know before trusting them, a sentence each.

    Raises:
        CapacityError: where two records are of the same predictor, hook point, SAE, law, order and width.
    """

    records: tuple[Forecast, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[Any, ...]] = set()
        for each in self.records:
            key = (*each.series, each.width)
            if key in seen:
                raise CapacityError(
                    f"{each.predictor!r} forecasts the floor of width {each.width:,} twice"
                    f"{f' at {each.hook}' if each.hook else ''}: keep one of them"
                )
            seen.add(key)

    def __iter__(self) -> Iterator[Forecast]:
        return iter(self.records)

    @property
    def series(self) -> dict[tuple[str, str, str, str, str], dict[int, Forecast]]:
        """Forecasts by series (predictor, hook, SAE, law, order), and then by width."""
        by_series: dict[tuple[str, str, str, str, str], dict[int, Forecast]] = {}
        for each in self.records:
            by_series.setdefault(each.series, {})[each.width] = each
        return by_series

    def floors(self, predictor: str, hook: str = "") -> dict[int, Estimate]:
        """The floor of each width by one predictor, at a hook point or for the whole model."""
        return {each.width: each.floor for each in self.records if (each.predictor, each.hook) == (predictor, hook)}

    def check_teacher(self, model: str) -> None:
        """Refuse forecasts of another teacher. Forecasts that name no teacher pass.

        Raises:
            MeasurementError: names both.
        """
        theirs = self.about.get("model")
        if theirs is not None and theirs != model:
            raise MeasurementError(
                f"the forecasts are of the teacher {theirs!r} and not of {model!r}: forecast the floors of one teacher"
            )

    def to_json(self) -> dict[str, Any]:
        """All forecasts as a JSON object."""
        return {
            "schema": SCHEMA,
            "about": dict(self.about),
            "notes": list(self.notes),
            "forecasts": [each.to_json() for each in self.records],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Forecasts:
        """The checked forecasts that `to_json` gave.

        Raises:
            MeasurementError: where it is of a newer version.
            KeyError, TypeError, ValueError: where it lacks or garbles something.
        """
        check_schema(JSON_NAME, content["schema"], SCHEMA)
        return cls(
            tuple(map(Forecast.from_json, content["forecasts"])),
            dict(content["about"]),
            tuple(str(note) for note in content["notes"]),
        )

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write `forecasts.json` into a folder.

        Raises:
            CapacityError: where it cannot be written.
        """
        return save_into(folder, JSON_NAME, self.to_json(), write_record)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Forecasts:
        """Read the file, or the one in a folder.

        Raises:
            MeasurementError: where it cannot be read, is of a newer version, or was altered.
        """
        file = file_in(path, JSON_NAME)
        try:
            return cls.from_json(read_record(file, SCHEMA))
        except MeasurementError:
            raise
        except KeyError as problem:
            raise MeasurementError(f"{file} lacks {problem}: forecast again") from problem
        except (OSError, TypeError, ValueError, OverflowError, RecursionError) as problem:
            raise MeasurementError(f"{file} holds no forecasts ({problem}): forecast again") from problem

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each forecast."""
        import pandas

        columns = ("predictor", "hook", "sae", "law", "order", "width", "value", "low", "high", "unit")
        return pandas.DataFrame([each.to_json() for each in self.records], columns=list(columns))

    def plot(self) -> Any:
        """A plotly figure of forecast floors against width, with 95% intervals.

        There is a line for each predictor, hook point, SAE, law and order. If there are several units, only floors in
        nats per token are drawn.

        Raises:
            CapacityError: where there is none to draw.
        """
        from tl_capacity.show.figures import series_figure

        units = {each.unit for each in self.records}
        unit = units.pop() if len(units) == 1 else NATS
        rows = [
            {**each.to_json(), "series": ", ".join(filter(None, each.series))}
            for each in sorted(self.records, key=lambda each: each.width)
            if each.unit == unit
        ]
        return series_figure(rows, f"forecast floor ({unit})")

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table, with one column for each width.

        There is a row for each predictor, hook point, SAE, law and order.
        """
        widths = sorted({each.width for each in self.records})
        header = ["predictor", "hook", "SAE", "law", "order", "unit", *(f"{width:,}" for width in widths)]
        rows = []
        for names, by_width in self.series.items():
            units = dict.fromkeys(each.unit for each in by_width.values())
            shown = [by_width[width].floor if width in by_width else None for width in widths]
            cells = ["" if floor is None else floor.show(significant(floor.value)) for floor in shown]
            predictor, hook, sae, law, order = names
            rows.append([predictor, hook, sae, law, order, " or ".join(units), *cells])
        kept = [place for place, name in enumerate(header) if place in (0, 5) or any(row[place] for row in rows)]
        return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table(_TITLE, *self.cells())
        yield from terminal_notes(self.notes)

    def _repr_html_(self) -> str:
        return f"<p>{escape(_TITLE)}</p>{html_table(*self.cells())}{html_notes(self.notes)}"


_TITLE = "Forecast floors by student width [95% interval over documents]"


@checked
def spliced_and_forecasts(path: str | Path) -> tuple[Spliced | None, Forecasts | None]:
    """The splice and the forecasts in a folder or file; None for what is not there.

    Raises:
        MeasurementError: where it holds neither, or what it holds is damaged.
    """
    given = Path(path)
    files = [given / SPLICE_NAME, given / JSON_NAME] if given.is_dir() else [given, given]
    spliced = Spliced.load(files[0]) if files[0].name == SPLICE_NAME and files[0].exists() else None
    forecasts = Forecasts.load(files[1]) if files[1].name == JSON_NAME and files[1].exists() else None
    if spliced is None and forecasts is None:
        raise MeasurementError(
            f"{given} holds neither {SPLICE_NAME} nor {JSON_NAME}: pass the folder of a run that predicted floors"
        )
    return spliced, forecasts
